"""What a run measures beside its loss, and where that can be read: log, TensorBoard, Weights & Biases, pictures."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moba_cp import CPContext, cli
from moba_cp.model.loss import IGNORED_LABEL
from moba_cp.train import sinks
from moba_cp.train.config import RunConfig, TrainConfig
from moba_cp.train.log import read_log
from moba_cp.train.plot_command import axes_of
from moba_cp.train.positions import LossByPosition
from moba_cp.train.selection import SelectionStatistics
from tests.helpers.train_runs import train, write_text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on two ranks: one whole, one stopped in the middle and resumed, both with everything measured."""
    base = tmp_path_factory.mktemp("metrics")
    write_text(base / "text")

    def run(name, *overrides, resume=None):
        every = ["run.tensorboard=true", "run.selection_statistics=true", "run.selection_maps=true", "run.steps=6",
                 "run.validate_every=2", "run.checkpoint_every=2", "run.keep_checkpoints=0"]  # fmt: skip
        return [f"run.directory={base / name}", f"data.path={base / 'text'}", *every, *overrides], resume

    train(2, run("a"), run("b"), run("b", resume=base / "b" / "checkpoints" / "step-00000004"))
    return base


def events(folder) -> dict[str, dict[int, float]]:
    """What TensorBoard reads: name -> step -> value."""
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {name: {x.step: x.value for x in read.Scalars(name)} for name in read.Tags()["scalars"]}


@pytest.mark.parametrize("name", ["a", "b"])
def test_tensorboard_reads_what_is_in_the_log(runs, name):
    log, shown = {record["step"]: record for record in read_log(runs / name / "log.jsonl")}, events(runs / name)
    assert set(shown["loss/training"]) == set(range(1, 7)) and set(shown["loss/validation"]) == {0, 2, 4, 6}
    for step in range(1, 7):
        for tag, value in (
            ("loss/training", log[step]["loss"]),
            ("run/gradient_norm", log[step]["gradient_norm"]),
            ("run/tokens_per_second", log[step]["tokens_per_second"]),
            ("exchange/sent_bytes", log[step]["exchange"]["sent_bytes"]),
        ):
            assert shown[tag][step] == pytest.approx(value, rel=1e-5), tag
    row = log[6]["validation_by_position"][-1]
    assert shown[f"loss by position/{row['from']:07d} to {row['to']}"][6] == pytest.approx(row["loss"], rel=1e-5)
    assert shown["selection age/layer 1"][6] == pytest.approx(log[6]["selection"]["layer 1"]["age"], rel=1e-5)


def test_the_log_has_loss_by_position_and_selection(runs):
    last = read_log(runs / "a" / "log.jsonl")[-1]
    rows = last["validation_by_position"]
    labels = sum(row["labels"] for row in rows)
    assert sum(row["loss"] * row["labels"] for row in rows) / labels == pytest.approx(last["validation_loss"])
    # Layer 2 attends fully; sequences have 16 blocks.
    (layer,) = last["selection"]
    statistics = last["selection"][layer]
    assert layer == "layer 1" and 1 <= statistics["age"] <= 15
    assert 0 < statistics["first_block"] < 1 and 0 < statistics["entropy"] <= 1


@pytest.fixture
def one_rank():
    """A process group of one rank, unless another test has left one."""
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if started:
        dist.destroy_process_group()


def test_loss_by_position_counts_each_label_in_its_range(one_rank):
    sums = LossByPosition(5000, torch.device("cpu"))
    positions = torch.arange(5000)
    labels = torch.where(positions % 7 == 0, IGNORED_LABEL, 1)
    sums.add(positions.float(), labels, positions)
    loss, rows = sums.reduce()
    has = labels != IGNORED_LABEL
    assert loss == pytest.approx(positions[has].double().mean().item())
    bounds = [(0, 127), (128, 255), (256, 511), (512, 1023), (1024, 2047), (2048, 4095), (4096, 8191)]
    assert [(row["from"], row["to"]) for row in rows] == bounds
    for row in rows:
        inside = has & (positions >= row["from"]) & (positions <= row["to"])
        assert row["labels"] == inside.sum() and row["loss"] == pytest.approx(positions[inside].double().mean().item())


def test_loss_by_position_in_ranges_of_one_width(one_rank):
    sums = LossByPosition(1000, torch.device("cpu"), width=300)
    positions = torch.arange(1000)
    sums.add(positions.float(), torch.ones_like(positions), positions)
    rows = sums.reduce()[1]
    assert [(row["from"], row["to"], row["labels"]) for row in rows] == [
        (0, 299, 300), (300, 599, 300), (600, 899, 300), (900, 1199, 100)
    ]  # fmt: skip
    assert [row["loss"] for row in rows] == pytest.approx([149.5, 449.5, 749.5, 949.5])


def test_selection_statistics_are_those_of_a_count(one_rank):
    """Two documents of 40 and 24 tokens in blocks of 8, so 5 and 3 blocks."""
    context = CPContext(None, "contiguous", 64, cu_seqlens=[0, 40, 64])
    generator = torch.Generator().manual_seed(0)
    selection, ages, firsts, chosen = torch.full((64, 2, 2), -1, dtype=torch.int32), [], [], []
    for t in range(64):
        first = 0 if t < 40 else 5
        current = first + (t if t < 40 else t - 40) // 8
        for h in range(2):
            candidates = torch.randperm(current - first, generator=generator)[:2] + first
            selection[t, h, : len(candidates)] = candidates
            ages += [current - int(c) for c in candidates]
            firsts += [int(c) == first for c in candidates]
            chosen += candidates.tolist()
    statistics = SelectionStatistics()
    statistics.context = context
    statistics("layer 1", selection, 1, 8)
    found = statistics.result()["layer 1"]
    shares = torch.bincount(torch.tensor(chosen)).double() / len(chosen)
    shares = shares[shares > 0]
    assert found["age"] == pytest.approx(sum(ages) / len(ages), abs=1e-3)
    assert found["first_block"] == pytest.approx(sum(firsts) / len(firsts), abs=1e-4)
    assert found["entropy"] == pytest.approx(-(shares * shares.log2()).sum().item() / math.log2(8), abs=1e-4)
    assert found["recent"] == pytest.approx(sum(age == 1 for age in ages) / len(ages), abs=1e-4)
    sets = [[set(row.tolist()) - {-1} for row in head] for head in selection.unbind(1)]
    rows = [(head[t], head[t - 1]) for head in sets for t in range(1, 64) if t != 40]
    alike = lambda pairs: sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)
    assert found["row_overlap"] == pytest.approx(alike(rows), abs=1e-4)
    assert found["group_overlap"] == pytest.approx(alike(list(zip(sets[1], sets[0]))), abs=1e-4)
    # Heads that share a selection have nobody to be compared with.
    statistics("layer 1", selection[:, :1], 1, 8)
    assert "group_overlap" not in statistics.result()["layer 1"]


def test_a_resumed_run_goes_on_in_the_same_chart_of_wandb(tmp_path, monkeypatch):
    started, logged = [], []

    def init(**settings):
        started.append(settings)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = TrainConfig(run=RunConfig(str(tmp_path), wandb="long"))
    for start_step in (0, 4, 0):
        (sink,) = sinks.open_sinks(config, tmp_path, start_step)
        sink.write(start_step + 1, sinks.scalars({"step": start_step + 1, "loss": 2.0, "exchange": {"sent_bytes": 3}}))
        sink.close()
    assert started[0]["id"] == started[1]["id"] != started[2]["id"] and started[0]["project"] == "long"
    assert started[0]["config"]["run"]["wandb"] == "long"
    assert logged[1] == (5, {"loss/training": 2.0, "exchange/sent_bytes": 3.0})


def test_a_package_that_is_missing_is_named_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else True)
    write_text(tmp_path / "text", 20)
    assert cli.main(["train", "demo", "--set", "run.wandb=x", "--set", f"data.path={tmp_path / 'text'}"]) == cli.BUG
    assert "needs the package wandb; install with: pip install wandb" in capsys.readouterr().err


def test_plot_compares_runs(runs, tmp_path, capsys, monkeypatch):
    assert cli.main(["plot", str(runs / "a"), str(runs / "b"), "--to", str(tmp_path / "x.png"), "--title", "two"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("a: 6 steps, ") and said[1].startswith("b: 6 steps, ") and "validation" in said[0]
    from matplotlib import image

    pixels = image.imread(tmp_path / "x.png")[..., :3]
    for color in ((0.12, 0.47, 0.71), (1.0, 0.5, 0.05)):
        assert (abs(pixels - color).max(-1) < 0.1).sum() > 200
    assert cli.main(["plot", str(tmp_path)]) == 2 and "no log.jsonl there" in capsys.readouterr().err


def test_axes_add_up_over_the_log():
    records = [{"step": 0}, {"step": 1, "labels": 10, "seconds": 1800}, {"step": 2, "labels": 5, "seconds": 1800}]
    assert axes_of(records) == {"steps": [0, 1, 2], "tokens": [0, 10, 15], "hours": [0, 0.5, 1.0]}
    assert json.dumps(axes_of([])) == '{"steps": [], "tokens": [], "hours": []}'
