"""The attention primitives, each by the fastest way the tensors allow.

Triton kernels (:mod:`moba_cp.kernels`) serve float32, bfloat16 and float16 on a GPU, and on the CPU under
``TRITON_INTERPRET=1``. Everything else, float64 and plain CPU tensors, goes to :mod:`moba_cp.eager`. Both have the
same signatures; the docstrings are in :mod:`moba_cp.eager`.
"""

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from . import eager
from .eager import choices, decision, requests

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_HEAD_DIMS = range(1, 257)


@lru_cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend(x: Tensor):
    """The module whose primitives serve ``x`` [..., D]: :mod:`moba_cp.kernels` or :mod:`moba_cp.eager`."""
    if _on_kernels(x) and x.dtype in KERNEL_DTYPES and x.shape[-1] in KERNEL_HEAD_DIMS:
        from . import kernels

        return kernels
    return eager


def _on_kernels(x: Tensor) -> bool:
    return (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _has_triton()


def _integers(x: Tensor, plain):
    """The module that plans the exchange: kernels, or ``plain``. It sees integers, whatever the inputs' dtype is."""
    if _on_kernels(x):
        from . import kernels

        return kernels
    return plain


def count_choices(chosen: Tensor, open_place: Tensor, unit: int) -> Tensor:
    """See :func:`moba_cp.eager.choices.count_choices`."""
    return _integers(chosen, choices).count_choices(chosen, open_place, unit)


def weigh_blocks(counts: Tensor, tables, prices, mode: str):
    """See :func:`moba_cp.eager.decision.weigh_blocks`."""
    return _integers(counts, decision).weigh_blocks(counts, tables, prices, mode)


def count_rows(chosen: Tensor, place: Tensor, fetched: Tensor, n_candidates: int, n_owners: int) -> Tensor:
    """See :func:`moba_cp.eager.choices.count_rows`."""
    return _integers(chosen, choices).count_rows(chosen, place, fetched, n_candidates, n_owners)


def pick_cheapest(weighed, rows: Tensor | None, place: Tensor, tables, prices) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moba_cp.eager.decision.pick_cheapest`."""
    return _integers(place, decision).pick_cheapest(weighed, rows, place, tables, prices)


def list_rows(chosen: Tensor, place: Tensor, n_places: int) -> tuple[Tensor, Tensor]:
    """See :func:`moba_cp.eager.choices.list_rows`."""
    return _integers(chosen, choices).list_rows(chosen, place, n_places)


def write_request(need: Tensor, source: Tensor, ends: Tensor | None = None, costs: Tensor | None = None) -> Tensor:
    """See :func:`moba_cp.eager.requests.write_request`."""
    return _integers(need, requests).write_request(need, source, ends, costs)


def relay_request(fetch: Tensor, arrived: Tensor, asked_at: Tensor) -> Tensor:
    """See :func:`moba_cp.eager.requests.relay_request`."""
    return _integers(fetch, requests).relay_request(fetch, arrived, asked_at)


def list_pairs(need: Tensor, arrived: Tensor, tables, sizes: Tensor) -> tuple[requests.Pairs, requests.Pairs]:
    """See :func:`moba_cp.eager.requests.list_pairs`."""
    return _integers(need, requests).list_pairs(need, arrived, tables, sizes)


def sum_up(
    arrived: Tensor,
    header_at: Tensor,
    ends: Tensor,
    costs: Tensor,
    facts: Tensor,
    candidates: Tensor,
    n_kv: int,
    out: Tensor,
) -> None:
    """See :func:`moba_cp.eager.requests.sum_up`."""
    _integers(arrived, requests).sum_up(arrived, header_at, ends, costs, facts, candidates, n_kv, out)


def row_ids(chosen: Tensor, slots: Tensor, place: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`moba_cp.eager.choices.row_ids`."""
    return _integers(chosen, choices).row_ids(chosen, slots, place, number, dtype)


def gather_rows(x: Tensor, slots: Tensor, n_slots: int, dtype: torch.dtype) -> Tensor:
    """See :func:`moba_cp.eager.gather_rows`."""
    return backend(x).gather_rows(x, slots, n_slots, dtype)


def merge_rows(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, index: Tensor) -> None:
    """See :func:`moba_cp.eager.merge_rows`."""
    backend(out).merge_rows(out, lse, part, part_lse, index)


def add_rows(out: Tensor, part: Tensor, index: Tensor) -> None:
    """See :func:`moba_cp.eager.add_rows`."""
    backend(out).add_rows(out, part, index)


def copy_pages(pages, pairs: Tensor, offset: Tensor, out: Tensor) -> None:
    """See :func:`moba_cp.eager.copy_pages`."""
    backend(out).copy_pages(pages, pairs, offset, out)


def add_pages(
    dk: Tensor, dv: Tensor, pages, pairs: Tensor, offset: Tensor, arrived: Tensor, begin: int, end: int
) -> None:
    """See :func:`moba_cp.eager.add_pages`."""
    backend(arrived).add_pages(dk, dv, pages, pairs, offset, arrived, begin, end)


def pack_slab(k: Tensor, v: Tensor, slab: Tensor, cut: int) -> None:
    """See :func:`moba_cp.eager.pack_slab`."""
    backend(slab).pack_slab(k, v, slab, cut)


def sum_shares(own: Tensor, shares: Tensor, places: Tensor, dk: Tensor, dv: Tensor, cut: int) -> None:
    """See :func:`moba_cp.eager.sum_shares`."""
    backend(dk).sum_shares(own, shares, places, dk, dv, cut)


def row_sums(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`moba_cp.eager.row_sums`."""
    return backend(a).row_sums(a, b)


def block_means(k: Tensor, start: Tensor, length: Tensor, block_size: int) -> Tensor:
    """See :func:`moba_cp.eager.block_means`."""
    return backend(k).block_means(k, start, length, block_size)


def select_blocks(q: Tensor, means: Tensor, first: Tensor, own: Tensor, top_k: int) -> Tensor:
    """See :func:`moba_cp.eager.select_blocks`."""
    return backend(q).select_blocks(q, means, first, own, top_k)


def routing_index(
    q: Tensor, chosen: Tensor, own: Tensor | None, visible: Tensor | None, page_row: Tensor
) -> Tensor | None:
    """Which rows visit each block, for :func:`attend` and :func:`attend_backward` over any storages of these blocks.

    Args:
        q: [N, Hq, D]; chosen: [N, Hq, S] int32; own, visible: [N] int32 or None, as in :func:`moba_cp.eager.attend`.
        page_row: [Hkv, n] int64, -1 for blocks that nobody will attend to by this index.

    Returns:
        int32; None where nothing is to be shared.
    """
    return None if backend(q) is eager else backend(q).routing_index(q, chosen, own, visible, page_row)


def index_size(q: Tensor, n_kv: int, n_blocks: int, n_slots: int) -> int:
    """Elements of what :func:`routing_index` returns for ``n_slots`` visits per row and head; 0 for None."""
    return 0 if backend(q) is eager else backend(q).index_size(q, n_kv, n_blocks, n_slots)


def attend(
    q: Tensor,
    pages,
    chosen: Tensor,
    own: Tensor | None,
    visible: Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None = None,
    index: Tensor | None = None,
    kv_heads: slice | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    whole: bool = False,
    shared: dict | None = None,
):
    """See :func:`moba_cp.eager.attend`; ``out_dtype`` rounds the output, which is wide by default.

    Args:
        index: of :func:`routing_index`.
        kv_heads: with ``into``: the KV heads to do; None for all.
        whole: with ``into``: there are no other keys; it holds nothing yet, and out may have any dtype.
        shared: of calls that differ in ``kv_heads``, ``into`` and the storages alone, which are laid out alike and have
            one ``row`` and one ``head``: the first may leave here what serves the others.
    """
    if backend(q) is not eager:
        inputs = q, pages, chosen, own, visible, scale, out_dtype or torch.float32
        return backend(q).attend(*inputs, index=index, kv_heads=kv_heads, into=into, whole=whole, shared=shared)
    if kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        some = q[:, at], pages.of_heads(kv_heads), chosen[:, at], own, visible, scale
        attend(*some, into=tuple(x[:, at] for x in into), whole=whole)
        return into
    if whole:
        for target, result in zip(into, eager.attend(q, pages, chosen, own, visible, scale), strict=True):
            target.copy_(result)
        return into
    out, lse = eager.attend(q, pages, chosen, own, visible, scale, into)
    return out.to(out_dtype or out.dtype), lse


def attend_backward(
    q, pages, chosen, own, visible, scale, dout, lse, delta, deterministic=False, local_dtype=None, index=None,
    kv_heads=None, into=None, fresh=False, whole=False, keys_done=None, shared=None,
):  # fmt: skip
    """See :func:`moba_cp.eager.attend_backward`; with ``local_dtype``, for pages that are
    :func:`moba_cp.blocks.local_pages`, the gradients are rounded to it. ``into``: dq, dk and dv to add to.
    ``index``, ``kv_heads`` and ``shared``: as in :func:`attend`. ``fresh``: dk and dv hold nothing yet and may have any
    dtype; rows of blocks in ``pages`` are written, others left or zeroed, so that one call has to serve the whole
    storage. ``whole``: the same of dq, which no other storage has a part in. ``keys_done``: called once dk and dv are
    on their way to be written; dq may follow."""
    how = dict(fresh=fresh, whole=whole, keys_done=keys_done)
    if backend(q) is not eager:
        inputs = q, pages, chosen, own, visible, scale, dout, lse, delta, deterministic, local_dtype
        return backend(q).attend_backward(*inputs, index=index, kv_heads=kv_heads, into=into, shared=shared, **how)
    if kv_heads is not None:
        at = pages.query_heads(kv_heads, q.shape[1])
        rows = dout[:, at], lse[:, at], delta[:, at]
        some = q[:, at], pages.of_heads(kv_heads), chosen[:, at], own, visible, scale, *rows, deterministic
        attend_backward(*some, into=(into[0][:, at], *into[1:]), **how)
        return into
    inputs = q, pages, chosen, own, visible, scale, dout, lse, delta, deterministic
    if into is not None:
        new = whole, fresh, fresh
        sums = (torch.zeros_like(x, dtype=lse.dtype) if is_new else x for x, is_new in zip(into, new, strict=True))
        for target, result in zip(into, eager.attend_backward(*inputs, into=tuple(sums)), strict=True):
            target.copy_(result)
        grads = into
    else:
        grads = eager.attend_backward(*inputs)
    if keys_done is not None:
        keys_done()
    return tuple(x.to(local_dtype or x.dtype) for x in grads)
