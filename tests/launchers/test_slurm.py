"""launchers/slurm.sbatch on a real Slurm of two nodes: saved in time, requeued while that helps, ended when done."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.distributed import TIME_SCALE
from tests.helpers.slurm import Job, Slurm, missing
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, write_text

pytestmark = [pytest.mark.multinode, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launchers" / "slurm.sbatch")
# Of the rank that fails first, or of the other, which is ended for it (SIGTERM) if it has not failed by itself yet.
FAILED = ("1:0", "143:0")
# Stands for Python where only what the script does with exit codes and checkpoints is looked at: quick, and can fail.
FAKE = """#!/usr/bin/env bash
case "$*" in
-c*) echo 2.13.0 ;;
*--dry-run*) printf 'run:\\n  directory: {folder}/run\\n' ;;
*address*) echo 12345 ;;
*launchers.rank*) {rank} ;;
esac
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def _settings(folder, name, *more):
    settings = [*SHRUNKEN, "run.steps=10", f"data.path={folder / 'text'}", f"run.directory={folder / name}", *more]
    return [word for setting in settings for word in ("--set", setting)]


def _python():
    return {"MOBA_CP_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def _faked(folder, rank):
    python = folder / "python"
    python.write_text(FAKE.format(folder=folder, rank=rank))
    python.chmod(0o755)
    return {"MOBA_CP_PYTHON": str(python)}


def test_a_job_of_two_nodes_is_requeued_and_computes_what_an_uninterrupted_one_does(slurm, tmp_path):
    write_text(tmp_path / "text")
    whole = slurm.submit(tmp_path, "--nodes=2", SCRIPT, str(DEMO), *_settings(tmp_path, "whole"), **_python())
    job = slurm.submit(tmp_path, "--nodes=2", SCRIPT, str(DEMO), *_settings(tmp_path, "run"), **_python())
    facts = whole.wait("COMPLETED", "FAILED", seconds=120)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), whole.output
    log = tmp_path / "run" / "log.jsonl"
    job.wait_until(lambda: log.exists() and '"step": 2,' in log.read_text(), seconds=120)
    job.warn()
    job.wait_until(lambda: job.facts().get("Restarts") == "1")
    saved = int(re.search(r"it was asked to stop and has saved (\d+); requeued", job.output)[1])
    assert 2 <= saved < 10, "too late to show anything"
    assert "ranks: 2 = 1 data x 2 context" in job.output
    job.start_now()
    facts = job.wait("COMPLETED", "FAILED", seconds=120)
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "1", "0:0"), job.output
    assert f"{saved} of 10 steps are done" in job.output
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert logged(tmp_path / "run", "validation_loss")[10] == logged(tmp_path / "whole", "validation_loss")[10]
    assert not list(tmp_path.glob("*.stop*"))


def test_a_job_that_fails_at_once_is_not_requeued(slurm, tmp_path):
    job = slurm.submit(tmp_path, "--nodes=2", SCRIPT, "demo", **_faked(tmp_path, "exit 1"))
    facts = job.wait("FAILED", "COMPLETED")
    assert facts["ExitCode"] in FAILED and facts["Restarts"] == "0"
    assert re.search(r"failed with code (1|143) and has saved nothing since its start: not requeued", job.output)


def test_a_job_that_fails_behind_a_checkpoint_is_requeued_as_often_as_was_allowed(slurm, tmp_path):
    rank = f'mkdir -p "{tmp_path}/run/checkpoints/step-0000000${{SLURM_RESTART_COUNT:-0}}"; exit 1'
    job = slurm.submit(tmp_path, "--nodes=2", SCRIPT, "demo", MOBA_CP_REQUEUES="2", **_faked(tmp_path, rank))
    for count in ("1", "2"):
        job.wait_until(lambda count=count: job.facts()["Restarts"] == count and job.facts()["JobState"] == "PENDING")
        job.start_now()
    job.wait_until(lambda: "not requeued, for it was 2 times (MOBA_CP_REQUEUES)" in job.output)
    facts = job.wait("FAILED", "COMPLETED")
    assert facts["ExitCode"] in FAILED and facts["Restarts"] == "2"
    assert job.output.count("; requeued") == 2


def test_a_job_that_its_user_cancels_is_not_requeued(slurm, tmp_path):
    job = slurm.submit(tmp_path, "--nodes=2", SCRIPT, "demo", **_faked(tmp_path, "touch ready-$SLURM_PROCID; sleep 90"))
    job.wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    slurm("scancel", str(job.number))
    facts = job.wait("CANCELLED", "PENDING", "FAILED")
    job.wait_until(lambda: job.facts().get("JobState") == "CANCELLED" and not slurm("squeue", "-h").strip())
    assert (job.facts()["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), job.output


def test_a_preempted_module_gets_sigterm_on_all_nodes_and_is_requeued(slurm, tmp_path):
    rank = "trap 'touch stopped-$SLURM_PROCID; exit 0' TERM; touch ready-$SLURM_PROCID; sleep 90 & wait"
    module = ("-m", "moba_cp.megatron.pretrain", "--exit-signal-handler")
    job = slurm.submit(tmp_path, "--nodes=2", SCRIPT, *module, **_faked(tmp_path, rank))
    job.wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    job.warn()
    job.wait_until(lambda: job.facts()["Restarts"] == "1")
    assert len(list(tmp_path.glob("stopped-*"))) == 2
    slurm("scancel", str(job.number))


def test_a_wrong_config_starts_no_rank(slurm, tmp_path):
    write_text(tmp_path / "text")
    wrong = [str(DEMO), *_settings(tmp_path, "run", "attention.top_k=0")]
    job = slurm.submit(tmp_path, "--nodes=2", SCRIPT, *wrong, **_python())
    facts = job.wait("FAILED", "COMPLETED", seconds=120)
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0")
    assert "moba-cp train: error: attention.top_k=0 is not between 1 and 64" in job.output
    assert "start 1:" not in job.output and not (tmp_path / "run").exists()


def test_a_wrong_config_is_not_even_submitted(slurm, tmp_path):
    """With the number of ranks that sbatch's flags ask for, which the config does not fit."""
    write_text(tmp_path / "text")
    submit = ["bash", str(ROOT / "launchers" / "submit.sh"), "--nodes"]
    wrong = [*submit, "3", "--ntasks-per-node=1", "--", str(DEMO), *_settings(tmp_path, "run")]
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(wrong, env=slurm.environment | _python(), **options)
    assert done.returncode == 2 and "data.seq_len=256 is not divisible by 2 * cp_size = 6" in done.stderr
    assert done.stdout == "" and slurm("squeue", "-h").strip() == ""
    right = [*submit, "2", "--", "demo"]
    done = subprocess.run(right, env=slurm.environment | _faked(tmp_path, "exit 0"), **options)
    job = Job(slurm, int(re.search(r"Submitted batch job (\d+)", done.stdout)[1]), tmp_path)
    facts = job.wait("COMPLETED", "FAILED")
    assert (facts["JobState"], facts["NumNodes"]) == ("COMPLETED", "2"), job.output


def test_doctor_sorts_nodes_out(slurm, tmp_path):
    """Each node for itself: the driver of one is broken, and nobody waits for anybody."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        "#!/bin/sh\nif [ $SLURMD_NODENAME = n2 ]; then echo 'NVML: version mismatch'; exit 18; fi\n"
        "echo '580.1, 0, 0, No, Not Active'\n"
    )
    smi.chmod(0o755)
    command = [sys.executable, "-m", "moba_cp", "doctor", "--disk-gib", "0", "--memory-gib", "0"]
    environment = slurm.environment | {"PATH": f"{smi.parent}:{slurm.environment['PATH']}"}
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", *command],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120 * TIME_SCALE,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert "n2:\nFAIL  driver        nvidia-smi: NVML: version mismatch" in done.stdout
    assert "1 of 2 machines passed" in done.stdout
    (report,) = tmp_path.glob("doctor-*")
    assert (report / "passed-nodes.txt").read_text() == "n1\n"
    assert (report / "failed-nodes.txt").read_text() == "n2\n"
