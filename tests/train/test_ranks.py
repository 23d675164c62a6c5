"""Losses are those of one rank on any number of ranks, and go on after a stop as if there had been none."""

import math

import pytest

from moba_cp.bench.gates import RecordedGate
from tests.helpers.train_runs import logged, train, write_text

STEPS = range(1, 21)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of all runs: on 1, 2 and 4 ranks, whole and resumed from step 10 of the run on 2."""
    base = tmp_path_factory.mktemp("runs")
    write_text(base / "text")

    def run(name, *overrides, resume=None):
        return [f"run.directory={base / name}", f"data.path={base / 'text'}", *overrides], resume

    half = base / "two" / "checkpoints" / "step-00000010"
    padded = ("attention.layout=zigzag_per_document",)
    train(
        2,
        run("two"),
        run("two_resumed", resume=half),
        run("two_data", "run.context_size=1", "run.selection_maps=true"),
        run("two_padded", *padded),
        run("two_bfloat16", "run.dtype=bfloat16", "run.selection_maps=true"),
    )
    # What stands in a folder's log is not of the run that goes on there from a checkpoint of another.
    (base / "one_resumed").mkdir()
    (base / "one_resumed" / "log.jsonl").write_text('{"step": 5, "loss": 0.5}\n')
    first = base / "back" / "checkpoints" / "step-00000002"
    train(
        1,
        run("one"),
        run("one_resumed", resume=half),
        run("one_padded", *padded),
        run("back", "run.steps=6", "run.checkpoint_every=2", "run.keep_checkpoints=0"),
        run("back", "run.steps=5", "run.checkpoint_every=1", "run.keep_checkpoints=1", resume=first),
    )
    train(4, run("four_resumed", "run.context_size=2", resume=half))
    return base


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    return max(abs(a[step] - b[step]) for step in b)


@pytest.mark.parametrize("name", ["two", "two_data", "two_padded", "one_padded"])
def test_ranks_and_layouts_do_not_change_losses(runs, name):
    one, other = logged(runs / "one"), logged(runs / name)
    assert set(one) == set(other) == set(STEPS)
    assert largest_difference(one, other) < 1e-5
    assert one[20] < one[1] - 1, "nothing was learned, so equal losses say little"


@pytest.mark.parametrize("name", ["two_resumed", "one_resumed", "four_resumed"])
def test_resumed_losses_are_those_of_the_run_that_went_on(runs, name):
    whole, resumed = logged(runs / "two"), logged(runs / name)
    assert set(resumed) == set(range(11, 21))
    # The same ranks repeat the same arithmetic.
    assert largest_difference(whole, resumed) < (1e-5 if name != "two_resumed" else 1e-12)


def test_a_run_that_went_back_keeps_what_it_wrote_then(runs):
    names = {path.name for path in (runs / "back" / "checkpoints").iterdir()}
    assert names == {"step-00000005", "finished-00000006"}
    assert list(logged(runs / "back")) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["two", "two_data", "two_padded", "two_resumed", "one_resumed", "four_resumed"])
def test_held_out_losses_agree(runs, name):
    one, other = logged(runs / "one", "validation_loss"), logged(runs / name, "validation_loss")
    assert set(other) == ({20} if "resumed" in name else {0, 10, 20})
    assert largest_difference(one, other) < 1e-5
    assert abs(one[0] - math.log(256)) < 0.2


def test_bfloat16_learns_the_same_within_its_rounding(runs):
    wide, narrow = logged(runs / "two"), logged(runs / "two_bfloat16")
    assert 0 < largest_difference(wide, narrow) < 0.1


def test_exchange_is_logged(runs):
    two, alone, data = (logged(runs / name, "exchange")[20] for name in ("two", "one", "two_data"))
    assert two["sent_bytes"] == two["received_bytes"] > 0 and two["dense_ring_bytes"] > 0
    assert 0 < two["needed_share"] <= 1 <= two["imbalance"] <= 2
    assert alone["sent_bytes"] == data["sent_bytes"] == 0
    assert set(two["layers"]) == {"layer 1", "layer 2"}
    assert sum(layer["sent_bytes"] for layer in two["layers"].values()) == two["sent_bytes"]
    assert two["layers"]["layer 1"]["hottest_rows"] > 0 == two["layers"]["layer 2"]["hottest_rows"]


@pytest.mark.parametrize("name", ["two_bfloat16", "two_data"])
def test_selections_are_recorded_and_drawn(runs, name):
    gate = RecordedGate(runs / name / "selection.pt")
    assert gate.layers.keys() == {"layer 1"} and gate.block_size == 16 and gate.n_kv == 2
    assert gate.selection.shape == (256, 4, 2)
    taken = gate.selection[gate.selection >= 0]
    assert taken.numel() > 256 and taken.max() < 16 + 20
    assert (runs / name / "selection.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_leaves_its_files(runs):
    found = {path.name for path in (runs / "two").iterdir()}
    assert found == {"log.jsonl", "config.yaml", "versions.json", "loss.png", "checkpoints"}
    assert {path.name for path in (runs / "two" / "checkpoints").iterdir()} == {"step-00000010", "step-00000020"}
    assert (runs / "two" / "loss.png").read_bytes().startswith(b"\x89PNG")
