"""An error of a collective says which rank it is for, and no group waits longer than the run's timeout."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moba_cp.train import heartbeat
from moba_cp.train.config import RunConfig, TrainConfig
from moba_cp.train.heartbeat import Heartbeat, RankLost
from moba_cp.train.mesh import close_mesh, open_mesh, start_ranks
from moba_cp.train.yaml_config import build
from tests.helpers.distributed import TIME_SCALE, run_ranks
from tests.helpers.launched import Launched
from tests.helpers.train_runs import write_text


@pytest.fixture
def beats(monkeypatch):
    """Heartbeats of three ranks of one process, quicker than usual."""
    monkeypatch.setattr(heartbeat, "_SECONDS_BETWEEN_BEATS", 0.1 * TIME_SCALE)
    store = dist.HashStore()
    ranks = [Heartbeat(rank, 3, lambda: store, 300.0) for rank in range(3)]
    for beat in ranks:
        beat.at(7, "forward and backward")
        beat._tell()
    yield ranks
    for beat in ranks:
        beat.close()


def test_nobody_is_blamed_where_all_are_alike(beats):
    error = RuntimeError("gloo: timed out")
    assert beats[0].blame() == "" and beats[0].explain(error) is error


def test_a_silent_rank_is_named(beats):
    beats[2].close()
    said = beats[0].explain(RuntimeError("gloo: timed out\nin some file"))
    assert isinstance(said, RankLost)
    assert str(said).startswith("rank 2 (process ") and " was last heard " in str(said)
    assert str(said).endswith("(found by rank 0 in step 7, forward and backward: gloo: timed out)")


def test_a_rank_that_is_behind_is_named(beats):
    beats[1].at(6, "data")
    assert beats[0].blame().startswith("rank 1 (process ") and " is at step 6, data, for " in beats[0].blame()


def test_a_rank_that_ended_is_named_with_its_error(beats):
    beats[1].at(7, "data")
    beats[1].ended(ValueError("book.txt: became shorter\nwhile training"))
    assert "rank 1 " in beats[2].blame()
    assert beats[2].blame().endswith(" ended at step 7, data: ValueError: book.txt: became shorter")
    for own in (ValueError("what the user did"), RuntimeError("shapes do not fit")):
        assert beats[0].explain(own) is own


def test_ranks_that_wait_for_one_blame_it_and_not_one_another(beats, monkeypatch, capsys):
    """On a GPU nobody gets an error before NCCL ends the process: those who wait say so together."""
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "run/flight-rank")
    beats[2].close()
    for beat in beats[:2]:
        beat.timeout = 1e-6
    end = time.monotonic() + 60 * TIME_SCALE
    said = ""
    while said.count("\n") < 2 and time.monotonic() < end:
        time.sleep(0.05)
        said += capsys.readouterr().err
    for rank, line in enumerate(sorted(said.splitlines())):
        assert line.startswith(f"rank {rank}: in step 7, forward and backward, for ")
        assert "rank 2 (process " in line and " was last heard " in line and line.count(" was last heard ") == 1
        assert line.endswith("; NCCL's flight recorder writes run/flight-rank*")


@pytest.mark.parametrize("alive", [True, False])
def test_a_rank_ends_that_waits_for_one_that_is_gone(beats, monkeypatch, capsys, alive):
    """NCCL may not end it; a step that is long for all goes on."""
    codes = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr(heartbeat, "_GRACE_S", 0.5 * TIME_SCALE)
    monkeypatch.setattr(os, "_exit", codes.append)
    if not alive:
        beats[2].close()
    beats[0].timeout = 1e-6
    end = time.monotonic() + (60 if not alive else 1.5) * TIME_SCALE
    while not codes and time.monotonic() < end:
        time.sleep(0.05)
    said = capsys.readouterr().err
    assert codes == ([] if alive else [heartbeat.RANK_GONE])
    assert ("rank 0 ends: rank 2 (process " in said) == (not alive) and "rank 1 (process " not in said


def test_a_store_that_has_gone_is_said(beats):
    class Gone:
        def check(self, *arguments):
            raise RuntimeError("Broken pipe")

        set = check

    beats[0]._store = Gone()
    assert beats[0].blame().startswith("the store where the ranks met is gone")


def _timeouts(rank, config):
    mesh = open_mesh(config)
    groups = mesh.context_group, mesh.shard_mesh.get_group()
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    close_mesh(mesh)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return timeouts


ORPHAN = """
import os, sys, time
import torch.distributed as dist
from moba_cp.train.heartbeat import Heartbeat
if os.fork() == 0:
    store = dist.HashStore()
    beat = Heartbeat(0, 2, lambda: store, 300.0)
    print("beating", os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


def test_a_rank_whose_launcher_has_gone_ends():
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    launcher = subprocess.Popen([sys.executable, "-c", ORPHAN], text=True, env=environment, **pipes)
    word, pid = launcher.stdout.readline().split()
    assert word == "beating"
    launcher.kill()
    launcher.wait()
    try:
        # The pipe ends with the last process that holds it.
        said = launcher.stderr.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    assert "rank 0: the launcher has gone; this rank ends" in said


def test_every_group_has_the_timeout_of_the_run():
    config = RunConfig(context_size=2, timeout_seconds=77.0, device="cpu")
    # All ranks are those of the caller, with a timeout of the test's.
    for context, _ in run_ranks(4, _timeouts, config):
        assert context == timedelta(seconds=77)


def test_one_flag_for_determinism(monkeypatch):
    config = build(TrainConfig, {"run": {"deterministic": True, "device": "cpu"}})
    assert config.attention.deterministic and config.attention.moba.deterministic
    assert not build(TrainConfig, {}).attention.deterministic
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        assert start_ranks(config.run) == torch.device("cpu")
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        close_mesh()


def test_a_stopped_rank_ends_the_others_by_name(tmp_path):
    write_text(tmp_path / "text")
    timeout = 5 * TIME_SCALE
    settings = ["run.directory=run", "run.steps=100000", f"run.timeout_seconds={timeout}", "run.context_size=2"]
    with Launched(2, tmp_path, *settings) as run:
        run.wait_for_step(tmp_path / "run", 2)
        run.ranks[1].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert run.wait(0, 60) != 0
        assert time.monotonic() - started < timeout + 30 * TIME_SCALE
        said = [line for line in run.output(0).splitlines() if "error:" in line]
        pid = run.ranks[1].pid
    assert len(said) == 1 and f"RankLost: rank 1 (process {pid} on " in said[0] and " was last heard " in said[0]
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] >= 2
    assert (tmp_path / "run" / "error-rank0.txt").exists()
