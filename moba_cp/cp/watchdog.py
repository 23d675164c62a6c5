"""Saying which collective is late: NCCL's own watchdog knows neither layer nor purpose."""

import collections
import sys
import threading
import time
import weakref

import torch
import torch.distributed as dist


class Monitor:
    """Says on stderr which collective or copy is late, shortly before the process is ended for it.

    Watches in a thread until it is closed, the group is gone, or the interpreter goes away (a thread that was inside of
    c10d then would abort the process).
    """

    def __init__(self, group: dist.ProcessGroup | None, who: str, timeout_s: float | None = None, stream=None):
        if timeout_s is None:
            timeout_s = group._get_backend(torch.device("cuda")).options._timeout.total_seconds()
        self.limit, self.who, self._stream = 0.9 * timeout_s, who, stream or sys.stderr
        self._flight: collections.deque[tuple[torch.cuda.Event, str, float]] = collections.deque()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="moba_cp collectives")
        self._thread.start()
        if group is not None:
            weakref.finalize(group, self.close)

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        # The last reference to a group may go anywhere, in this thread too.
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)
        self._flight.clear()

    def watch(self, event: torch.cuda.Event, what: str) -> None:
        """Expect ``event``, which follows the collective ``what`` on its stream, in time."""
        self._flight.append((event, what, time.monotonic()))

    def _run(self) -> None:
        said = None
        while not self._over.wait(min(1.0, self.limit / 4)):
            try:
                while self._flight and self._flight[0][0].query():
                    self._flight.popleft()
            except RuntimeError as error:
                # The device is lost; what was in flight says where.
                print(f"{self.who}: {self._flight[0][1]} failed: {error}", file=self._stream, flush=True)
                return
            if self._flight and self._flight[0] is not said and time.monotonic() - self._flight[0][2] > self.limit:
                said = self._flight[0]
                print(
                    f"{self.who}: {said[1]} has not finished in {self.limit:.0f} s, another rank has left or hangs",
                    file=self._stream,
                    flush=True,
                )
