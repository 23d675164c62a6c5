"""Ranks that are killed at any moment, disks that are full: nothing is lost, nothing is wrong, nobody hangs.

The default tests take one case of each kind; the campaigns (``slow``) all of them.
"""

import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from moba_cp.train import checkpoint
from tests.helpers.distributed import TIME_SCALE
from tests.helpers.launched import ON_GPUS, Launched, on_two_gpus
from tests.helpers.train_runs import logged, write_text

STEPS = 6
SETTINGS = (f"run.steps={STEPS}", "run.checkpoint_every=2", "run.validate_every=3", "run.timeout_seconds=20")
AUTO = ("--resume", "auto")
# No rank waits longer for another that is gone.
NO_HANG_S = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(place with the text, an uninterrupted run's losses, its weights, its seconds)."""
    place = tmp_path_factory.mktemp("kills")
    write_text(place / "text")
    started = time.monotonic()
    with Launched(2, place, "run.directory=whole", *SETTINGS, flags=AUTO) as run:
        assert run.wait_all(240) == [0, 0], run.output(0)
    return place, logged(place / "whole"), _bytes(place / "whole"), time.monotonic() - started


def _bytes(folder):
    """The shards of the newest checkpoint, which verifies: weights and the optimizer's state."""
    path = checkpoint.find(folder)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert checkpoint.verify(path) is None
    finally:
        dist.destroy_process_group()
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.distcp"))}


def _same(place, name, whole):
    """Whether the run ``name`` ended as the uninterrupted one did, to the bit."""
    assert logged(place / name) == whole[1]
    assert _bytes(place / name) == whole[2]


def _killed_run(place, seed, whole):
    """A run of which a random rank is killed at a random moment, and that is called again until it is done; odd ones
    save in the background."""
    chance, name, calls = random.Random(seed), f"killed-{seed}", 0
    settings = (f"run.directory={name}", *SETTINGS, f"run.background_save={str(seed % 2 == 1).lower()}")
    moment, victim = chance.uniform(0.0, whole[3]), chance.randrange(2)
    while True:
        calls += 1
        assert calls <= 3
        with Launched(2, place, *settings, flags=AUTO) as run:
            if calls == 1:
                end = time.monotonic() + moment
                while time.monotonic() < end and run.ranks[1 - victim].poll() is None:
                    time.sleep(0.01)
                run.ranks[victim].send_signal(signal.SIGKILL)
                killed = time.monotonic()
                run.wait(1 - victim, NO_HANG_S)
                assert time.monotonic() - killed < NO_HANG_S * TIME_SCALE
                continue
            assert run.wait_all(240) == [0, 0], run.output(0) + run.output(1)
        break
    _same(place, name, whole)


def test_a_killed_run_goes_on_bit_identical(whole):
    _killed_run(whole[0], 3, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 125))
def test_kill_at_a_random_moment(whole, seed):
    _killed_run(whole[0], seed, whole)


# Where a rank is killed in the second save: before or after a call of what checkpoint.save is made of.
POINTS = [
    "checkpoint._state:before",
    "checkpoint._check_finite:before",
    "checkpoint._check_finite:after",
    "checkpoint._begin:after",
    "storage.write:before",
    "filesystem.FileSystemWriter.write_data:before",
    "filesystem.FileSystemWriter.write_data:after",
    "filesystem.FileSystemWriter.finish:before",
    "filesystem.FileSystemWriter.finish:after",
    "checkpoint._entries:before",
    "manifest.entry:after",
    "checkpoint._entries:after",
    "manifest.write:before",
    "manifest.write:after",
    "manifest.sync_folder:before",
    "checkpoint._finish:after",
    "checkpoint._sweep:before",
    "checkpoint._delete:before",
    "shutil.rmtree:before",
    "checkpoint._sweep:after",
]
ON_FIRST_RANK_ALONE = ("_begin", "finish", "_finish", "manifest.write", "sync_folder", "_sweep", "_delete", "rmtree")

KILLING = """
import os, shutil, signal
from moba_cp.train import checkpoint, manifest, storage
from torch.distributed.checkpoint import filesystem
if os.environ["RANK"] == os.environ["KILLED_RANK"]:
    name, when = os.environ["KILLED_AT"].split(":")
    *path, attribute = name.split(".")
    place = globals()[path[0]]
    for part in path[1:]:
        place = getattr(place, part)
    inner, saves = getattr(place, attribute), [0]
    begin = checkpoint.save

    def save(*arguments, **keywords):
        saves[0] += 1
        return begin(*arguments, **keywords)

    def killing(*arguments, **keywords):
        if saves[0] >= 2 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*arguments, **keywords)
        if saves[0] >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    checkpoint.save = save
    setattr(place, attribute, killing)
"""


def _killed_in_a_save(whole, point, rank):
    place, name = whole[0], f"save-{point}-{rank}".replace(":", "-")
    settings = (f"run.directory={name}", *SETTINGS, "run.keep_checkpoints=1")
    environment = {"KILLED_AT": point, "KILLED_RANK": str(rank)}
    with Launched(2, place, *settings, flags=AUTO, preamble=KILLING, environment=environment) as run:
        assert run.wait(rank, 240) == -signal.SIGKILL, f"never came to {point}: {run.output(rank)}"
        started = time.monotonic()
        assert run.wait(1 - rank, NO_HANG_S) != 0
        assert time.monotonic() - started < NO_HANG_S * TIME_SCALE
    # A whole checkpoint is found whatever was left half done, the newest or the one before.
    path = checkpoint.find(place / name)
    assert path.name in ("step-00000002", "step-00000004")
    _bytes(place / name)
    return settings


@pytest.mark.parametrize(
    "point, rank", [("filesystem.FileSystemWriter.write_data:after", 1), ("manifest.write:before", 0)]
)
def test_killed_in_a_save(whole, point, rank):
    settings = _killed_in_a_save(whole, point, rank)
    with Launched(2, whole[0], *settings, flags=AUTO) as run:
        assert run.wait_all(240) == [0, 0], run.output(0)
    assert logged(whole[0] / settings[0].partition("=")[2]) == whole[1]
    left = [path.name for path in (whole[0] / settings[0].partition("=")[2] / "checkpoints").iterdir()]
    assert left == [f"step-{STEPS:08d}"], "what the killed save left is gone"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", POINTS)
def test_kill_at_each_point_of_a_save(whole, point, rank):
    if rank and any(word in point for word in ON_FIRST_RANK_ALONE):
        pytest.skip("the first rank alone does that")
    _killed_in_a_save(whole, point, rank)


FULL_DISK = """
import os
from moba_cp.train import checkpoint
from torch.distributed.checkpoint import filesystem
inner, saves = filesystem.FileSystemWriter.write_data, [0]

def write_data(self, plan, planner):
    saves[0] += 1
    if saves[0] == 2 and os.environ["RANK"] == "1":
        raise OSError({number}, "{text}", "{place}")
    return inner(self, plan, planner)

filesystem.FileSystemWriter.write_data = write_data
"""


@pytest.mark.parametrize(
    "number, text, policy",
    [(28, "No space left on device", "go_on"), (30, "Read-only file system", "stop")],
    ids=["full-go_on", "read_only-stop"],
)
def test_a_disk_that_takes_nothing(whole, number, text, policy):
    place, name = whole[0], f"disk-{policy}"
    settings = (f"run.directory={name}", *SETTINGS, f"run.failed_save={policy}")
    preamble = FULL_DISK.format(number=number, text=text, place="somewhere")
    with Launched(2, place, *settings, flags=AUTO, preamble=preamble) as run:
        codes, said = run.wait_all(240), run.output(0)
    folders = {path.name for path in (place / name / "checkpoints").iterdir()}
    assert f"could not be written: rank 1: OSError: [Errno {number}] {text}" in said
    if policy == "stop":
        assert codes == [2, 2] and folders == {"step-00000002"}
    else:
        assert codes == [0, 0] and folders == {"step-00000002", "step-00000006"}
        _same(place, name, whole)


# Rank 1 does something to the real disk before any rank writes for the second save, and undoes it before the third.
REAL_DISK = """
import os, subprocess
from moba_cp.train import checkpoint, storage
inner, begin, writes = storage.write, checkpoint.save, [0]
disk, checkpoints, kind = (os.environ[name] for name in ("TEST_DISK", "TEST_CHECKPOINTS", "TEST_KIND"))
ballast = os.path.join(disk, "ballast")

def run(*command):
    subprocess.run(command, check=True)

def spoil():
    if kind == "full":
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError:
                pass
    else:
        run("mount", "--bind", checkpoints, checkpoints)
        run("mount", "-o", "remount,bind,ro", checkpoints)

def mend():
    os.unlink(ballast) if kind == "full" else run("umount", "-l", checkpoints)

def write(*arguments):
    writes[0] += 1
    if writes[0] == 2:
        spoil()
    return inner(*arguments)

def save(*arguments, **keywords):
    if writes[0] == 2:
        mend()
    return begin(*arguments, **keywords)

if os.environ["RANK"] == "1":
    storage.write, checkpoint.save = write, save
"""


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MiB, mounted; for root alone."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place]).returncode:
        pytest.skip("needs root, to mount a disk")
    yield place
    for path in (place / "run" / "checkpoints", place):
        subprocess.run(["umount", "-l", path], capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("policy", ["go_on", "stop"])
@pytest.mark.parametrize("kind, number", [("full", 28), ("read_only", 30)])
def test_a_real_disk_that_takes_nothing(whole, small_disk, kind, number, policy):
    """Full to the last byte, or mounted read-only, while saving; the log's disk too where it is full."""
    checkpoints = small_disk / "run" / "checkpoints"
    environment = {"TEST_DISK": str(small_disk), "TEST_CHECKPOINTS": str(checkpoints), "TEST_KIND": kind}
    settings = (f"run.directory={small_disk / 'run'}", *SETTINGS, f"run.failed_save={policy}")
    with Launched(2, whole[0], *settings, flags=AUTO, preamble=REAL_DISK, environment=environment) as run:
        codes, said = run.wait_all(240), run.output(0)
    # PyTorch's writer tells a full disk in words of its own.
    assert f"[Errno {number}]" in said or (kind == "full" and "(0 bytes free on its disk)" in said), said
    assert "could not be written: rank" in said
    folders = {path.name for path in checkpoints.iterdir() if not path.name.startswith("superseded")}
    if policy == "go_on":
        assert codes == [0, 0] and folders == {"step-00000002", "step-00000006"}, said
    else:
        assert codes == [2, 2] and "step-00000002" in folders and "step-00000004" not in folders, said
        subprocess.run(["umount", "-l", checkpoints], capture_output=True)
        (small_disk / "ballast").unlink(missing_ok=True)
        with Launched(2, whole[0], *settings, flags=AUTO) as run:
            assert run.wait_all(240) == [0, 0], run.output(0)
    _same(small_disk, "run", whole)


def _kills_at_once(place, settings, seeds, fork):
    """Runs of two ranks, all at the same time, of each of which a random rank is killed at a random moment; then all go
    on. Each must end as the uninterrupted one did.

    A start takes longer than the steps, so that the moment is drawn among these: up to half a second after one.
    """
    started = time.monotonic()
    with Launched(2, place, "run.directory=whole", *settings, flags=AUTO, fork=fork) as run:
        assert run.wait_all(240) == [0, 0], run.output(0)
    losses, weights = logged(place / "whole"), _bytes(place / "whole")
    print(f"\nuninterrupted: {len(losses)} steps, {time.monotonic() - started:.0f} s with its start")
    print("| seed | rank | killed after step | the other ended after s | and said | went on from | as the whole run |")
    print("|---|---|---|---|---|---|---|")

    def kill(seed):
        chance, folder = random.Random(seed), place / f"killed-{seed}"
        step, delay, victim = chance.randrange(len(losses) * 3 // 4), chance.uniform(0.0, 0.5), chance.randrange(2)
        with Launched(2, place, f"run.directory={folder.name}", *settings, flags=AUTO, fork=fork) as run:
            if step:
                run.wait_for_step(folder, step)
            time.sleep(delay)
            assert run.ranks[victim].poll() is None, f"seed {seed}: ended by itself: {run.output(victim)}"
            run.ranks[victim].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            run.wait(1 - victim, NO_HANG_S)
            seconds, said = time.monotonic() - killed, run.output(1 - victim).strip().splitlines()
        at = max(logged(folder, "step"), default=0) if (folder / "log.jsonl").exists() else 0
        return f"| {seed} | {victim} | {at} | {seconds:.1f} | {(said or ['nothing'])[-1][:100]}"

    def go_on(seed):
        folder = place / f"killed-{seed}"
        names = [path.name for path in folder.glob("checkpoints/step-*") if "partial" not in path.name]
        with Launched(2, place, f"run.directory={folder.name}", *settings, flags=AUTO, fork=fork) as run:
            assert run.wait_all(240) == [0, 0], run.output(0) + run.output(1)
        return max(names, default="the start")

    with ThreadPoolExecutor(len(seeds)) as pool:
        rows = list(pool.map(kill, seeds))
        found = list(pool.map(go_on, seeds))
    same = []
    for seed, row, start in zip(seeds, rows, found, strict=True):
        folder = place / f"killed-{seed}"
        same.append(logged(folder) == losses and _bytes(folder) == weights)
        print(f"{row} | {start} | {'equal to the bit' if same[-1] else 'DIFFERENT'} |")
    print(f"{sum(same)} of {len(same)} equal, {time.monotonic() - started:.0f} s in all", flush=True)
    assert all(same)


@pytest.mark.slow
def test_kills_at_once(tmp_path):
    write_text(tmp_path / "text")
    _kills_at_once(tmp_path, (*SETTINGS, "run.steps=24"), range(200, 203), fork=True)


@on_two_gpus
def test_kills_on_two_gpus(tmp_path):
    """As on CPUs, over NCCL."""
    write_text(tmp_path / "text")
    # A step takes a quarter of a second, and two thirds with five runs at once.
    more = ("run.steps=24", "run.checkpoint_every=3", "run.validate_every=12", "run.timeout_seconds=20")
    _kills_at_once(tmp_path, (*SETTINGS, *ON_GPUS, *more), range(200, 205), fork=False)
