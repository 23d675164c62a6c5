"""The timer: passes of something that attends, by CUDA events on a GPU and by the clock on a CPU."""

import contextlib
import functools
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
    """q, k, v."""
    inside: Callable = contextlib.nullcontext
    """Makes the context in which it runs; entered outside of the timed region."""
    inference: bool = False
    """Whether a forward pass alone runs without grad, and so keeps nothing for a backward pass."""

    def run(self, backward: bool) -> Tensor:
        """A forward pass, and a backward pass if asked for; returns the output."""
        for x in self.leaves:
            x.grad = None
        with torch.set_grad_enabled(backward or not self.inference):
            out = self.forward()
        if backward:
            out.backward(self.dout)
        return out

    def results(self) -> list[Tensor]:
        """[out, dq, dk, dv] of a forward and a backward pass."""
        with self.inside():
            out = self.run(True)
        return [out.detach(), *(x.grad for x in self.leaves)]


def time_passes(
    candidate: Candidate,
    backward: bool,
    repeats: int = 1,
    warm_up: int = 0,
    before: Callable[[], None] | None = None,
    graph: bool = False,
) -> list[float]:
    """ms of ``repeats`` passes of ``candidate``.

    Without ``before`` passes follow one another without a pause, as the layers of a model do. With it each pass starts
    behind a call of ``before()``, which is not timed. ``graph`` times replays of a CUDA graph of the pass.
    """
    on_gpu = candidate.dout.is_cuda
    with candidate.inside():
        run = functools.partial(candidate.run, backward)
        if graph:
            run = _captured(run)
        for _ in range(warm_up):
            run()
        if on_gpu and before is None:
            torch.cuda.synchronize()
        times = []
        for _ in range(repeats):
            if before is not None:
                before()
            begin = _now(on_gpu)
            run()
            times.append((begin, _now(on_gpu)))
        if on_gpu:
            torch.cuda.synchronize()
    return [begin.elapsed_time(end) if on_gpu else 1e3 * (end - begin) for begin, end in times]


def _now(on_gpu: bool):
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _captured(run: Callable[[], Tensor]) -> Callable[[], None]:
    """A replay of ``run`` as a CUDA graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        run()
    return graph.replay
