"""Deterministic runs beside one another, which take each other's time on the same devices, are equal to the bit."""

from concurrent.futures import ThreadPoolExecutor

from tests.helpers.hashes import differences
from tests.helpers.launched import ON_GPUS, Launched, on_two_gpus
from tests.helpers.skewed import KINDS
from tests.helpers.train_runs import logged, write_text

SETTINGS = ("run.deterministic=true", "run.validate_every=12", "run.timeout_seconds=60")
WATCH = "from tests.helpers.hashes import watch; watch({!r})\n"
# From step 3 on rank 1 receives blocks that are a little off.
WRONG = """
import os
from moba_cp.cp import comm
from moba_cp.train.loop import Trainer
real, step = comm.Communicator._started, Trainer.train_step
now = [0]
def started(self, work, x, out, what):
    wait = real(self, work, x, out, what)
    wrong = what.startswith("kv all-to-all") and now[0] == 3 and os.environ["RANK"] == "1"
    return lambda: wait() * 1.001 if wrong else wait()
def count(self):
    now[0] += 1
    return step(self)
comm.Communicator._started, Trainer.train_step = started, count
"""


def _runs(place, n, fork, *settings, preambles=None):
    """Folders of the hashes of ``n`` runs of two ranks each, all at the same time."""
    write_text(place / "text")

    def run(i):
        name, hashes = f"run-{i}", place / "hashes" / f"run-{i}"
        preamble = (preambles or {}).get(i, "") + WATCH.format(str(hashes))
        with Launched(
            2, place, f"run.directory={name}", *SETTINGS, *settings, flags=("--overwrite",), preamble=preamble,
            fork=fork,
        ) as ranks:  # fmt: skip
            assert ranks.wait_all(240) == [0, 0], ranks.output(0) + ranks.output(1)
        assert logged(place / name)
        return hashes

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


def test_what_differs_is_named(tmp_path):
    short = ("run.steps=4", "run.checkpoint_every=4", "exchange.mode=kv")
    found = differences(_runs(tmp_path, 3, True, *short, preambles={1: WRONG}))
    assert [line.split(":")[0] for line in found] == ["run-1, step 3, rank 0", "run-1, step 3, rank 1"]
    assert "kv all-to-all in layer 1: received" in found[1]


@on_two_gpus
def test_pairs_of_gpus(tmp_path):
    """Eight runs of 200 steps, all at the same time on two GPUs. One step in 720 was seen to part from the others."""
    settings = (*ON_GPUS, "run.steps=200", "run.checkpoint_every=20")
    assert differences(_runs(tmp_path, 8, False, *settings)) == []


@on_two_gpus
def test_warps_apart(tmp_path):
    """Runs on two GPUs whose kernels' warps come in other orders are equal to one in which they come together."""
    late = [f"from tests.helpers.skewed import install; install({kind!r})\n" for kind in KINDS]
    settings = (*ON_GPUS, "run.steps=16", "run.checkpoint_every=16")
    together = _runs(_made(tmp_path / "together"), 1, False, *settings)
    apart = _runs(_made(tmp_path / "apart"), len(late), False, *settings, preambles=dict(enumerate(late)))
    for run in apart:
        assert differences([*together, *together, run]) == []


def _made(folder):
    folder.mkdir()
    return folder
