"""Block attention of rows over one storage: launches of the kernels, in slices that bound the scratch memory.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, n blocks, S chosen blocks per row,
S' = S + 1 where rows also see their own block, else S.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from . import tuned
from .backward import DQ_ATOMIC, DQ_NONE, DQ_PART, _key_kernel, _query_kernel
from .common import check_head_dim, check_unit_stride, dot_precision, on_device, padded_dim
from .forward import _long_block_kernel, _short_block_kernel
from .merge import merge_visits, sum_visits
from .routing import Routing, build_routing

SCRATCH_BYTES = 1 << 30
LOG2E = 1.4426950408889634
MAX_VISITS = 2**31 - 1


def attend(
    q: Tensor,
    pages,
    chosen: Tensor,
    own: Tensor | None,
    visible: Tensor | None,
    scale: float,
    out_dtype: torch.dtype = torch.float32,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor]:
    """Attention of rows to those of their blocks that lie in ``pages``.

    Args:
        q: [N, Hq, D] float32, bfloat16 or float16.
        pages: a :class:`moba_cp.blocks.Pages`; Hkv is ``pages.row.shape[0]``.
        chosen: [N, Hq, S] int32 block ids seen whole; -1, or a block not in ``pages``, is skipped.
        own: [N] int32, block id of which only the first ``visible[t]`` keys are seen; None for none.
        visible: [N] int32, with ``own``.
        scale: factor of the scores.
        out_dtype: of the output.
        scratch_bytes: bound of the memory for partial results, kept by working in slices of heads and rows.

    Returns:
        out [N, Hq, D] and lse [N, Hq] float32; a row that sees nothing has out 0 and lse -inf.
    """
    check_head_dim(q.shape[2])
    q, pages, chosen = _kernel_inputs(q, pages, chosen)
    n_rows, n_heads, dim = q.shape
    n_slots = chosen.shape[2] + (own is not None)
    if n_slots * n_rows * n_heads * pages.row.shape[1] * pages.k.shape[0] == 0:
        return (
            torch.zeros(n_rows, n_heads, dim, dtype=out_dtype, device=q.device),
            torch.full((n_rows, n_heads), -torch.inf, dtype=torch.float32, device=q.device),
        )
    out = torch.empty(n_rows, n_heads, dim, dtype=out_dtype, device=q.device)
    lse = torch.empty(n_rows, n_heads, dtype=torch.float32, device=q.device)
    for rows, heads, kv_heads in _slices(q, pages, n_slots * (dim * q.element_size() + 8), scratch_bytes, n_slots):
        _attend_slice(
            q[rows, heads], _head_pages(pages, kv_heads), chosen[rows, heads], _rows(own, rows), _rows(visible, rows),
            scale, out[rows, heads], lse[rows, heads],
        )  # fmt: skip
    return out, lse


def attend_backward(
    q: Tensor,
    pages,
    chosen: Tensor,
    own: Tensor | None,
    visible: Tensor | None,
    scale: float,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    deterministic: bool = False,
    dq_dtype: torch.dtype = torch.float32,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attend`, as the part that this storage has in the attention over all storages.

    Args:
        dout: [N, Hq, D] in q's dtype, gradient of the final output.
        lse: [N, Hq] float32, log-sum-exp over everything the row sees, in all storages.
        delta: [N, Hq] float32, row sums of ``dout * out`` of the final output.
        deterministic: bit-identical results from run to run.
        dq_dtype: of dq.
        scratch_bytes: as in :func:`attend`.

    Returns:
        dq [N, Hq, D], and dk, dv float32 shaped like the storages, zero where no page lies.
    """
    check_head_dim(q.shape[2])
    q, pages, chosen = _kernel_inputs(q, pages, chosen)
    dout = check_unit_stride(dout.to(q.dtype))
    n_rows, n_heads, dim = q.shape
    n_slots = chosen.shape[2] + (own is not None)
    dk = torch.zeros(pages.k.shape, dtype=torch.float32, device=q.device)
    dv = torch.zeros(pages.v.shape, dtype=torch.float32, device=q.device)
    if n_slots * n_rows * n_heads * pages.row.shape[1] * pages.k.shape[0] == 0:
        return torch.zeros(n_rows, n_heads, dim, dtype=dq_dtype, device=q.device), dk, dv
    dq = torch.empty(n_rows, n_heads, dim, dtype=dq_dtype, device=q.device)
    row_bytes = n_slots * (dim * _part_dtype(q.dtype).itemsize + 4)
    for rows, heads, kv_heads in _slices(q, pages, row_bytes, scratch_bytes, n_slots):
        _backward_slice(
            q[rows, heads], _head_pages(pages, kv_heads), chosen[rows, heads], _rows(own, rows), _rows(visible, rows),
            scale, dout[rows, heads], lse[rows, heads], delta[rows, heads], deterministic, dq[rows, heads], dk, dv,
        )  # fmt: skip
    return dq, dk, dv


def _kernel_inputs(q: Tensor, pages, chosen: Tensor):
    row = pages.row if pages.row.stride(1) == 1 else pages.row.contiguous()
    pages = replace(pages, k=check_unit_stride(pages.k), v=check_unit_stride(pages.v), row=row)
    n_slots = chosen.shape[2]
    if chosen.stride(2) != 1 or chosen.stride(1) != n_slots:
        chosen = chosen.contiguous()
    return check_unit_stride(q), pages, chosen


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows].contiguous()


def _head_pages(pages, kv_heads: slice):
    return replace(pages, row=pages.row[kv_heads], head=pages.head[kv_heads])


def _slices(q: Tensor, pages, row_bytes: int, scratch_bytes: int, n_slots: int):
    """Slices of rows, query heads and KV heads whose partial results stay within ``scratch_bytes``.

    Heads are cut first, because fewer rows make shorter lists; rows only where one KV head is too much.
    """
    n_rows, n_heads, _ = q.shape
    n_kv = pages.row.shape[0]
    group = n_heads // n_kv
    fits = max(1, scratch_bytes // (row_bytes * group))
    n_heads_fit = max(1, min(n_kv, fits // n_rows))
    # Even slices: the last one should not be a sliver.
    n_heads_fit = triton.cdiv(n_kv, triton.cdiv(n_kv, n_heads_fit))
    n_rows_fit = min(n_rows, fits, MAX_VISITS // (n_kv * group * n_slots)) if n_heads_fit == 1 else n_rows
    n_rows_fit = max(1, triton.cdiv(n_rows, triton.cdiv(n_rows, n_rows_fit)))
    for h in range(0, n_kv, n_heads_fit):
        kv_heads = slice(h, min(h + n_heads_fit, n_kv))
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        for t in range(0, n_rows, n_rows_fit):
            yield slice(t, min(t + n_rows_fit, n_rows)), heads, kv_heads


def _part_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of one visit's part of dQ: float16 could overflow where the sum does not."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _index(routing: Routing):
    return routing.visits, routing.list_start, routing.task_start, routing.task_list


def _page_strides(pages) -> tuple[int, int, int]:
    return pages.row.stride(0), pages.head.stride(0), pages.head.stride(1)


def _constants(q: Tensor, pages, chosen: Tensor, own: Tensor | None) -> dict:
    dim = q.shape[2]
    return dict(
        G=q.shape[1] // pages.row.shape[0], S=chosen.shape[2], SLOTS=chosen.shape[2] + (own is not None),
        D=dim, BD=padded_dim(dim), PRECISION=dot_precision(q.dtype),
    )  # fmt: skip


def _attend_slice(q, pages, chosen, own, visible, scale, out, lse, tile: tuned.Tile | None = None) -> None:
    n_rows, n_heads, dim = q.shape
    tile = tile or tuned.forward_tile(dim, pages.block_size, q.dtype, q.device)
    routing = build_routing(chosen, own, visible, pages.row, tile.task_rows)
    constants = _constants(q, pages, chosen, own)
    part = torch.empty(n_rows, n_heads, constants["SLOTS"], dim, dtype=q.dtype, device=q.device)
    part_lse = torch.full(part.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    n_kv, n_blocks = pages.row.shape
    kernel = _short_block_kernel if pages.block_size <= tile.bn else _long_block_kernel
    with on_device(q):
        kernel[(routing.max_tasks,)](
            q, pages.k, pages.v, part, part_lse, *_index(routing), visible, pages.row, pages.head, pages.length,
            scale * LOG2E, n_kv * n_blocks, n_blocks, n_heads, tile.task_rows,
            q.stride(0), q.stride(1), pages.k.stride(0), pages.k.stride(1), pages.v.stride(0), pages.v.stride(1),
            *_page_strides(pages),
            **constants, BM=tile.bm, BN=tile.bn, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    merge_visits(part, part_lse, out, lse)


def _backward_slice(
    q, pages, chosen, own, visible, scale, dout, lse, delta, deterministic, dq, dk, dv,
    tile: tuned.Tile | None = None, query_tile: tuned.Tile | None = None, atomic: bool | None = None,
) -> None:  # fmt: skip
    n_rows, n_heads, dim = q.shape
    n_kv, n_blocks = pages.row.shape
    tile = tile or tuned.key_tile(dim, pages.block_size, q.dtype, q.device)
    routing = build_routing(chosen, own, visible, pages.row, tile.task_rows)
    constants = _constants(q, pages, chosen, own)
    key_tiles = triton.cdiv(pages.block_size, tile.bn)
    if atomic is None:
        atomic = tuned.dq_by_atomics(dim, pages.block_size, q.dtype, q.device)
    mode = DQ_PART if key_tiles == 1 else DQ_ATOMIC if atomic and not deterministic else DQ_NONE
    part = None
    if mode.value == DQ_ATOMIC.value:
        target = dq.zero_() if dq.dtype == torch.float32 else torch.zeros(dq.shape, dtype=torch.float32, device=q.device)
    else:
        slots = constants["SLOTS"]
        target = part = torch.empty(n_rows, n_heads, slots, dim, dtype=_part_dtype(q.dtype), device=q.device)
    turn = torch.zeros(1 + n_kv * n_blocks * key_tiles, dtype=torch.int32, device=q.device) if deterministic else None
    inputs = q, pages.k, pages.v, dout, lse, delta
    index = *_index(routing), visible, pages.row, pages.head, pages.length
    numbers = scale, n_kv * n_blocks, n_blocks, n_heads, tile.task_rows
    strides = (
        q.stride(0), q.stride(1), pages.k.stride(0), pages.k.stride(1), pages.v.stride(0), pages.v.stride(1),
        dout.stride(0), dout.stride(1), lse.stride(0), delta.stride(0),
    )  # fmt: skip
    with on_device(q):
        _key_kernel[(routing.max_tasks * key_tiles,)](
            *inputs, target, dk, dv, *index, turn, *numbers, *strides,
            target.stride(0), target.stride(1), dk.stride(0), dk.stride(1), *_page_strides(pages),
            **constants, BM=tile.bm, BN=tile.bn, KEY_TILES=key_tiles, DQ=mode.value, ORDERED=deterministic,
            STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        if mode.value == DQ_NONE.value:
            by_query = query_tile or tuned.query_tile(dim, pages.block_size, q.dtype, q.device)
            splits = triton.cdiv(tile.task_rows, by_query.bm)
            _query_kernel[(routing.max_tasks * splits,)](
                *inputs, part, *index, *numbers, *strides, *_page_strides(pages),
                **constants, BM=by_query.bm, BN=by_query.bn, SPLITS=splits, STAGES=by_query.stages,
                num_warps=by_query.warps,
            )  # fmt: skip
    if part is not None:
        sum_visits(part, dq, chosen, own, visible, pages.row, scale)
    elif target is not dq:
        dq.copy_(target)
