"""Tensors that wait for the backward pass in host memory.

They leave on a stream of their own while the next layer is computed, and come back on it while the layer before is:
what a layer keeps then takes device memory for about two layers at a time, whatever the depth of the model.
"""

import contextlib
import mmap
import os
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class HostMemory:
    """Page-locked buffers, used again from step to step.

    ``torch.empty(pin_memory=True)`` would round sizes up to powers of two, which for gigabytes is half of the memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.nbytes = 0
        """Of all buffers."""
        self._free: list[Tensor] = []
        self._locked: list[Tensor] = []
        weakref.finalize(self, _unlock, self._locked)

    def reserve(self, sizes: list[int]) -> None:
        """Make buffers of these many bytes, beside those that are there.

        Raises:
            RuntimeError: the system does not lock so much memory.
        """
        for nbytes in sizes:
            self.give(self._new(nbytes))

    def take(self, nbytes: int) -> Tensor:
        """[at least ``nbytes``] uint8, the smallest that is free, or a new one."""
        fitting = [i for i, buffer in enumerate(self._free) if buffer.numel() >= nbytes]
        if not fitting:
            return self._new(nbytes)
        return self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))

    def give(self, buffer: Tensor) -> None:
        """Take back what :meth:`take` returned. Copies from and to it may still be on their way, on one stream."""
        self._free.append(buffer)

    def _new(self, nbytes: int) -> Tensor:
        buffer = _touched(nbytes)
        if self.device.type == "cuda" and nbytes:
            error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 0)
            if int(error):
                raise RuntimeError(
                    f"{nbytes / 2**30:.1f} GiB of host memory could not be locked beside {self.nbytes / 2**30:.1f} GiB "
                    f"({error}); raise the limit of locked memory (ulimit -l), or use memory.offload: none"
                )
            self._locked.append(buffer)
        self.nbytes += nbytes
        return buffer


# Bytes that a thread touches at a time.
_PIECE = 2**26


def _touched(nbytes: int) -> Tensor:
    """[nbytes] uint8 whose pages are there.

    The system makes a page when it is first written, and clears it. Left to what locks them, that is one thread's work
    and takes longer than a training step at a million tokens; here many do it, in large pages where there are some.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(min(16, threads)) as pool:
        list(pool.map(lambda i: buffer[i : i + _PIECE : mmap.PAGESIZE].zero_(), range(0, nbytes, _PIECE)))
    return buffer


def _unlock(buffers: list[Tensor]) -> None:
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


class Offloader:
    """Moves tensors of one device to host memory and back; shared by the layers of a model.

    On a CPU it copies too, so that the same code runs there.
    """

    def __init__(self, device: torch.device):
        self.host = HostMemory(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[torch.cuda.Event | None, list[Tensor | None]]] = deque()
        self._parked: list[weakref.ref[Parked]] = []

    def park(self, tensors: list[Tensor | None], to_host: bool) -> "Parked":
        """Keep contiguous ``tensors`` for the backward pass, which takes them in reverse order.

        With ``to_host`` they start to move; the caller may drop them, but not write to them.
        """
        # The copy of the layer before is over by now or soon: its memory may serve what is computed from here on.
        self.release()
        parked = Parked(self, tensors, to_host)
        if to_host:
            self._leaving.append((self.moved(), tensors))
        self._parked = [weakref.ref(x) for x in (*self._waiting(), parked)]
        return parked

    def release(self) -> None:
        """Give the device memory of what has left, or is leaving, back to the current stream."""
        while self._leaving:
            event, _ = self._leaving[0]
            if event is not None:
                torch.cuda.current_stream().wait_event(event)
            self._leaving.popleft()

    def fetch_before(self, parked: "Parked") -> None:
        """Start to bring back what was parked before ``parked``: the backward pass needs it next."""
        waiting = self._waiting()
        at = waiting.index(parked)
        if at:
            waiting[at - 1].fetch()

    def _waiting(self) -> "list[Parked]":
        """Those that were parked and not taken yet, in that order."""
        return [x for x in (ref() for ref in self._parked) if x is not None and not x.taken]

    @contextlib.contextmanager
    def on_stream(self):
        """What is issued inside follows what the current stream does before, on the stream of copies."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def moved(self) -> torch.cuda.Event | None:
        """An event that follows all copies so far."""
        return None if self._stream is None else self._stream.record_event()


class Parked:
    """Tensors that wait for the backward pass: on their device, or on their way to the host, there, or back."""

    def __init__(self, offloader: Offloader, tensors: list[Tensor | None], to_host: bool):
        self._offloader = offloader
        self._buffers: list[tuple[Tensor, torch.dtype, torch.Size] | None] = []
        self._back = None if to_host else tensors
        self._ready: torch.cuda.Event | None = None
        self.taken = False
        if not to_host:
            return
        with offloader.on_stream():
            for x in tensors:
                if x is None:
                    self._buffers.append(None)
                    continue
                buffer = offloader.host.take(x.nbytes)
                _view(buffer, x.dtype, x.shape).copy_(x, non_blocking=True)
                self._buffers.append((buffer, x.dtype, x.shape))
        # Where no backward pass comes, the buffers serve others.
        weakref.finalize(self, _give_all, offloader.host, self._buffers)

    def fetch(self) -> None:
        """Start to bring the tensors back."""
        if self._back is not None:
            return
        device = self._offloader.host.device
        self._back = [None if x is None else torch.empty(x[2], dtype=x[1], device=device) for x in self._buffers]
        with self._offloader.on_stream():
            for x, back in zip(self._buffers, self._back, strict=True):
                if x is not None and back is not None:
                    back.copy_(_view(*x), non_blocking=True)
        self._ready = self._offloader.moved()

    def take(self) -> list[Tensor | None]:
        """The tensors on their device again; the next ones start to come.

        Raises:
            RuntimeError: they were taken before.
        """
        if self.taken:
            raise RuntimeError(
                "the backward pass of a layer ran twice, but the first took what was kept; leave retain_graph out"
            )
        self._offloader.release()
        self.fetch()
        self._offloader.fetch_before(self)
        if self._ready is not None:
            torch.cuda.current_stream().wait_event(self._ready)
        back, self._back, self.taken = self._back, None, True
        _give_all(self._offloader.host, self._buffers)
        return back or []


def _view(buffer: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _give_all(host: HostMemory, buffers: list) -> None:
    for x in buffers:
        if x is not None:
            host.give(x[0])
    buffers.clear()
