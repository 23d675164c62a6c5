"""How far a reader must follow one call: files, functions and borders between files that it crosses.

    python -m tests.helpers.trace            one device, and each mode on four ranks

Functions of the package that are called within :func:`moba_cp.moba_attention`, or within its backward, are counted; a
border is a call, or a return, from one of the package's files into another.
"""

import os
import sys

import torch

import moba_cp
from moba_cp import CPContext, MoBAConfig, moba_attention
from tests.helpers.distributed import run_threads

PACKAGE = os.path.dirname(moba_cp.__file__)
KERNELS = os.path.join(os.path.dirname(PACKAGE), "kernels")
MODES = "auto", "kv", "query", "allgather"


class Trace:
    """Counts while it is entered, in the thread that entered it."""

    def __init__(self):
        self.files: set[str] = set()
        self.functions: set[tuple[str, str, int]] = set()
        self.borders = 0

    def __enter__(self):
        self._stack: list[str] = []
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _event(self, frame, event, _argument):
        code = frame.f_code
        file = code.co_filename
        if event not in ("call", "return") or not file.startswith((PACKAGE, KERNELS)):
            return
        if event == "call":
            self.files.add(file)
            self.functions.add(
                (file, code.co_qualname if hasattr(code, "co_qualname") else code.co_name, code.co_firstlineno)
            )
            # Into the other file, and back.
            self.borders += 2 * (bool(self._stack) and self._stack[-1] != file)
            self._stack.append(file)
        elif self._stack:
            self._stack.pop()

    def __str__(self):
        return f"{len(self.files)} files, {len(self.functions)} functions, {self.borders} borders"


def trace(comm, mode: str | None) -> dict[str, Trace]:
    """The second call's forward and backward on one rank; ``mode`` None is one device without a context."""
    generator = torch.Generator().manual_seed(comm.rank if comm else 0)
    n_local, config, traces = 256, MoBAConfig(16, 4), {}
    cp = CPContext(comm, "zigzag", n_local * comm.size, exchange=mode) if comm else None
    for _ in range(2):
        q, k, v = (torch.randn(n_local, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
        with Trace() as traces["forward"]:
            out = moba_attention(q, k, v, config, cp=cp)
        with Trace() as traces["backward"]:
            out.sum().backward()
    return traces


def traced(mode: str | None) -> dict[str, Trace]:
    """``mode`` on four ranks, as rank 0 sees it; None is one device."""
    return trace(None, None) if mode is None else run_threads(4, trace, mode)[0]


if __name__ == "__main__":
    for mode in (None, *MODES):
        for direction, counts in traced(mode).items():
            print(f"{mode or 'one device':12} {direction:9} {counts}")
            if "--files" in sys.argv:
                print(
                    *("    " + os.path.relpath(file, os.path.dirname(PACKAGE)) for file in sorted(counts.files)),
                    sep="\n",
                )
