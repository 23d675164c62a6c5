"""Two runs never write into one folder, and a lock outlives nobody."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moba_cp.train.lock import FolderLock
from tests.helpers.distributed import TIME_SCALE

HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from moba_cp.train.lock import FolderLock
FolderLock(Path({folder!r})).acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path / "run"``."""
    script = HOLDER.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_held_folder_is_refused_and_its_owner_named(tmp_path, holder):
    with pytest.raises(ValueError, match=rf"another run is writing there \(process {holder.pid} on .*, since 20"):
        FolderLock(tmp_path / "run").acquire()


def test_a_killed_owner_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == holder.pid
    with FolderLock(tmp_path / "run") as lock:
        lock.check()
    assert not (tmp_path / "run" / "lock").exists()


def test_waiting_for_an_owner_that_ends(tmp_path, holder):
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    started = time.monotonic()
    with FolderLock(tmp_path / "run", patience=60 * TIME_SCALE):
        assert time.monotonic() - started > 0.5
    killer.wait()


def test_a_folder_that_another_run_took_over_is_noticed(tmp_path):
    """As on a file system whose locks do not reach other machines."""
    with FolderLock(tmp_path / "run") as lock:
        lock.check()
        lock.path.write_text('{"host": "elsewhere", "pid": 7, "job": "12", "since": "now", "token": "x"}\n')
        with pytest.raises(ValueError, match=r"no longer holds the folder's lock \(process 7 on elsewhere, job 12, s"):
            lock.check()
        lock.path.unlink()
        with pytest.raises(ValueError, match="no longer holds"):
            lock.check()


def test_a_lock_file_of_another_run_is_not_removed(tmp_path):
    lock = FolderLock(tmp_path / "run").acquire()
    lock.path.unlink()
    other = FolderLock(tmp_path / "run").acquire()
    lock.release()
    assert other.path.exists()
    other.release()
