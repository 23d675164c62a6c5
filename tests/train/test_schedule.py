"""Runs that change their attention on the way, and runs that begin with another's weights."""

import pytest

from moba_cp.train.config import TrainConfig
from moba_cp.train.plan import plan_run
from moba_cp.train.yaml_config import load
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, train, write_text

SHORT = ["run.steps=10", "run.checkpoint_every=4", "run.keep_checkpoints=0", "optimizer.warmup_steps=2"]
SWITCH = "attention.schedule=[{until: 0.6, kind: moba}, {kind: full}]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of 10 steps each on 2 ranks; all layers MoBA unless said."""
    base = tmp_path_factory.mktemp("runs")
    write_text(base / "text")

    def run(name, *overrides, resume=None):
        settings = [f"run.directory={base / name}", f"data.path={base / 'text'}", "attention.full_layers=none"]
        return [*settings, *SHORT, *overrides], resume

    def step(n):
        return base / "switch" / "checkpoints" / f"step-{n:08}"

    train(
        2,
        run("moba"),
        run("switch", SWITCH),
        run("resumed_before", SWITCH, resume=step(4)),
        run("resumed_after", SWITCH, resume=step(8)),
        run("other_layers", "attention.full_layers=[1]", resume=step(4)),
        run("tuned", "attention.full_layers=last 1", f"run.start_from={base / 'moba'}"),
    )
    return base


def test_the_switch_takes_place_at_its_step(runs):
    moba, switch = logged(runs / "moba"), logged(runs / "switch")
    assert all(moba[step] == switch[step] for step in range(1, 7))
    assert all(moba[step] != switch[step] for step in range(7, 11))
    kinds = logged(runs / "switch", "attention")
    assert [kinds[step] for step in range(1, 11)] == ["moba"] * 6 + ["full"] * 4


def test_the_switch_makes_no_spike(runs):
    moba, switch = logged(runs / "moba"), logged(runs / "switch")
    assert all(abs(moba[step] - switch[step]) < 0.1 for step in range(7, 11))


@pytest.mark.parametrize("name, start", [("resumed_before", 5), ("resumed_after", 9)])
def test_a_resumed_run_keeps_to_the_schedule(runs, name, start):
    whole, resumed = logged(runs / "switch"), logged(runs / name)
    assert set(resumed) == set(range(start, 11))
    assert max(abs(whole[step] - resumed[step]) for step in resumed) < 1e-12


def test_a_checkpoint_goes_on_with_other_full_layers(runs):
    moba, other = logged(runs / "moba"), logged(runs / "other_layers")
    assert set(other) == set(range(5, 11)) and moba[5] != other[5]
    assert all(abs(moba[step] - other[step]) < 0.1 for step in other)


def test_weights_of_a_moba_run_are_tuned_with_full_layers(runs):
    moba, tuned = logged(runs / "moba"), logged(runs / "tuned")
    assert set(tuned) == set(range(1, 11)), "the steps begin anew"
    assert moba[1] - tuned[1] > 0.5 and tuned[1] < moba[10] + 0.3, "the weights are those of the trained run"


def plan(text, *overrides):
    return plan_run(load(TrainConfig, DEMO, [*SHRUNKEN, f"data.path={text}", *overrides]), 1)


def test_the_plan_says_the_phases(runs):
    text = runs / "text"
    lines = "\n".join(plan(text, SWITCH).summary())
    assert "schedule: moba in steps 1 to 12, full in steps 13 to 20" in lines
    flops = [
        plan(text, kind).flops_per_token() for kind in ("attention.default=moba", SWITCH, "attention.default=full")
    ]
    assert flops[1] == pytest.approx(0.6 * flops[0] + 0.4 * flops[2])


def test_a_run_too_short_for_its_phases_is_refused(runs):
    with pytest.raises(ValueError, match=r"attention.schedule\[1\] has none of 1 steps"):
        plan(runs / "text", SWITCH, "run.steps=1")
