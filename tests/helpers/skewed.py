"""Warps of every Triton kernel apart from one another, as where a process gives a GPU to another at any moment.

Each sleeps before its first instruction and after each barrier. What is right does not change by a bit; where a barrier
is missing, other threads come first than otherwise.
"""

import os
import re
import tempfile

# Microseconds that a warp sleeps, by its number ``w`` and its program's ``c``.
KINDS = {
    "first ones first": "mov.u32 late, w;",
    "last ones first": "sub.u32 late, 7, w;",
    "mixed": "mad.lo.u32 late, w, 11, c; and.b32 late, late, 7;",
}
UNIT_NS = 3000


def install(kind: str) -> None:
    """From now on this process compiles kernels so; before its first launch."""
    from triton.backends.nvidia.compiler import CUDABackend

    # Kernels that were compiled otherwise have the same keys.
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="skewed")
    make_ptx = CUDABackend.make_ptx
    CUDABackend.make_ptx = lambda self, *args: skewed(make_ptx(self, *args), kind)


def skewed(ptx: str, kind: str) -> str:
    """The kernel ``ptx`` with sleeps; those whose warps have tasks of their own are left as they are."""
    if "mbarrier" in ptx:
        return ptx
    sleep = (
        "{ .reg .b32 w, c, late; mov.u32 w, %tid.x; shr.u32 w, w, 5; mov.u32 c, %ctaid.x; "
        f"{KINDS[kind]} min.u32 late, late, 7; mul.lo.u32 late, late, {UNIT_NS}; nanosleep.u32 late; }}"
    )
    ptx = re.sub(r"\bbar\.sync\s+0;", lambda found: f"{found[0]} {sleep}", ptx)
    # Behind the declarations of registers at the beginning.
    return re.sub(r"(\n\{\n(?:\s*\.(?:reg|local|shared)[^\n]*\n)*)", lambda found: f"{found[0]}{sleep}\n", ptx, count=1)
