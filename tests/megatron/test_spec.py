"""The specs for Megatron-LM's trainer: configured late, by its arguments, and what they refuse."""

import argparse
import copy
import re
import sys
import types

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn

from moba_cp.cp.options import ExchangeOptions
from moba_cp.index import IndexConfig
from moba_cp.megatron import AttentionConfig, MoBACoreAttention, add_moba_args, core_attention_spec, layer, layer_spec
from moba_cp.megatron.arguments import attention_from_args
from moba_cp.megatron.layer import MoBATransformerLayer
from moba_cp.megatron.norm import TorchNorm
from moba_cp.megatron.spec import block_spec, moba_block_spec, moba_layer_spec
from tests.helpers.megatron_trainer import HYBRID, Run, model_config


@pytest.fixture(scope="module", autouse=True)
def _parallel_state():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()


def parse(*words):
    return add_moba_args(argparse.ArgumentParser(allow_abbrev=False)).parse_args(words)


@pytest.fixture
def trainer(monkeypatch):
    """Megatron-LM's trainer with the given arguments, as far as a spec sees it."""

    def start(args):
        package, module = types.ModuleType("megatron.training"), types.ModuleType("megatron.training.global_vars")
        module.get_args = lambda: args
        monkeypatch.setitem(sys.modules, package.__name__, package)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return start


def config(**fields):
    return model_config(Run(config=fields))


def changed(**fields):
    """A configuration that Megatron's own checks would not let through, or not without its optional parts."""
    plain = copy.copy(config())
    for name, value in fields.items():
        setattr(plain, name, value)
    return plain


def build(spec, of=None):
    return GPTModel(of or config(), spec, 64, 128, position_embedding_type="none")


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], AttentionConfig()),
        (["--moba-block-size", "64", "--moba-top-k", "9"], AttentionConfig(block_size=64, top_k=9)),
        (["--moba-full-layers", "last", "3"], AttentionConfig(full_layers="last 3")),
        (["--moba-full-layers", "last 3"], AttentionConfig(full_layers="last 3")),
        (["--moba-full-layers", "1", "4"], AttentionConfig(full_layers=(1, 4))),
        (["--moba-full-layers", "1,4"], AttentionConfig(full_layers=(1, 4))),
        (["--moba-full-layers", "all"], AttentionConfig(default="full")),
        (["--moba-key-conv", "5"], AttentionConfig(key_conv=5)),
        (["--moba-deterministic"], AttentionConfig(deterministic=True)),
        (
            ["--moba-index-heads", "2", "--moba-index-dim", "32", "--moba-index-score", "max"],
            AttentionConfig(index=IndexConfig(2, 32, "max")),
        ),
        (
            ["--moba-index-heads", "4", "--moba-index-warm-up", "--moba-full-layers", "last", "1"],
            AttentionConfig(default="full", full_layers="last 1", index=IndexConfig()),
        ),
        (
            ["--moba-shared-by-group", "max", "--moba-score", "max", "--moba-min-recent", "1", "--moba-sink"],
            AttentionConfig(shared_by_group="max", score="max", min_recent=1, sink=True),
        ),
    ],
    ids=str,
)
def test_flags(words, expected):
    assert attention_from_args(parse(*words)) == expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["--moba-block-size", "100"], "block_size=100 is not a positive multiple of 16"),
        (["--moba-top-k", "0"], "top_k=0 is not between 1 and 64"),
        (["--moba-min-recent", "3"], "min_recent=3 is not between 0 and 2, what top_k=3 leaves beside the query's own"),
        (["--moba-full-layers", "first", "2"], "full_layers='first 2' is not understood"),
    ],
)
def test_flags_out_of_range_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_from_args(parse(*words))


def test_help_is_printed_whatever_the_texts_of_others(capsys):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--percent", help="up to 20%) of it (default: %(default)s)")
    parser.add_argument("--share", help="100% of x")
    with pytest.raises(SystemExit, match="0"):
        add_moba_args(parser).parse_args(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "up to 20%) of it" in printed and "100% of x" in printed and "a multiple of 16 (default: 512)" in printed


@pytest.mark.parametrize("name", ["moba_layer_spec", "moba_block_spec"])
def test_spec_finds_its_configuration_when_the_model_is_built(name, trainer):
    spec = import_module(["moba_cp.megatron.spec", name])
    assert spec is {"moba_layer_spec": moba_layer_spec, "moba_block_spec": moba_block_spec}[name]
    for words, kinds, k in (
        (["--moba-top-k", "2", "--moba-full-layers", "last 1"], ["moba", "moba", "moba", "full"], 2),
        (["--moba-top-k", "5", "--moba-full-layers", "1"], ["full", "moba", "moba", "moba"], 5),
    ):
        exchange = "--moba-exchange", "query", "--moba-ranks-per-node", "8", "--moba-no-copy-engines"
        trainer(parse("--moba-block-size", "32", *exchange, *words))
        of = config()
        model = build(spec(of, vp_stage=None) if name == "moba_block_spec" else spec, of)
        cores = [one.self_attention.core_attention for one in model.decoder.layers]
        assert [core.kind for core in cores] == kinds
        assert {(core.moba.block_size, core.moba.top_k) for core in cores} == {(32, k)}
        assert {core.exchange for core in cores} == {ExchangeOptions("query", ranks_per_node=8, copy_engines=False)}
        assert all(isinstance(one, MoBATransformerLayer) for one in model.decoder.layers)


def test_block_spec_takes_the_trainers_own_kind_of_configuration():
    wrapped = types.SimpleNamespace(transformer=config())
    spec = block_spec(wrapped, attention=HYBRID)
    assert isinstance(spec, TransformerBlockSubmodules) and len(spec.layer_specs) == 4


def test_without_the_flags_the_spec_says_how_to_get_them(trainer):
    with pytest.raises(ValueError, match="moba_layer_spec is configured by the arguments of Megatron-LM's trainer"):
        build(moba_layer_spec)
    trainer(argparse.Namespace())
    with pytest.raises(ValueError, match="pass extra_args_provider=moba_cp.megatron.add_moba_args"):
        build(moba_layer_spec)


def test_only_the_core_attention_is_replaced():
    """All else is what Megatron builds for the configuration: here experts, and norms of queries and keys."""
    of = config(
        num_moe_experts=2, moe_layer_freq=[0, 1, 0, 1], qk_layernorm=True, moe_ffn_hidden_size=48, moe_router_topk=1,
        moe_router_pre_softmax=True,
    )  # fmt: skip
    layers = build(layer_spec(HYBRID), of).decoder.layers
    assert [type(one.mlp).__name__ for one in layers] == ["MLP", "MoELayer", "MLP", "MoELayer"]
    for one in layers:
        assert isinstance(one.self_attention.core_attention, MoBACoreAttention)
        assert isinstance(one.self_attention.q_layernorm, nn.RMSNorm)


def test_with_transformer_engine_its_linear_layers_and_norms_stay(monkeypatch):
    """TransformerEngine needs CUDA; here its layer spec is one of names."""
    attention = SelfAttentionSubmodules(linear_qkv="TE norm and linear", core_attention="TE's", linear_proj="TE linear")
    submodules = TransformerLayerSubmodules(self_attention=ModuleSpec(object, submodules=attention), mlp="TE mlp")
    asked = {}

    def specs(config, **how):
        asked.update(how)
        return [ModuleSpec(MoBATransformerLayer, submodules=submodules)] * config.num_layers

    monkeypatch.setattr(layer, "get_gpt_decoder_layer_specs", specs)
    of = changed(transformer_impl="transformer_engine")
    got = layer.layer_submodules(of, HYBRID, index=2)
    assert asked["use_transformer_engine"] is True
    ours = got.self_attention.submodules
    assert ours.core_attention == core_attention_spec(HYBRID) and attention.core_attention == "TE's"
    assert (ours.linear_qkv, ours.linear_proj, got.mlp) == ("TE norm and linear", "TE linear", "TE mlp")
    assert got.input_layernorm is submodules.input_layernorm
    assert layer.final_norm(of) is LayerNormImpl


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_marks_its_weights(normalization, sequence_parallel):
    norm = TorchNorm(changed(normalization=normalization, sequence_parallel=sequence_parallel), 32, eps=1e-3)
    assert len(list(norm.parameters())) == (1 if normalization == "RMSNorm" else 2)
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())
    x = torch.randn(5, 32)
    expected = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[normalization](32, eps=1e-3)(x)
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"normalization": "L2Norm"}, "normalization='L2Norm' is not served; use one of RMSNorm, LayerNorm"),
        ({"persist_layer_norm": True}, "persist_layer_norm=True needs TransformerEngine or Apex"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma=True needs TransformerEngine"),
    ],
    ids=str,
)
def test_norms_that_pytorch_has_not_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TorchNorm(changed(**fields), 32)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"transformer_impl": "transformer_engine"}, "TransformerEngine is not installed"),
        ({"transformer_impl": "inference_optimized"}, "transformer_impl='inference_optimized' is not for training"),
        ({"cp_comm_type": ["p2p"] * 4}, "cp_comm_type=['p2p', 'p2p', 'p2p', 'p2p']: the exchange is MoBA's own"),
        ({"sequence_parallel": True}, "sequence_parallel=True: without TransformerEngine the final norm"),
        ({"mtp_num_layers": 1}, "mtp_num_layers=1: layers of multi-token prediction would attend"),
        ({"heterogeneous_block_specs": True}, "heterogeneous_block_specs=True"),
        ({"experimental_attention_variant": "dsa"}, "experimental_attention_variant='dsa': the attention is MoBA"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: MoBA has no dropout"),
        ({"softmax_type": "off-by-one"}, "softmax_type='off-by-one': attention sinks"),
        ({"enable_cuda_graph": True}, "enable_cuda_graph=True: the exchange reads sizes on the host"),
        ({"attention_backend": "flash"}, "attention_backend='flash': the kernels are MoBA's own"),
    ],
    ids=str,
)
def test_what_the_layer_has_not_is_refused_at_build(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MoBATransformerLayer(changed(**fields), attention=HYBRID)


def test_layout_is_that_of_the_trainers_batches():
    of, attention = changed(context_parallel_size=2), AttentionConfig(layout="contiguous")
    with pytest.raises(ValueError, match="layout='contiguous' but Megatron-LM's batches are zigzag"):
        MoBATransformerLayer(of, attention=attention)
