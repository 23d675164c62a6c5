"""Something to time, and one turn of it: by events on a GPU, by the clock on a CPU."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Candidate:
    """Something to time: ``forward()`` gives an output whose gradient is ``dout``."""

    name: str
    forward: Callable[[], Tensor]
    dout: Tensor
    leaves: list[Tensor]
    inside: Callable = contextlib.nullcontext
    """context in which it runs, entered outside the timed region."""
    shards: float | None = None


def time_once(candidate: Candidate, backward: bool, ready: Callable[[], None] | None = None) -> float:
    """ms of a forward, or of a forward and a backward pass; ``ready()`` is called just before."""
    for x in candidate.leaves:
        x.grad = None
    on_gpu = candidate.dout.is_cuda
    with candidate.inside():
        if ready is not None:
            ready()
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        started = time.perf_counter()
        out = candidate.forward()
        if backward:
            out.backward(candidate.dout)
        if not on_gpu:
            return 1e3 * (time.perf_counter() - started)
        end.record()
    end.synchronize()
    return begin.elapsed_time(end)
