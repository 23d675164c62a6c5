"""A run that is asked to stop: by SIGTERM to any rank, or by a file that its launcher makes. It saves and says so.

Schedulers give notice before they take machines away. Under torchrun a signal is of little use: it dies of SIGUSR1 and
SIGUSR2, and kills its ranks 30 seconds after SIGTERM. So a launcher names a file that is not there
(``MOBA_CP_STOP_FILE``) and makes it when the run should stop. Each rank looks for it after a step, for each machine may
have a launcher and a file of its own; all agree and save at the same step, and the first rank of each machine writes
``saved STEP`` into its file, for which the launcher ends with exit code 75. Without such a file the ranks end with it.
"""

import os
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from .heartbeat import of_transport

STOP_FILE = "MOBA_CP_STOP_FILE"
STOPPED = 75
"""Exit code of a run that was asked to stop and has saved (EX_TEMPFAIL of sysexits.h: try again later)."""


class Stopped(SystemExit):
    """The run was asked to stop and has saved ``step``; on every rank. Ends the process unless it is caught."""

    def __init__(self, step: int):
        super().__init__(exit_code())
        self.step = step


def exit_code() -> int:
    """What a stopped run ends with.

    0 where a launcher reads the answer from its file: torchrun and srun would take any other code for a failure, and
    start the ranks again or kill those that are still ending.
    """
    return 0 if STOP_FILE in os.environ else STOPPED


class StopRequest:
    """While it is entered, SIGTERM asks for a stop instead of killing; a second one changes nothing.

    Args:
        group: all ranks of the run; None where these are all of torch.distributed.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self._several = dist.get_world_size(group) > 1
        path = os.environ.get(STOP_FILE)
        self._file = Path(path) if path else None
        self._signalled = False
        # Signals reach the main thread only; a run in another one has the file.
        self._handles = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopRequest":
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._before)
            if self._signalled and exception[1] is not None and of_transport(exception[1]):
                # Another rank has failed, and says so: the launcher only wants this one to end.
                signal.raise_signal(signal.SIGTERM)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop, the same on all; a collective call of all ranks.

        A few bytes between hosts, behind a step that has ended on all of them: it keeps no GPU waiting.
        """
        asked = self._signalled or (self._file is not None and self._file.exists())
        if not self._several:
            return asked
        flag = torch.tensor([asked], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def answer(self, step: int) -> None:
        """Tell this machine's launcher that ``step`` is saved."""
        if self._file is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            # Machines may share the folder.
            partial = self._file.with_name(f"{self._file.name}.{os.environ.get('RANK', '0')}")
            partial.write_text(f"saved {step}\n")
            partial.replace(self._file)

    def _note(self, number, frame) -> None:
        self._signalled = True
