"""Writing a checkpoint while training goes on."""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only


class Background:
    """Writes one checkpoint at a time in a thread of each rank.

    Args:
        group: all ranks, used by nobody else and with a backend for the CPU: its collectives are those of the thread.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group, self._thread, self._error = group, None, None

    def start(self, write: Callable[[dict, dist.ProcessGroup], None], state: dict[str, Any]) -> None:
        """Call ``write`` with a copy of ``state`` in host memory, once the checkpoint before is written.

        Raises:
            StorageError: that one could not be written; this one is written all the same.
        """
        try:
            self.finish()
        finally:
            copy = tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), state)
            self._thread = threading.Thread(target=self._run, args=(write, copy), daemon=True, name="checkpoint")
            self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint is written; raise what kept it from being."""
        if self._thread is not None:
            self._thread.join()
            self._thread, error, self._error = None, self._error, None
            if error is not None:
                raise error

    def _run(self, write: Callable, state: dict[str, Any]) -> None:
        try:
            write(state, self._group)
        except Exception as error:
            self._error = error
