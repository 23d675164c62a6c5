"""What stops a first try of moba_cp.megatron.pretrain is one line. The modules that megatron-core has from 0.19 on, and
GPUs, are not needed here."""

import importlib
import importlib.util
import re
import runpy
import sys
from unittest import mock

import pytest
import torch

NAME = "moba_cp.megatron.pretrain"
# What the wheels of older versions lack.
MODULES = [
    "megatron.core.tokenizers.utils",
    "megatron.core.tokenizers.utils.build_tokenizer",
    "megatron.training",
    "megatron.training.argument_utils",
    "megatron.training.arguments",
    "megatron.training.utils",
]


@pytest.fixture
def pretrain(monkeypatch):
    """The script, with stand-ins for Megatron-LM's trainer."""
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    monkeypatch.setattr("megatron.core.utils.get_batch_on_this_tp_rank", mock.Mock(), raising=False)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def test_without_the_trainer_it_says_where_it_comes_from(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(SystemExit, match='"megatron-core>=0.19", or a checkout') as refusal:
        runpy.run_module(NAME, run_name="__main__")
    assert "\n" not in str(refusal.value)
    with pytest.raises(ImportError):
        importlib.import_module(NAME)


def test_without_a_gpu_it_says_so_before_anything_else(pretrain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--num-layers", "2"])
    with pytest.raises(SystemExit, match="no CUDA GPU; Megatron-LM trains on GPUs only"):
        pretrain.main()
    assert not pretrain.parse_and_validate_args.called


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_needs_no_gpu(flag, pretrain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["pretrain", flag])
    pretrain.parse_and_validate_args.side_effect = SystemExit(0)
    with pytest.raises(SystemExit, match="0"):
        pretrain.main()


def test_flags_that_are_not_served_are_one_line(pretrain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pretrain.parse_and_validate_args.return_value = mock.Mock(spec=["sft", "use_distributed_optimizer"], sft=True)
    with pytest.raises(SystemExit, match="sft=True is not served by moba_cp.megatron.pretrain: use Megatron-LM's"):
        pretrain.main()
    assert not pretrain.pretrain.called


def test_the_factor_of_rope_scaling_reaches_the_model(pretrain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("check_args", "attention_from_args", "use_compiled_helpers"):
        monkeypatch.setattr(pretrain, name, mock.Mock())
    pretrain.parse_and_validate_args.return_value.rope_scaling_factor = 32.0
    pretrain.main()
    assert pretrain.pretrain.called
    assert pretrain.gpt_config_from_args.return_value.rope_scaling_factor == 32.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hybrid_layer_pattern": "M*"}, "hybrid_layer_pattern='M*' is not served"),
        ({"yaml_cfg": "a.yaml"}, "yaml_cfg='a.yaml' is not served"),
        ({"perform_rl_step": True}, "perform_rl_step=True is not served"),
        ({"logits_load_dir": "x"}, "logits_load_dir='x' is not served"),
        ({"position_embedding_type": "relative"}, "position_embedding_type='relative' is not served"),
    ],
    ids=str,
)
def test_what_the_script_does_not_do_is_refused(change, message, pretrain):
    pretrain.check_args(mock.Mock(spec=["use_distributed_optimizer"], use_distributed_optimizer=False))
    with pytest.raises(ValueError, match=re.escape(message)):
        pretrain.check_args(mock.Mock(spec=[*change], **change))
