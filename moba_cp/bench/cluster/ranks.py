"""The ranks of the measurement: groups of the first P of them, and a barrier on the host that keeps no GPU busy."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from ...train.mesh import backend_of, launched_rank, launched_size, start_process_group

BUSY_CYCLES = 4_000_000
"""of a GPU's clock, some 2 ms: how far the host is ahead when a timed pass begins."""


class Ranks:
    """This process among all ranks, each on its own GPU (NCCL) or on the CPU (gloo); collective over all of them.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout_s: how long a collective of a measurement may take before the run is ended.

    Raises:
        ValueError: the device is not there.
    """

    def __init__(self, device: str = "auto", timeout_s: float = 120.0):
        self._began = time.monotonic()
        started = dist.is_initialized()
        self.size = dist.get_world_size() if started else launched_size()
        self.rank = dist.get_rank() if started else launched_rank()
        self.device = _device(device)
        self.on_gpu = self.device.type == "cuda"
        self._ours = not started
        if not started:
            # Ranks that take no part in a measurement wait for those that do, however long it takes: over gloo, which
            # keeps neither GPU nor CPU busy.
            start_process_group(self.device, timedelta(hours=1))
        self.sizes = [2**i for i in range(self.size.bit_length()) if 2**i <= self.size]
        """P of the measurements: powers of two."""
        self._groups = {
            size: dist.new_group(
                list(range(size)), timeout=timedelta(seconds=timeout_s), backend=backend_of(self.device)
            )
            for size in sorted({*self.sizes, self.size})
        }

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def elapsed(self, size: int) -> float:
        """Seconds since the start, the most of the first ``size`` ranks; collective over these."""
        return self.most(time.monotonic() - self._began, size)

    def print(self, text: str) -> None:
        """Print on the first rank."""
        if self.first:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Tell on the first rank's stderr what is going on."""
        if self.first:
            print(f"[{time.monotonic() - self._began:3.0f} s] {text}", file=sys.stderr, flush=True)

    def group(self, size: int) -> dist.ProcessGroup:
        """The first ``size`` ranks."""
        return self._groups[size]

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        dist.all_reduce(torch.zeros(1, dtype=torch.int32))

    def settle(self, size: int) -> None:
        """Wait until the first ``size`` ranks have done all that they issued; collective over these."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.most(0.0, size)

    def ready(self, size: int) -> Callable[[], None]:
        """A function after which the first ``size`` ranks start at once; collective over these."""
        flag = torch.zeros(1, dtype=torch.int32, device=self.device)

        def wait() -> None:
            self.settle(size)
            if self.on_gpu and size > 1:
                # What follows is issued behind it, and so begins on all GPUs at the same time.
                dist.all_reduce(flag, group=self.group(size))
            if self.on_gpu:
                # In a model the GPU is still at work for the layer before when the host issues the next one.
                torch.cuda._sleep(BUSY_CYCLES)

        return wait

    def most(self, number: float, size: int) -> float:
        """The largest of a number over the first ``size`` ranks; collective over these."""
        return self._reduced(number, size, dist.ReduceOp.MAX)

    def total(self, number: float, size: int) -> float:
        """The sum of a number over the first ``size`` ranks; collective over these."""
        return self._reduced(number, size, dist.ReduceOp.SUM)

    def gathered(self, value, size: int) -> list:
        """A small object of each of the first ``size`` ranks; collective over these."""
        values = [None] * size
        if size == 1:
            return [value]
        dist.all_gather_object(values, value, group=self.group(size))
        return values

    def problem(self, text: str | None, size: int) -> str | None:
        """Some rank's ``text`` where any has one, on all of the first ``size``; collective over these."""
        if self.most(float(text is not None), size) == 0:
            return None
        return next(t for t in self.gathered(text, size) if t is not None)

    def close(self) -> None:
        """End the process groups, if this opened them."""
        if self._ours:
            dist.destroy_process_group()

    def _reduced(self, number: float, size: int, operation) -> float:
        x = torch.tensor([number], dtype=torch.float64)
        if size > 1:
            dist.all_reduce(x, operation, group=self.group(size))
        return x.item()


def _device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device='cuda': PyTorch finds no GPU here; use auto or cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    # Several ranks on one GPU work where each has its own NCCL_HOSTID, but their times mean nothing.
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
