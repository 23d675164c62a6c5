"""What happens when a rank fails or hangs in the middle of an exchange."""

import io
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, moba_attention
from moba_cp.cp.comm import Communicator, ExchangeError
from moba_cp.cp.watchdog import Monitor
from tests.helpers.distributed import TIME_SCALE, run_ranks

TIMEOUT_S = 2.5 * TIME_SCALE


class Saboteur(Communicator):
    """Rank 1 does something else when its turn comes to send ``kind``."""

    def __init__(self, group, kind: str, deed: str, reported: Path):
        super().__init__(group)
        self.kind, self.deed, self.reported = kind, deed, reported

    def all_to_all(self, x, send, receive, kind, where):
        if kind == self.kind and self.rank == 1:
            if self.deed == "hang":
                end = time.monotonic() + 3 * TIMEOUT_S
                while not self.reported.exists() and time.monotonic() < end:
                    time.sleep(0.05)
            raise KeyboardInterrupt(self.deed)
        return super().all_to_all(x, send, receive, kind, where)


def _sabotaged(rank: int, kind: str, deed: str, reported: Path):
    """(message, seconds) of the error that rank 0 gets."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=TIMEOUT_S))
    comm = Saboteur(group, kind, deed, reported)
    comm.layer = "layer 7"
    cp = CPContext(comm, "zigzag", 256, exchange="kv")
    q, k, v = (torch.randn(128, 1, 8, requires_grad=True) for _ in range(3))
    began = time.monotonic()
    try:
        moba_attention(q, k, v, MoBAConfig(16, 4), cp=cp).sum().backward()
    except KeyboardInterrupt:
        return None
    except ExchangeError as error:
        seconds = time.monotonic() - began
        reported.touch()
        return str(error), seconds
    raise AssertionError("a result came back although a rank had failed")


@pytest.mark.parametrize(
    "kind, deed, where",
    [("kv", "hang", "kv all-to-all in layer 7"), ("kv_gradients", "leave", "in the backward of layer 7")],
)
def test_a_rank_that_hangs_or_leaves_is_reported_within_the_timeout(kind, deed, where, tmp_path):
    message, seconds = run_ranks(2, _sabotaged, kind, deed, tmp_path / "reported")[0]
    assert message.startswith("rank 0 of 2: ") and where in message and "another rank has left or hangs" in message
    assert seconds < 2 * TIMEOUT_S


class _Event:
    def __init__(self):
        self.done = False

    def query(self):
        return self.done


def test_the_monitor_names_what_is_late():
    said = io.StringIO()
    monitor = Monitor(None, "rank 2 of 4", timeout_s=0.4, stream=said)
    finished, late = _Event(), _Event()
    finished.done = True
    monitor.watch(finished, "means all-gather in layer 1")
    monitor.watch(late, "kv all-to-all in layer 2")
    time.sleep(1.0)
    assert said.getvalue().startswith("rank 2 of 4: kv all-to-all in layer 2 has not finished")
    assert said.getvalue().count("\n") == 1
