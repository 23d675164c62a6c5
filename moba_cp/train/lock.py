"""One run at a time in a folder: a lock that the system releases when its owner ends, however it ends."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
import uuid
from pathlib import Path

NAME = "lock"
_SECONDS_BETWEEN_TRIES = 0.5
# What a file system says that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class FolderLock:
    """The folder of a run, held by its first rank from :meth:`acquire` (or ``with``) to :meth:`release`.

    The file ``lock`` in it says who holds it. The lock itself is the system's (``flock``), so that one left by a
    process that was killed is none. Where the file system has no locks, or only within a machine, :meth:`check` still
    sees that another run has taken the folder over.

    Args:
        folder: the run's folder; made if needed.
        patience: seconds for which :meth:`acquire` waits for an owner to end.
    """

    def __init__(self, folder: Path, patience: float = 0.0):
        self.path, self.patience = folder / NAME, patience
        self._file: int | None = None
        self._text = ""

    def acquire(self) -> "FolderLock":
        """Take the lock.

        Raises:
            ValueError: another run holds it; the message says which.
            OSError: the folder cannot be written to.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + self.patience
        while not self._try():
            if time.monotonic() >= end:
                raise ValueError(
                    f"run.directory={self.path.parent}: another run is writing there ({_owner(self.path)}); wait until "
                    "it ends, end it, or name another folder"
                )
            time.sleep(_SECONDS_BETWEEN_TRIES)
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "token": uuid.uuid4().hex,
        }
        self._text = json.dumps(owner) + "\n"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, self._text.encode(), 0)
        os.fsync(self._file)
        return self

    def check(self) -> None:
        """Raise ValueError unless the folder is still this run's."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            text = f"{self.path}: {error.strerror}"
        if text != self._text:
            raise ValueError(
                f"run.directory={self.path.parent}: this run no longer holds the folder's lock ({_owner(self.path)}); "
                "nothing more is written there"
            )

    def release(self) -> None:
        """Give the lock back; nothing where it is not held."""
        if self._file is None:
            return
        if _same_file(self._file, self.path):
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def __enter__(self) -> "FolderLock":
        return self.acquire()

    def __exit__(self, *exception) -> None:
        self.release()

    def _try(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                raise
            print(f"note: {self.path}: no locks on this file system; see that no two runs share it", file=sys.stderr)
        if not _same_file(file, self.path):
            # Its owner removed it between the opening and the locking.
            os.close(file)
            return False
        self._file = file
        return True


def _same_file(file: int, path: Path) -> bool:
    """Whether ``path`` still is the file that was opened."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(file)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _owner(path: Path) -> str:
    """Who holds the lock, for people."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        job = f", job {owner['job']}" if owner["job"] else ""
        return f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its owner is not known yet"
