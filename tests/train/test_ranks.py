"""Losses are those of one rank on any number of ranks, and go on after a stop as if there had been none."""

import gc
import hashlib
import math

import psutil
import pytest
import torch

from moba_cp.bench.gates import RecordedGate
from moba_cp.train import loop
from moba_cp.train.config import TrainConfig
from moba_cp.train.mesh import open_mesh
from moba_cp.train.plan import plan_run
from moba_cp.train.yaml_config import load
from tests.helpers.distributed import run_ranks
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, train, write_text

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
        draws=True,
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


def _in_float64(rank, base, runs):
    """Train each of ``runs``, (name, overrides, checkpoint to resume), in float64; digests of the weights that they
    began with."""
    build, shard, policy = loop.build_model, loop.shard_weights, loop.MixedPrecisionPolicy
    loop.build_model = lambda *args, **kwargs: build(*args, **kwargs).double()
    loop.shard_weights = lambda module, mesh, dtype, on_host=False: shard(module, mesh, torch.float64, on_host)
    loop.MixedPrecisionPolicy = lambda **options: policy(**{**options, "reduce_dtype": torch.float64})
    digests = []
    for name, overrides, resume in runs:
        settings = [f"run.directory={base / name}", f"data.path={base / 'text'}", *overrides]
        config = load(TrainConfig, DEMO, [*SHRUNKEN, *settings])
        mesh = open_mesh(config.run)
        trainer = loop.Trainer(plan_run(config, mesh.size), mesh, resume)
        weights = [parameter.full_tensor().detach() for parameter in trainer.module.parameters()]
        digests.append(hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest())
        trainer.run()
    return digests


@pytest.mark.slow
def test_four_ranks_checkpoint_on_one_two_and_eight(tmp_path):
    """The weights to the bit, and the next losses but for the rounding of sums in float64."""
    write_text(tmp_path / "text")
    steps = ["run.checkpoint_every=3", "run.steps=3"]
    more = ["run.checkpoint_every=3", "run.steps=6"]
    half = tmp_path / "four" / "checkpoints" / "step-00000003"
    run_ranks(4, _in_float64, tmp_path, [("four", steps, None)], timeout=240)
    (began, *_) = run_ranks(4, _in_float64, tmp_path, [("four_on", more, half)], timeout=240)
    whole = logged(tmp_path / "four_on")
    assert set(whole) == {4, 5, 6}
    for ranks, layout in ((1, "zigzag"), (2, "contiguous"), (8, "zigzag")):
        name, overrides = f"on_{ranks}", [*more, f"attention.layout={layout}"]
        results = run_ranks(ranks, _in_float64, tmp_path, [(name, overrides, half)], timeout=240)
        assert results == [began] * ranks, f"{ranks} ranks began with other weights"
        assert largest_difference(whole, logged(tmp_path / name)) < 1e-12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_a_thousand_steps(tmp_path):
    """Of a rank's process, from step 200 on: within 8 MiB."""
    write_text(tmp_path / "text")
    settings = ["run.steps=1000", "run.checkpoint_every=100", "run.validate_every=100"]
    first, second = run_ranks(2, _memory_by_step, tmp_path, settings, timeout=3000)
    for by_step in (first, second):
        late = [size for step, size in by_step.items() if step >= 200]
        assert max(late) - min(late) < 8 << 20, by_step


def _memory_by_step(rank, base, settings):
    """Resident bytes every 100 steps."""
    config = load(
        TrainConfig, DEMO, [*SHRUNKEN, f"run.directory={base / 'run'}", f"data.path={base / 'text'}", *settings]
    )
    mesh = open_mesh(config.run)
    trainer, sizes = loop.Trainer(plan_run(config, mesh.size), mesh, None), {}
    step = trainer.train_step

    def train_step():
        record = step()
        if record["step"] % 100 == 0:
            gc.collect()
            sizes[record["step"]] = psutil.Process().memory_info().rss
        return record

    trainer.train_step = train_step
    trainer.run()
    return sizes
