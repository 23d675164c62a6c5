"""Where the time of a pass goes on the first rank, as a short text."""

from collections import defaultdict
from pathlib import Path

import torch
from torch.autograd import DeviceType

from ..timing import Candidate, time_passes
from .measure import Layer

ROWS = 24
TRANSFERS = ("nccl", "Memcpy PtoP")
"""How the names of what moves data between GPUs begin: NCCL's kernels, and copies from another GPU's memory."""


def write_profile(path: Path, layer: Layer, candidates: list[Candidate]) -> None:
    """Append the kernels of one forward and backward pass of each; collective over the layer's ranks."""
    ready = layer.ranks.ready(layer.size)
    for candidate in candidates if layer.ranks.on_gpu else ():
        time_passes(candidate, True, before=ready)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            (elapsed,) = time_passes(candidate, True, before=ready)
        if layer.ranks.first:
            kernels = [
                (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
                for event in profile.profiler.kineto_results.events()
                if event.device_type() == DeviceType.CUDA
            ]
            with open(path, "a") as file:
                print(f"\n{candidate.name}, T={layer.n_tokens}, P={layer.size}: {elapsed:.2f} ms", file=file)
                print(*summary(kernels), sep="\n", file=file)


def summary(kernels: list[tuple[str, int, int]]) -> list[str]:
    """Lines on kernels (name, begin and end in ns): what overlaps, and the longest of them."""
    # Beside the kernels there are ranges named after them.
    kernels = [kernel for kernel in kernels if not kernel[0].startswith("nccl:")]
    transfers = [(begin, end) for name, begin, end in kernels if name.startswith(TRANSFERS)]
    work = [(begin, end) for name, begin, end in kernels if not name.startswith(TRANSFERS)]
    both, busy, moving = _covered(transfers + work), _covered(work), _covered(transfers)
    span = max((end for _, _, end in kernels), default=0) - min((begin for _, begin, _ in kernels), default=0)
    lines = [
        f"{busy / 1e6:9.3f} ms computing, {moving / 1e6:.3f} ms moving, {(both - busy) / 1e6:.3f} ms of it "
        f"alone, {(span - both) / 1e6:.3f} ms nothing"
    ]
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, begin, end in kernels:
        totals[name][0] += end - begin
        totals[name][1] += 1
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:ROWS]
    return lines + [f"{time / 1e6:9.3f} ms {count:5d}  {name[:110]}" for name, (time, count) in longest]


def _covered(intervals: list[tuple[int, int]]) -> int:
    """ns that at least one of the intervals covers."""
    total, until = 0, -1
    for begin, end in sorted(intervals):
        total += max(0, end - max(begin, until))
        until = max(until, end)
    return total
