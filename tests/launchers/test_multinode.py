"""launchers/multinode.sh and torchrun.sh: two hosts train, one loses its power, and comes back."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moba_cp.launchers.address import reach
from moba_cp.launchers.rank import environment
from tests.helpers import hosts
from tests.helpers.distributed import TIME_SCALE
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, train, write_text

ROOT = Path(__file__).parents[2]
MULTINODE, TORCHRUN = (["bash", str(ROOT / "launchers" / name)] for name in ("multinode.sh", "torchrun.sh"))
# Stands for Python where only what a script does with exit codes and signals is looked at.
FAKE = """#!/usr/bin/env bash
case "$*" in
-c*) echo 2.13.0 ;;
*--dry-run*) printf 'run:\\n  directory: run\\n' ;;
*address*) echo "eth7 10.0.0.9 1" ;;
*torch.distributed.run*) {torchrun} ;;
esac
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function that sets what torchrun does; what it was called with is then in the file ``called``."""
    monkeypatch.chdir(tmp_path)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def set_to(torchrun):
        python = tmp_path / "python"
        python.write_text(FAKE.format(torchrun=f'echo "$GLOO_SOCKET_IFNAME $*" >>called; {torchrun}'))
        python.chmod(0o755)
        monkeypatch.setenv("MOBA_CP_PYTHON", str(python))

    return set_to


def _run(words, **options):
    return subprocess.run(words, capture_output=True, text=True, timeout=60 * TIME_SCALE, **options)


def test_the_command_that_several_machines_start(fake, tmp_path):
    fake("exit 0")
    head = ["--nodes", "2", "--head", "10.0.0.9:29999", "--ranks=4", "--wait", "77"]
    assert _run([*MULTINODE, *head, "demo", "--set", "run.steps=3"]).returncode == 0
    called = (tmp_path / "called").read_text()
    assert called == (
        "eth7 -m torch.distributed.run --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d "
        "--rdzv-endpoint 10.0.0.9:29999 "
        "--rdzv-id moba_cp-29999 --rdzv-conf is_host=1,join_timeout=77,read_timeout=77 --local-addr 10.0.0.9 "
        "-m moba_cp train demo --set run.steps=3 --resume auto\n"
    )
    (tmp_path / "called").unlink()
    assert _run([*TORCHRUN, "--ranks", "2", "-m", "moba_cp.megatron.pretrain", "--bf16"]).returncode == 0
    assert (tmp_path / "called").read_text().endswith("--nproc-per-node 2 -m moba_cp.megatron.pretrain --bf16\n")


def test_failures_are_repeated_as_often_as_was_allowed(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    fake("exit 7")
    done = _run([*MULTINODE, "--nodes=2", "--head=10.0.0.9", "--ranks=1", "--restarts=2", "demo"])
    assert done.returncode == 7 and (tmp_path / "called").read_text().count("\n") == 3
    assert "beginning again, 2 of 2" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "multinode.sh: the ranks on this machine ended with an error, told above, or because another machine's did: "
        "look there too; the same line on every machine goes on from the last checkpoint"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ([*MULTINODE, "demo"], "--nodes N and --head ADDRESS are needed"),
        ([*MULTINODE, "--nodes", "two"], "--nodes=two: expected a whole number"),
        ([*MULTINODE, "--nodes"], "--nodes needs a value"),
        ([*TORCHRUN], "name a config"),
        ([*TORCHRUN, "-m"], "-m needs the name of a module"),
        (["bash", str(ROOT / "launchers" / "slurm.sbatch"), "demo"], "submit it: sbatch"),
    ],
)
def test_mistakes_get_one_line(fake, words, message):
    fake("exit 0")
    done = _run(words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_makes_the_file_and_does_not_reach_torchrun(fake, tmp_path, number):
    """torchrun would die of the signal: the ranks are told by the file, and answer in it."""
    fake('touch ready; while [ ! -e "$MOBA_CP_STOP_FILE" ]; do sleep 0.05; done; echo saved 5 >"$MOBA_CP_STOP_FILE"')
    with subprocess.Popen([*TORCHRUN, "--ranks", "1", "demo"], stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
        process.send_signal(number)
        assert "asked to stop" in process.communicate(timeout=30 * TIME_SCALE)[1]
    assert process.returncode == 75


def test_every_script_tells_how_to_use_it():
    for name in ("torchrun.sh", "multinode.sh", "submit.sh"):
        done = _run(["bash", str(ROOT / "launchers" / name), "--help"])
        assert done.returncode == 0 and f"bash launchers/{name}" in done.stdout and done.stdout.count("\n") > 4


def test_a_machine_knows_how_it_reaches_another():
    assert reach("127.0.0.1") == ("lo", "127.0.0.1", True)
    with pytest.raises(ValueError, match="head='no.such.host.invalid'"):
        reach("no.such.host.invalid")


def test_what_srun_tells_a_rank():
    slurm = {
        "SLURM_PROCID": "13", "SLURM_NTASKS": "16", "SLURM_LOCALID": "5", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "MASTER_ADDR": "127.0.0.1", "NCCL_SOCKET_IFNAME": "ib0",
    }  # fmt: skip
    assert environment(slurm) == {
        "RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


@pytest.mark.multinode
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make network namespaces")
def test_a_host_loses_its_power_and_comes_back(tmp_path, monkeypatch):
    if reason := hosts.missing():
        pytest.skip(reason)
    monkeypatch.setenv("MOBA_CP_PYTHON", sys.executable)
    write_text(tmp_path / "text")
    timeout = 5 * TIME_SCALE
    # Two hosts decide otherwise than one whether heads, blocks or rows move, and so sum in another order.
    settings = ["run.steps=10", "run.checkpoint_every=2", f"data.path={tmp_path / 'text'}", "exchange.mode=kv"]
    whole = [*settings, f"run.directory={tmp_path / 'whole'}"]
    settings = [*SHRUNKEN, *settings, f"run.directory={tmp_path / 'run'}", f"run.timeout_seconds={timeout}"]
    line = [*MULTINODE, "--nodes=2", f"--head={hosts.ADDRESSES[0]}", "--ranks=1", "--restarts=1", str(DEMO)]
    line += [word for setting in settings for word in ("--set", setting)]
    with hosts.TwoHosts() as two:
        here, there = (two.start(i, tmp_path / f"host{i}", *line, cwd=tmp_path) for i in (0, 1))
        log = tmp_path / "run" / "log.jsonl"
        here.wait_until(lambda: log.exists() and '"step": 4,' in log.read_text(), 120)
        two.power_off(1)
        assert there.wait(10) != 0
        # The processes of a timeout and of the launcher's end come on top.
        here.wait_until(lambda: "beginning again, 1 of 1" in here.output, timeout / TIME_SCALE + 60)
        assert re.search(r"moba-cp train.*error: ", here.output), here.output
        two.power_on(1)
        there = two.start(1, tmp_path / "host1", *line, cwd=tmp_path)
        assert (here.wait(120), there.wait(30)) == (0, 0), here.output + there.output
        text = here.output + there.output
    assert f"this machine: {hosts.ADDRESSES[1]} (moba" in there.output, "it has an address and an interface of its own"
    done = int(re.search(r"(\d+) of 10 steps are done", text)[1])
    assert done in (2, 4, 6, 8)
    train(2, (whole, None))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
