"""Kernels for Hopper, and their launches.

They take the place of those of :mod:`..forward` and :mod:`..backward` where :func:`serves` and the table at the end of
:mod:`..tuned` say so, and of :mod:`..select` where :func:`selects` does, and mean the same.

:mod:`.long_blocks` is the forward, :mod:`.keys` and :mod:`.queries` are the gradients. A program is three groups of
four warps. One fetches: K and V by TMA, rows of Q and dout, which lie anywhere, by cp.async. Two compute, each at its
own pace, so that the softmax of one hides behind the products of the other. Groups meet at barriers in shared memory
only (see :mod:`.shared`). In :mod:`.select` a program is one warp, and each thread has a row.

The kernels are written in Gluon, which comes with Triton and changes with it. They ran on H100 and H200 with Triton
3.6.0; 3.7.1 compiles them, as the tests do.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..common import cdiv
from ..tuned import Tile, is_hopper

# Of Triton.
VERSIONS = ("3.6.",)
HEAD_DIMS = (64, 128)
# Blocks besides its own that a row may choose where threads keep them in registers. On an H100, 131,072 tokens of 16
# heads, ms of the other kernel and of this one: D = 64, B = 128, k = 8: 3.44, 1.43; D = 128, B = 128, k = 8: 3.52,
# 1.88; D = 128, B = 512, k = 8: 1.44, 0.94; D = 128, B = 4096, k = 12: 0.86, 0.94.
MAX_CHOSEN = 15
ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .keys import key_kernel
    from .long_blocks import long_block_kernel
    from .queries import query_kernel
    from .select import WIDTH, select_kernel

    HAS_GLUON = True
except (ImportError, AttributeError):
    HAS_GLUON = False


def runs_on(device: torch.device) -> bool:
    """Whether GPU and Triton are such as these kernels ran with."""
    return HAS_GLUON and triton.__version__.startswith(VERSIONS) and is_hopper(device)


def serves(q: Tensor, pages, scale: float, dout: Tensor | None = None) -> bool:
    """Whether a call can run here: 16-bit inputs, D of 64 or 128, whole tiles of keys, rows that TMA can fetch.

    A backward's call gives ``dout`` [N, Hq, D] too, and is of bfloat16, in which partial dQ are.
    """
    return (
        runs_on(q.device)
        and q.dtype in ELEMENTS
        and q.shape[2] in HEAD_DIMS
        and pages.block_size % 128 == 0
        and scale > 0
        and all(_is_regular(x) for x in (q, pages.k, pages.v))
        and (dout is None or q.dtype == torch.bfloat16 and _is_regular(dout))
    )


def selects(q: Tensor, n_slots: int) -> bool:
    """Whether the choice of ``n_slots`` blocks for each row of q [N, Hq, D] can run here."""
    return runs_on(q.device) and q.dtype in ELEMENTS and q.shape[2] in HEAD_DIMS and n_slots <= MAX_CHOSEN


def _is_regular(x: Tensor) -> bool:
    """Whether rows of x [T, H, D] begin at multiples of 16 bytes, with columns of all heads that fit 32 bits."""
    s_row, s_head, _ = x.stride()
    aligned = x.data_ptr() % 16 == 0 and s_row % 16 == 0 and s_head % 16 == 0
    return aligned and s_row > 0 and x.shape[0] < 2**31 and (x.shape[1] - 1) * s_head + x.shape[2] < 2**31


@lru_cache
def _box_layout(rows: int, dim: int, dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, dim], getattr(gl, ELEMENTS[dtype]))


def _boxes(x: Tensor, rows: int):
    """TMA descriptor of boxes of ``rows`` rows of one head, in x [T, H, D] seen as [T, columns]."""
    n_rows, n_heads, dim = x.shape
    layout = _box_layout(rows, dim, x.dtype)
    shape = [n_rows, (n_heads - 1) * x.stride(1) + dim]
    return TensorDescriptor(x, shape, [x.stride(0), 1], [rows, dim], layout)


def _places(part, tasks) -> tuple[int, int, int]:
    """What :func:`..routing.read_task` wants beside the tensors and R, which is a constant here."""
    places, _, *lists = part.task_args(tasks)
    return places, *lists


def launch_select(q: Tensor, means: Tensor, first: Tensor, own: Tensor, chosen: Tensor) -> None:
    """See :func:`..select.select_blocks`."""
    n_rows, n_heads, dim = q.shape
    select_kernel[(cdiv(n_rows, WIDTH.value), n_heads)](
        q, means, first, own, chosen, n_rows, *q.stride()[:2], *means.stride()[:2],
        HQ=n_heads, G=n_heads // means.shape[1], D=dim, S=chosen.shape[2], num_warps=1,
    )  # fmt: skip


def launch_forward(part, tile: Tile, tasks, routing, visible, parts: Tensor, parts_lse: Tensor, scale_log2) -> None:
    """Partial outputs and log-sum-exps of the visits of a slice (``part``, of :mod:`..attend`)."""
    long_block_kernel[part.grid(tasks)](
        part.q, _boxes(part.k, tile.bn), _boxes(part.v, tile.bn), part.k, part.v, parts, parts_lse,
        routing.visits, tasks.table, routing.list_start[part.lists], visible,
        scale_log2, *_places(part, tasks), part.n_blocks, part.n_heads, *part.strides, TASK_ROWS=tasks.rows,
        **{name: part.constants[name] for name in ("G", "S", "SLOTS", "D")},
        BM=tile.bm, BN=tile.bn, STAGES=tile.stages, REGISTERS=tile.fetch_registers, num_warps=tile.warps,
    )  # fmt: skip


def launch_keys(
    part, tile: Tile, tasks, key_tiles: int, dout, into, dk, dv, sum_k, sum_v, table, stats, facts,
    scale: float, first_head: int,
) -> None:  # fmt: skip
    """dK and dV of a slice, and partial dQ where ``key_tiles`` is 1."""
    key_kernel[part.grid(tasks, key_tiles)](
        part.q, dout, _boxes(part.k, tile.bn), _boxes(part.v, tile.bn), part.k, part.v, into, dk, dv, sum_k, sum_v,
        table, stats, facts, scale, part.n_visits, part.block_size, first_head, *part.strides[2:], *dk.stride()[:2],
        D=part.q.shape[2], BM=tile.bm, BN=tile.bn // 2, KEY_TILES=key_tiles,
        DQ=key_tiles == 1, DIRECT=sum_k is not None, STAGES=tile.stages, REGISTERS=tile.fetch_registers,
        num_warps=tile.warps,
    )  # fmt: skip


def launch_queries(part, tile: Tile, tasks, dout, into, table, stats, list_start, scale: float) -> None:
    """Partial dQ of the visits of a slice."""
    query_kernel[part.grid(tasks)](
        part.q, dout, _boxes(part.k, tile.bn), _boxes(part.v, tile.bn), part.k, part.v, into, table, stats,
        tasks.table, list_start, scale, part.n_visits, *_places(part, tasks), *part.strides[2:],
        TASK_ROWS=tasks.rows, D=part.q.shape[2], BM=tile.bm, BN=tile.bn, STAGES=tile.stages,
        REGISTERS=tile.fetch_registers, num_warps=tile.warps,
    )  # fmt: skip
