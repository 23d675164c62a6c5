"""The grid of runs: what is done is skipped, what fails is tried again, what does not fit the time is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from moba_cp.experiments import grid
from moba_cp.experiments.grid import Grid, Slot, summary_of
from moba_cp.experiments.runs import GRIDS, Maker
from moba_cp.experiments.scales import scale_called
from moba_cp.train.config import TrainConfig
from moba_cp.train.yaml_config import load
from tests.helpers.distributed import TIME_SCALE


class Thread:
    """In place of a worker's process."""

    def __init__(self, slot):
        self.pool, self.stopping = ThreadPoolExecutor(1), False

    def stop(self):
        self.stopping = True

    def close(self):
        self.pool.shutdown(wait=False)


@pytest.fixture
def maker(tmp_path):
    scale = scale_called("tiny")
    return Maker(scale, tmp_path, scale.base)


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs in the order in which they were trained, by a trainer that only writes what one writes."""
    names = []

    def train(config_file, output, tests):
        config = load(TrainConfig, config_file)
        folder = Path(config.run.directory)
        names.append(folder.name)
        if config.run.start_from is not None:
            assert (Path(config.run.start_from) / "checkpoints").is_dir()
        (folder / "checkpoints").mkdir(parents=True)
        record = {"step": config.run.steps, "loss": 2.0, "validation_loss": 2.1, "seconds": 0.5}
        (folder / "log.jsonl").write_text(json.dumps(record) + "\n")

    monkeypatch.setattr(grid, "Worker", Thread)
    monkeypatch.setattr(grid, "_train", train)
    return names


def execute(runs, maker, slots=1, **kwargs):
    return Grid(
        runs, maker.folder, "hash", [Slot(i, None) for i in range(slots)], say=lambda line: None, **kwargs
    ).execute()


def test_each_run_is_trained_once(maker, trained):
    runs = list(GRIDS["scaling-law"](maker))
    assert execute(runs[:3], maker) == [] and trained == [run.name for run in runs[:3]]
    assert execute(runs, maker) == [] and trained == [run.name for run in runs]
    found = summary_of(runs[0])
    assert (found["validation_loss"], found["corpus"], found["facts"]) == (2.1, "hash", runs[0].facts)
    assert not (Path(runs[0].config.run.directory) / "checkpoints").exists()


def test_weights_stay_until_the_last_run_that_begins_with_them(maker, trained):
    tuned = list(GRIDS["layerwise-hybrid"](maker))
    first, parent, _ = tuned[0].lineage
    execute(tuned, maker, slots=2, deadline=None)
    assert trained[:2] == [first.name, parent.name] and set(trained[2:]) == {run.name for run in tuned}
    assert not list(maker.folder.glob("runs/*/checkpoints"))
    # On another machine, where no weights are, those before it are trained again for a child that is missing.
    shutil.rmtree(tuned[-1].config.run.directory)
    for run in (first, parent):
        (Path(run.config.run.directory) / "log.jsonl").unlink()
    trained.clear()
    assert execute(tuned, maker) == [] and trained == [first.name, parent.name, tuned[-1].name]
    assert not list(maker.folder.glob("runs/*/checkpoints"))


def test_runs_trained_elsewhere_are_taken_over(maker, trained, monkeypatch, capsys):
    from moba_cp.cli import main
    from moba_cp.experiments import start

    monkeypatch.setattr(start, "_corpus", lambda *args: "hash")
    command = ["experiment", "scaling-law", "--scale", "tiny", "--directory", str(maker.folder), "--write-configs"]
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("moba-cp train ")]
    assert len(lines) == 6 and lines[0].endswith(" --resume auto")
    for line in lines[:4]:
        grid._train(line.split()[2], "", {})
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("taken over") == 4 and said.count("moba-cp train ") == 2
    assert summary_of(next(iter(GRIDS["scaling-law"](maker))))["validation_loss"] == 2.1


def test_what_finds_keys_is_taken_over_with_any_text(maker, trained):
    run = replace(next(iter(GRIDS["retrieval"](maker))).lineage[0], tests={})
    assert run.finds_keys and not grid.take_over(run, "hash")
    grid._train(str(grid.write_config(run, maker.folder)), "", {})
    assert grid.take_over(run, "hash") and summary_of(run)["corpus"] is None
    assert Grid([run], maker.folder, "another", []).done(run)


def test_what_fails_is_tried_twice(maker, trained, monkeypatch):
    runs, train, failures = list(GRIDS["scaling-law"](maker))[:3], grid._train, {"once": 1, "always": 9}

    def failing(config, output, tests):
        which = {runs[0].name: "once", runs[1].name: "always"}.get(Path(config).stem)
        if which and failures[which]:
            failures[which] -= 1
            raise RuntimeError("CUDA error")
        train(config, output, tests)

    monkeypatch.setattr(grid, "_train", failing)
    assert execute(runs, maker) == [runs[1].name] and failures["always"] == 7
    assert trained == [runs[0].name, runs[2].name]


def test_where_everything_fails_it_ends_early(maker, trained, monkeypatch):
    tries = []

    def failing(config, output, tests):
        tries.append(config)
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(grid, "_train", failing)
    runs = list(GRIDS["scaling-law"](maker))
    assert execute(runs, maker) == [run.name for run in runs[:3]] and len(tries) == 6


def test_nothing_is_begun_that_would_not_end_in_time(maker, trained, monkeypatch):
    runs = list(GRIDS["scaling-law"](maker))
    seconds = {run.name: 1000.0 if run.facts["kind"] == "full" else 10.0 for run in runs}
    monkeypatch.setattr(grid, "estimate", lambda run: seconds[run.name])
    monkeypatch.setattr(Grid, "seconds_of", lambda self, run: seconds[run.name])
    assert execute(runs, maker, deadline=time.monotonic() + 100) == []
    assert trained == [run.name for run in runs if run.facts["kind"] == "moba"]


def test_estimates_follow_what_was_measured(maker):
    run, *_ = GRIDS["scaling-law"](maker)
    made = Grid([run], maker.folder, None, [Slot(0, None)])
    before, steps = made.seconds_of(run), run.config.run.steps * grid._step_seconds(run)
    made._measured, made._estimated = 30.0, 10.0
    assert made.seconds_of(run) == pytest.approx(before + 2 * steps)


def test_another_run_in_the_folder_or_other_text_is_refused(maker, trained):
    runs = list(GRIDS["scaling-law"](maker))[:1]
    execute(runs, maker)
    with pytest.raises(ValueError, match="was trained on other text"):
        Grid(runs, maker.folder, "another", [Slot(0, None)]).execute()
    file = Path(runs[0].config.run.directory) / "summary.json"
    found = json.loads(file.read_text())
    found["config"]["optimizer"]["lr"] = 0.5
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="holds a run of another config"):
        execute(runs, maker)


def test_runs_that_find_keys_do_not_wait_for_the_text(maker, trained, monkeypatch):
    text, train = Future(), grid._train
    runs = [*GRIDS["scaling-law"](maker)][:2] + [*GRIDS["retrieval"](maker)]

    def training(config, output, tests):
        train(config, output, tests)
        (Path(config).parents[1] / "runs" / Path(config).stem / "tests.json").write_text("{}")
        # By its own place: the one before may still be here when the third is already among them.
        if trained.index(Path(config).stem) == 2:
            text.set_result("hash")

    monkeypatch.setattr(grid, "_train", training)
    slots = [Slot(0, None), Slot(1, None)]
    assert Grid(runs, maker.folder, text, slots, say=lambda line: None).execute() == []
    assert set(trained[:3]) == {run.name for run in runs[2:]} and set(trained[3:]) == {run.name for run in runs[:2]}
    assert [summary_of(run)["corpus"] for run in runs] == ["hash"] * 2 + [None] * 3
    # Nothing is left to train, but other text is seen.
    other = Future()
    other.set_result("another")
    with pytest.raises(ValueError, match="was trained on other text"):
        Grid(runs, maker.folder, other, slots, say=lambda line: None).execute()


def test_killed_and_started_again_it_goes_on(tmp_path):
    """The first process is killed, once a run is done: its workers end, and the next one trains the rest alone."""
    folder = tmp_path / "grid"
    for i in range(120):
        part = tmp_path / "text" / "text" / f"part{i:02}"
        part.mkdir(parents=True)
        (part / "file.py").write_text("".join(f"value_{i}_{j} = {i * j}\n" for j in range(80)))
    command = [sys.executable, "-m", "moba_cp", "experiment", "training-hybrid", "--scale", "tiny"]
    command += ["--directory", str(folder), "--gpus", "1", "--data", str(tmp_path / "text")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not list(folder.glob("runs/*/summary.json")):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    done = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/summary.json")}
    assert len(done) < 5
    deadline = time.monotonic() + 30 * TIME_SCALE
    while _alive(process.pid):
        assert time.monotonic() < deadline, "the worker outlived the process that started it"
        time.sleep(0.05)
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert f"5 runs, {len(done)} of them done" in made.stdout
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert len(list(folder.glob("runs/*/summary.json"))) == 5 and not list(folder.glob("runs/*/checkpoints"))
    assert (folder / "training-hybrid.png").read_bytes().startswith(b"\x89PNG")
    assert "From the switch (step 3 of 3) on" in (folder / "training-hybrid.md").read_text()
    assert len((folder / "training-hybrid.csv").read_text().splitlines()) == 4


@pytest.mark.slow
def test_all_experiments_at_the_tiny_scale(tmp_path):
    """Every experiment from the text to the chart, with masks, weights of other runs and tests of what was trained."""
    command = [sys.executable, "-m", "moba_cp", "experiment", "all", "--scale", "tiny", "--directory", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    made = subprocess.run([*command, "--gpus", "2"], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr + made.stdout
    assert "failed" not in made.stdout and "not done" not in made.stdout
    for name in GRIDS:
        assert (tmp_path / f"{name}.png").exists() and (tmp_path / f"{name}.md").exists(), name
    tuned = json.loads(next(tmp_path.glob("runs/*tuned1/summary.json")).read_text())
    trained = json.loads(next(tmp_path.glob("runs/512-*-full-s0/summary.json")).read_text())
    few, all_labels = (sum(row["labels"] for row in found["by_position"]) for found in (tuned, trained))
    assert 0 < few < 0.8 * all_labels, "docstrings alone have labels"


def _alive(session: int) -> bool:
    """Whether a process of the session is there."""
    try:
        os.killpg(session, signal.SIG_DFL)
    except ProcessLookupError:
        return False
    return True


def test_a_test_that_fails_does_not_lose_the_training(maker, trained, monkeypatch):
    from moba_cp.experiments import tests

    train, said = grid._train, []

    def tested(config_file, output, its):
        train(config_file, output, its)
        monkeypatch.setattr(tests, "TESTS", {"mass": lambda config, length: 1 / 0})
        tests.run_tests(load(TrainConfig, config_file), its)

    monkeypatch.setattr(grid, "_train", tested)
    run, *_ = GRIDS["granularity"](maker)
    assert run.tests == {"mass": 512}
    assert Grid([run], maker.folder, None, [Slot(0, None)], say=said.append).execute() == []
    assert summary_of(run)["validation_loss"] == 2.1 and "mass" not in summary_of(run)
    assert any("the test mass failed" in line for line in said)
