"""Where every rank is, so that an error says which of them hangs or has gone, and at what.

Each rank says once a second, in the store where the ranks met, in which step and phase it is. A collective that fails
knows none of that: whoever it fails for reads what the others said last.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from ..cp.calls import ExchangeError

_SECONDS_BETWEEN_BEATS = 1.0
# A rank that said nothing for so many beats hangs, is stopped or has gone.
_MISSED_BEATS = 3
_STORE_SECONDS, _TRIES = 5.0, 3
_TRANSPORT = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "imed out", "store")
"""Words in the errors of collectives, which have no class of their own everywhere."""
# NCCL has had the time to write its flight recorder.
_GRACE_S = 10.0
LAUNCHER_GONE = 1
RANK_GONE = 1


class RankLost(RuntimeError):
    """A collective failed because of another rank; the message says which, and where it was last heard."""


class Heartbeat:
    """This rank's place, told to the others by a thread until :meth:`close`.

    Args:
        rank, size: of the run.
        connect: makes a client of the store of all ranks, used by nobody else; None for one rank alone, which tells
            nobody.
        timeout: seconds after which the run's collectives fail.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[], dist.Store] | None, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        self._place, self._beats, self._ended = (0, "starting", time.monotonic()), 0, ""
        self._over, self._lock, self._store = threading.Event(), threading.Lock(), None
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.said_late = False
        """Whether this rank has said that it waits for others."""
        self._watched = self._place
        if connect is not None and size > 1:
            self._store = connect()
            thread = threading.Thread(target=_run, args=(weakref.ref(self), self._over), daemon=True, name="heartbeat")
            thread.start()
            # A thread that is inside of c10d when the interpreter goes away would abort the process.
            self.close = weakref.finalize(self, _close, self._over, thread)
        else:
            self.close = self._over.set

    def at(self, step: int, phase: str) -> None:
        """This rank begins ``phase`` of ``step``."""
        self._place = step, phase, time.monotonic()

    def ended(self, error: BaseException) -> None:
        """This rank ends with ``error``."""
        lines = str(error).strip().splitlines()
        self._ended = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
        self._tell()

    def blame(self) -> str:
        """Which ranks are behind this one, "" if none is known to be; takes some beats, to see who is still there."""
        if self._store is None:
            return ""
        others, before = [rank for rank in range(self.size) if rank != self.rank], self._heard()
        if not any(before.get(rank, {}).get("ended") for rank in others):
            time.sleep((_MISSED_BEATS + 0.5) * _SECONDS_BETWEEN_BEATS)
        now = self._heard()
        if not now:
            return "the store where the ranks met is gone, and with it the process that held it"
        for why, ranks in (
            ("ended", [rank for rank in others if now.get(rank, {}).get("ended")]),
            ("silent", [r for r in others if now.get(r, {}).get("beats") == before.get(r, {}).get("beats")]),
            ("behind", [r for r in others if now.get(r, {}).get("step", self._place[0]) < self._place[0]]),
        ):
            if ranks:
                told = "; ".join(_describe(why, rank, now.get(rank)) for rank in ranks[:4])
                return told + (f"; and {len(ranks) - 4} more" if len(ranks) > 4 else "")
        return ""

    def explain(self, error: Exception) -> Exception:
        """``error`` of a collective as one that names the rank to look at, or ``error`` itself."""
        self.ended(error)
        if not of_transport(error):
            return error
        step, phase, _ = self._place
        blame = self.blame()
        if not blame:
            return error
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return RankLost(f"{blame} (found by rank {self.rank} in step {step}, {phase}: {first_line[:200]})")

    def _heard(self) -> dict[int, dict]:
        """What each rank said last; {} without the store."""
        heard: dict[int, dict] = {}
        try:
            with self._lock:
                for rank in range(self.size):
                    if self._store.check([_key(rank)]):
                        heard[rank] = json.loads(self._store.get(_key(rank)))
        except (RuntimeError, ValueError):
            return {}
        return heard

    def _tell(self) -> None:
        if self._store is None:
            return
        step, phase, since = self._place
        self._beats += 1
        said = {"beats": self._beats, "time": time.time(), "step": step, "phase": phase, "host": socket.gethostname()}
        said |= {"seconds": round(time.monotonic() - since, 1), "ended": self._ended, "pid": os.getpid()}
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set(_key(self.rank), json.dumps(said))

    def _beat(self) -> None:
        """What the thread does once a second."""
        if self._parent is not None and os.getppid() != self._parent:
            # Nobody would end this rank, and a job that takes its place is held up by it.
            print(f"rank {self.rank}: the launcher has gone; this rank ends", file=sys.stderr, flush=True)
            os._exit(LAUNCHER_GONE)
        self._tell()
        step, phase, since = self._place
        # NCCL ends the process after the timeout without an error that Python sees.
        late = time.monotonic() - since > 0.9 * self.timeout and self._watched != (step, phase, since)
        if late and torch.cuda.is_initialized():
            self._watched = step, phase, since
            # In a thread of its own: a rank that stops beating while it looks at the others would be blamed by them.
            threading.Thread(target=self._wait_in_vain, args=self._watched, daemon=True).start()

    def _wait_in_vain(self, step: int, phase: str, since: float) -> None:
        """Say for what this rank waits, shortly before NCCL ends it; and end it where NCCL does not.

        NCCL's watchdog writes the flight recorder and then may need a minute, or wait for what never comes. A rank that
        has heard nothing of another since before the timeout waits for a process that is no more: a long step that all
        take part in is left alone, however long.
        """
        before = self._heard()
        if not self.said_late:
            self.said_late = True
            flight = os.environ.get("TORCH_FR_DUMP_TEMP_FILE", "")
            where = f"; NCCL's flight recorder writes {flight}*" if flight else ""
            waited = f"in step {step}, {phase}, for {time.monotonic() - since:.0f} s"
            print(f"rank {self.rank}: {waited}; {self.blame()}{where}", file=sys.stderr, flush=True)
        while time.monotonic() - since < self.timeout + _GRACE_S:
            if self._over.wait(_SECONDS_BETWEEN_BEATS) or self._place != (step, phase, since):
                return
        # One answer that the store is late with is none.
        for _ in range(_TRIES):
            now = self._heard()
            if now or self._over.wait(_STORE_SECONDS):
                break
        others = [rank for rank in range(self.size) if rank != self.rank]
        gone = [rank for rank in others if now and now.get(rank) == before.get(rank)]
        if self._place == (step, phase, since) and not self._over.is_set() and (gone or not now):
            told = "; ".join(_describe("silent", rank, before.get(rank)) for rank in gone[:4])
            why = told or "the store where the ranks met is gone"
            print(f"rank {self.rank} ends: {why}, and the timeout is over", file=sys.stderr, flush=True)
            os._exit(RANK_GONE)


def open_heartbeat(rank: int, size: int, timeout: float) -> Heartbeat:
    """The heartbeat of a rank that a launcher started; of one that met the others elsewhere, it tells nobody."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")

    def connect() -> dist.Store:
        limit = timedelta(seconds=_STORE_SECONDS)
        store = dist.TCPStore(address, int(port), is_master=False, wait_for_workers=False, timeout=limit)
        return dist.PrefixStore(f"moba_cp heartbeat {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    return Heartbeat(rank, size, connect if address and port else None, timeout)


def of_transport(error: BaseException) -> bool:
    """Whether an error is that of a collective which other ranks did not complete."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, (dist.DistError, ExchangeError)) or any(word in str(error) for word in _TRANSPORT)


def _key(rank: int) -> str:
    return f"rank {rank}"


def _describe(why: str, rank: int, said: dict | None) -> str:
    if said is None:
        return f"rank {rank} never said where it was"
    place = f"rank {rank} (process {said['pid']} on {said['host']})"
    at = f"step {said['step']}, {said['phase']}"
    if why == "ended":
        return f"{place} ended at {at}: {said['ended']}"
    if why == "silent":
        return f"{place} was last heard {max(0.0, time.time() - said['time']):.0f} s ago at {at}"
    return f"{place} is at {at}, for {said['seconds']:.0f} s"


def _run(reference: "weakref.ref[Heartbeat]", over: threading.Event) -> None:
    while True:
        heartbeat = reference()
        if heartbeat is None:
            return
        heartbeat._beat()
        del heartbeat
        if over.wait(_SECONDS_BETWEEN_BEATS):
            return


def _close(over: threading.Event, thread: threading.Thread) -> None:
    over.set()
    if threading.current_thread() is not thread:
        thread.join(timeout=_STORE_SECONDS + 1)
