"""A gradient that is not finite changes no weight, on any rank, and a log is JSON whatever it holds."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

from moba_cp.train import loop
from moba_cp.train.config import RunConfig, TrainConfig
from moba_cp.train.loop import Trainer
from moba_cp.train.memory import MemoryPlan
from moba_cp.train.mesh import open_mesh
from moba_cp.train.plan import plan_run
from moba_cp.train.report import Reporter
from moba_cp.train.yaml_config import load
from tests.helpers.distributed import run_ranks
from tests.helpers.train_runs import DEMO, SHRUNKEN, write_text


def _weights(trainer):
    return torch.cat([parameter.full_tensor().flatten() for parameter in trainer.module.parameters()]).detach()


def _poisoned_runs(rank, folder, runs):
    """Each of ``runs`` is (name, {step: value that one gradient of the last rank becomes}, overrides); what ended it
    and the weights."""
    clip, results = loop.clip_gradients, []
    for name, poison, overrides in runs:
        settings = [f"data.path={folder / 'text'}", f"run.directory={folder / name}", "run.steps=4", *overrides]
        config = load(TrainConfig, DEMO, [*SHRUNKEN, *settings])
        mesh = open_mesh(config.run)
        trainer = Trainer(plan_run(config, mesh.size), mesh, None)

        def poisoning(module, clip_norm, trainer=trainer, poison=poison, last=mesh.size - 1):
            if rank == last and trainer.step in poison:
                next(module.parameters()).grad.to_local().view(-1)[3] = poison[trainer.step]
            return clip(module, clip_norm)

        loop.clip_gradients = poisoning
        try:
            ended = trainer.run()
        except ValueError as error:
            ended = str(error)
        results.append((ended, _weights(trainer), trainer.optimizer.state_dict()["state"][0]["step"].item()))
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poisoned")
    write_text(folder / "text")
    nan, inf, skip = math.nan, math.inf, ["optimizer.skip_nonfinite=1"]
    wanted = [
        ("clean", {}, ["run.steps=2"]),
        ("stops", {3: nan}, ["run.checkpoint_every=1"]),
        ("skips", {2: inf, 4: nan}, skip),
        ("too_many", {2: -inf, 3: nan}, skip),
    ]
    by_rank = run_ranks(2, _poisoned_runs, folder, wanted, timeout=240)
    return folder, {name: [results[i] for results in by_rank] for i, (name, *_) in enumerate(wanted)}


def _records(path):
    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_run_stops_with_the_weights_of_the_step_before(runs):
    folder, results = runs
    # Two steps under the same schedule: the clean run's rate depends on the warm-up alone there.
    for (said, weights, step), (_, clean, _) in zip(results["stops"], results["clean"]):
        assert "gradient norm nan at step 3: not finite, 1 times in a row; no weight was changed by it" in said
        assert torch.equal(weights, clean) and step == 2
    names = {path.name for path in (folder / "stops" / "checkpoints").iterdir()}
    assert names == {"step-00000001", "step-00000002"}


def test_steps_are_left_out(runs):
    folder, results = runs
    for last, weights, step in results["skips"]:
        assert last["step"] == 4 and last["skipped"] and weights.isfinite().all() and step == 2
    records = {record["step"]: record for record in _records(folder / "skips" / "log.jsonl")}
    assert [step for step, record in records.items() if record.get("skipped")] == [2, 4]
    assert records[2]["gradient_norm"] is None and records[3]["gradient_norm"] > 0 and records[2]["loss"] > 0
    assert (folder / "skips" / "loss.png").exists()


def test_too_many_in_a_row_end_the_run(runs):
    for said, weights, _ in runs[1]["too_many"]:
        assert "at step 3: not finite, 2 times in a row" in said and weights.isfinite().all()


def test_what_stands_out_is_reported(tmp_path, monkeypatch):
    plan = SimpleNamespace(config=TrainConfig(run=RunConfig(str(tmp_path), steps=99)), size=1, context_size=1)
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    record = {"attention": "moba", "tokens_per_second": 1.0, "exchange": {"sent_bytes": 0}}
    with Reporter(
        plan, SimpleNamespace(first=True, device=torch.device("cpu")), 0, None, MemoryPlan((), {}, 0)
    ) as reporter:
        for step in range(1, 50):
            norm = 20.0 if step in (4, 40) else 1.0
            reporter.report({"step": step, "loss": 2.0, "gradient_norm": norm, **record})
        reporter.report({"step": 50, "loss": math.nan, "gradient_norm": math.inf, "skipped": True, **record})
    notes = [line for line in shown.getvalue().splitlines() if "times its" in line or "left out" in line]
    assert notes == [
        "step 40: gradient_norm 20 is 20.0 times its median of 32 steps",
        "step 50: loss nan, gradient norm inf: left out, no weight was changed",
    ]
    assert _records(tmp_path / "log.jsonl")[-1]["loss"] is None
