"""Runs whose layers have convolutions over keys: on ranks, resumed, begun with weights without, and what is refused."""

from dataclasses import replace

import pytest
import torch

from moba_cp.hf import MoBACache
from moba_cp.hf.answer import answer
from moba_cp.megatron import build_model
from moba_cp.model.attention import KEY_CONV_WEIGHT
from moba_cp.train.config import TrainConfig
from moba_cp.train.exported import trained_model
from moba_cp.train.plan import plan_run
from moba_cp.train.resume import find_checkpoint
from moba_cp.train.yaml_config import load
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, train, write_text

SHORT = ["run.steps=6", "run.checkpoint_every=3", "run.keep_checkpoints=0", "optimizer.warmup_steps=2"]
CONV = "attention.key_conv=3"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of 6 steps each on 2 ranks that share a sequence, and on one."""
    base = tmp_path_factory.mktemp("runs")
    write_text(base / "text")
    train(
        2,
        (settings(base, "plain"), None),
        (settings(base, "two", CONV), None),
        (settings(base, "resumed", CONV), base / "two" / "checkpoints" / "step-00000003"),
        (settings(base, "started", CONV, f"run.start_from={base / 'plain'}"), None),
    )
    train(1, (settings(base, "one", CONV), None))
    return base


def settings(base, name, *overrides):
    return [f"run.directory={base / name}", f"data.path={base / 'text'}", *SHORT, *overrides]


def test_it_begins_as_the_model_without_and_learns(runs):
    plain, convolved = logged(runs / "plain"), logged(runs / "two")
    assert abs(plain[1] - convolved[1]) < 1e-12 and plain[6] != convolved[6]


def test_ranks_change_nothing(runs):
    for name, tolerance in (("loss", 1e-4), ("gradient_norm", 1e-3)):
        two, one = logged(runs / "two", name), logged(runs / "one", name)
        assert all(abs(two[step] - one[step]) < tolerance for step in range(1, 7)), name


def test_other_layers_may_be_full_with_the_same_weights(runs):
    overrides = settings(runs, "other", CONV, "attention.full_layers=none", f"run.start_from={runs / 'two'}")
    plan = plan_run(load(TrainConfig, DEMO, SHRUNKEN + overrides), 1)
    # It refuses what does not fit.
    assert find_checkpoint(None, plan) is None


def test_a_resumed_run_goes_on(runs):
    whole, resumed = logged(runs / "two"), logged(runs / "resumed")
    assert set(resumed) == {4, 5, 6} and max(abs(whole[step] - resumed[step]) for step in resumed) < 1e-12


def test_a_run_may_begin_with_weights_that_had_none(runs):
    assert logged(runs / "started")[1] < logged(runs / "plain")[1] - 0.1


def test_what_does_not_fit_is_refused(runs, capsys):
    from moba_cp.cli import main

    planned = lambda *overrides: plan_run(load(TrainConfig, DEMO, SHRUNKEN + settings(runs, "two", *overrides)), 1)
    for width in (5, 0):
        with pytest.raises(ValueError, match=f"attention.key_conv is 3 there and {width} here"):
            find_checkpoint("", planned(f"attention.key_conv={width}"))
    with pytest.raises(
        ValueError, match="attention.key_conv is 0 there and 3 here.*or begin a run with run.start_from"
    ):
        find_checkpoint(str(runs / "plain"), planned(CONV))
    for of_format in ("hf", "megatron"):
        assert main(["export", str(runs / "two"), "--to", str(runs / "x"), "--format", of_format]) == 2
        assert "attention.key_conv=3: no model of transformers" in capsys.readouterr().err
    assert not (runs / "x").exists()


@torch.no_grad()
def test_a_run_answers_as_its_model_goes_on(runs, capsys, monkeypatch):
    from moba_cp.cli import main

    trained, prompt, n = trained_model(runs / "two"), "def name(self, value):\n", 24

    def read(wanted):
        """Six steps have taught too little to be seen in an answer: attention and convolutions are made stronger."""
        values = trained.read(wanted)
        for name, x in values.items():
            if name.endswith(KEY_CONV_WEIGHT):
                x.mul_(0.1 / x.std())
            elif name.endswith("linear_qkv.weight"):
                x.mul_(10)
        return values

    model = build_model(trained.config.model, trained.attention)
    for name, value in read(dict(model.named_parameters())).items():
        model.get_parameter(name).copy_(value)
    monkeypatch.setattr("moba_cp.train.exported.trained_model", lambda *_: replace(trained, read=read))
    ids, passes = torch.tensor([list(prompt.encode())]), []

    def answered(of_hf, *how):
        passes.append(of_hf(ids[:, : len(prompt)], past_key_values=MoBACache(of_hf)).logits)
        return answer(of_hf, *how)

    monkeypatch.setattr("moba_cp.hf.answer.answer", answered)
    expected = model(ids)[..., :256]
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1:, :256].argmax(-1)], 1)
    assert main(["generate", str(runs / "two"), "--prompt", prompt, "--max-tokens", str(n), "--device", "cpu"]) == 0
    assert capsys.readouterr().out[:-1] == bytes(ids[0, len(prompt) :].tolist()).decode("utf-8", "replace")
    assert (passes[0][..., :256] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_summary_counts_their_parameters(runs):
    plan = plan_run(load(TrainConfig, DEMO, SHRUNKEN + settings(runs, "x", CONV)), 1)
    # Two layers: two KV heads of 8 channels, in pairs, three weights each.
    assert "48 parameters of them in convolutions over keys" in plan.summary()[0]
