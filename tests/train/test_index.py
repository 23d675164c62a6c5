"""Runs whose layers have index branches: warm-up and choice by the schedule, on ranks, resumed, and what is refused."""

import pytest

from moba_cp.train.config import TrainConfig
from moba_cp.train.exported import trained_model
from moba_cp.train.plan import plan_run
from moba_cp.train.plan_command import _lines
from moba_cp.train.predict import GPUS, forecast
from moba_cp.train.resume import find_checkpoint
from moba_cp.train.yaml_config import load
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, train, write_text

SHORT = ["run.steps=10", "run.checkpoint_every=4", "run.keep_checkpoints=0", "optimizer.warmup_steps=2"]
INDEX = "attention.index={heads: 2, dim: 8}"
WARM_UP = "attention.schedule=[{until: 0.6, kind: full}, {kind: moba}]"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder / "text")
    return folder


def settings(base, name, *overrides):
    return [f"run.directory={base / name}", f"data.path={base / 'text'}", *SHORT, WARM_UP, *overrides]


@pytest.fixture(scope="module")
def runs(base):
    """Folders of 10 steps each on 2 ranks that share a sequence, and on one."""
    two = [
        (settings(base, "plain"), None),
        (settings(base, "two", INDEX), None),
        (settings(base, "redone", INDEX, "model.recompute=full"), None),
        (settings(base, "resumed", INDEX), base / "two" / "checkpoints" / "step-00000008"),
        (settings(base, "started", INDEX, f"run.start_from={base / 'plain'}"), None),
    ]
    train(2, *two)
    train(1, (settings(base, "one", INDEX, "run.selection_statistics=true"), None))
    return base


def test_while_it_warms_up_the_model_learns_as_without(runs):
    plain, branch = logged(runs / "plain"), logged(runs / "two")
    assert all(abs(plain[step] - branch[step]) < 1e-12 for step in range(1, 7))
    assert any(plain[step] != branch[step] for step in range(7, 11))
    assert "index_loss" not in (runs / "plain" / "log.jsonl").read_text()


def test_the_log_has_the_branches_loss_in_both_phases(runs):
    losses = logged(runs / "two", "index_loss")
    assert set(losses) == set(range(1, 11)) and all(0 < x < 10 for x in losses.values())


@pytest.mark.parametrize("other", ["one", "redone"])
def test_ranks_and_what_is_redone_change_nothing(runs, other):
    for name, tolerance in (("loss", 1e-4), ("index_loss", 1e-4), ("gradient_norm", 1e-3)):
        expected, got = logged(runs / "two", name), logged(runs / other, name)
        assert all(abs(got[step] - expected[step]) < tolerance for step in range(1, 11)), name


def test_a_resumed_run_goes_on_with_its_branches(runs):
    whole, resumed = logged(runs / "two", "index_loss"), logged(runs / "resumed", "index_loss")
    assert set(resumed) == {9, 10}
    assert max(abs(whole[step] - resumed[step]) for step in resumed) < 1e-12


def test_a_run_may_begin_with_weights_that_had_none(runs):
    assert logged(runs / "started")[1] < logged(runs / "plain")[1]
    assert len(logged(runs / "started", "index_loss")) == 10


def test_statistics_and_the_plan_know_branches(runs, capsys):
    (of_layers,) = list(logged(runs / "one", "selection").values())[-1:]
    assert set(of_layers) == {"layer 1"} and of_layers["layer 1"]["age"] >= 1
    config = load(TrainConfig, DEMO, SHRUNKEN + settings(runs, "x", INDEX))
    made = forecast(config, 2, GPUS["h100"])
    # Two KV heads of 8 in 16 bits, half of 256 tokens, in the one layer with a branch.
    assert made.bytes["index branches, within a node"] == 2 * 2 * 8 * 2 * 256 / 2
    assert "what index branches compute is not in the time" in "".join(_lines(made, [], 0, GPUS["h100"]))


def test_what_does_not_fit_is_refused(runs):
    planned = lambda *overrides: plan_run(load(TrainConfig, DEMO, SHRUNKEN + settings(runs, "two", *overrides)), 1)
    with pytest.raises(ValueError, match="index.dim=6 does not divide head_dim=8"):
        planned("attention.index={heads: 2, dim: 6}")
    with pytest.raises(ValueError, match="top_k=1 leaves an index branch no block"):
        planned(INDEX, "attention.top_k=1")
    for other in ("attention.index={heads: 3, dim: 8}", "attention.index=null"):
        with pytest.raises(ValueError, match="attention.index is .* there and .* here"):
            find_checkpoint("", planned(other))
    with pytest.raises(ValueError, match="attention.full_layers is .* there and .* here"):
        find_checkpoint("", planned(INDEX, "attention.full_layers=none"))
    with pytest.raises(ValueError, match="which transformers does not know"):
        trained_model(runs / "two").hf_config()


def test_the_summary_counts_the_branches_parameters(runs):
    plans = [plan_run(load(TrainConfig, DEMO, SHRUNKEN + settings(runs, "x", *more)), 1) for more in ((), (INDEX,))]
    # One MoBA layer beside a full one: two KV heads with two queries of 8, a key of 8 and two weights each.
    assert "1.66 k" in plans[1].summary()[0]
    assert "index" not in plans[0].summary()[0]
