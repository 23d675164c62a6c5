"""Requests between ranks and the lists that follow from them, without a device sync.

The names and the format of a request are those of :mod:`moba_cp.eager.exchange`. Lists come from a running sum over all
pairs that could move, in an order fixed beforehand. A program handles BLOCK elements.

Legend: P ranks, n blocks, Hkv key/value heads, m entries: pairs that can move.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cdiv, check_limit, launch_options, on_device

BLOCK = 512
FIX = "use larger blocks, or share the KV heads among more tensor-parallel ranks"
# Numbers in a header behind those of the stages: of the format, see :mod:`moba_cp.eager.exchange`.
TOTALS = 2


@triton.jit
def _rows_to(ends, s_ends, dest, m):
    """Rows that go to each ``dest``; ``ends`` [dests] says where each destination's part of the list of rows ends."""
    end = tl.load(ends + dest * s_ends, mask=m, other=0)  # [BLOCK]
    return (end - tl.load(ends + (dest - 1) * s_ends, mask=m & (dest > 0), other=0)).to(tl.int64)


@triton.jit
def _word(arrived, at, m):
    """int64 of the 8 bytes from ``at`` on."""
    word = tl.load(arrived + at, mask=m, other=0).to(tl.int64)  # [BLOCK]
    for byte in tl.static_range(1, 8):
        word |= tl.load(arrived + at + byte, mask=m, other=0).to(tl.int64) << (8 * byte)
    return word


@triton.jit(do_not_specialize=["n_bytes", "n_owners", "stages", "s_ends"], do_not_specialize_on_alignment=["ends"])
def _request_kernel(
    need, source, ends, costs, request, n_bytes, n_owners, stages, s_ends,
    HEADERS: tl.constexpr, TOTALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < n_bytes  # [BLOCK]
    at = tl.load(source + o, mask=m, other=0).to(tl.int32)  # [BLOCK]
    if HEADERS:
        width = 8 * (stages + TOTALS)
        n_headers = n_owners * width
        m_header = m & (at < n_headers)  # [BLOCK]
        stage = at % width // 8  # [BLOCK]
        rows = _rows_to(ends, s_ends, stage * n_owners + at // width, m_header & (stage < stages))  # [BLOCK]
        value = tl.where(stage == stages, tl.load(costs + n_owners), rows)  # [BLOCK]
        value = tl.where(stage > stages, tl.load(ends + (stages * n_owners - 1) * s_ends).to(tl.int64), value)
        value = value >> (at % 8 * 8).to(tl.int64)
        flag = tl.load(need + at - n_headers, mask=m & (at >= n_headers), other=0)  # [BLOCK]
        tl.store(request + o, tl.where(m_header, value & 255, (flag != 0).to(tl.int64)), mask=m)
    else:
        tl.store(request + o, tl.load(need + at, mask=m, other=0) != 0, mask=m)


@triton.jit(do_not_specialize=["n_pairs", "n_peers"])
def _relay_kernel(fetch, arrived, asked_at, need, n_pairs, n_peers, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < n_pairs  # [BLOCK]
    wanted = tl.load(fetch + o, mask=m, other=0) != 0  # [BLOCK]
    p_asked = asked_at + o  # [BLOCK]
    for _ in range(n_peers):
        at = tl.load(p_asked, mask=m, other=-1)  # [BLOCK]
        p_asked += n_pairs
        wanted |= tl.load(arrived + at, mask=at >= 0, other=0) != 0
    tl.store(need + o, wanted, mask=m)


@triton.jit(do_not_specialize=["n_entries", "n_want"])
def _moved_kernel(need, arrived, flag_at, weight, moved, n_entries, n_want, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < n_entries  # [BLOCK]
    at = tl.load(flag_at + o, mask=m, other=0)  # [BLOCK]
    is_wanted = tl.load(need + at, mask=o < n_want, other=0) != 0  # [BLOCK]
    is_given = tl.load(arrived + at, mask=m & (o >= n_want), other=0) != 0  # [BLOCK]
    moves = (is_wanted | is_given).to(tl.int64)  # [BLOCK]
    tl.store(moved + o, moves * tl.load(weight + o, mask=m, other=0), mask=m)


@triton.jit
def _before(sums, entry, m):
    """The running sum before ``entry``."""
    return tl.load(sums + entry - 1, mask=m & (entry > 0), other=0)


@triton.jit(do_not_specialize=["n_entries", "n_want", "n_owners", "stages"])
def _lists_kernel(
    sums, pairs, bounds, lists, offsets, sizes, n_entries, n_want, n_owners, stages,
    PAIR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < n_entries  # [BLOCK]
    before = _before(sums, o, m)  # [BLOCK]
    moves = tl.load(sums + o, mask=m, other=0) != before  # [BLOCK]
    # Pairs sent follow pairs received in the running sum, and in the lists all pairs that could have been received.
    wanted = tl.load(sums + n_want - 1, mask=n_want > 0, other=0)
    is_want = o < n_want  # [BLOCK]
    o_list = before // PAIR + tl.where(is_want, 0, n_want - wanted // PAIR)  # [BLOCK]
    tl.store(lists + o_list, tl.load(pairs + o, mask=m, other=0), mask=m & moves)
    tl.store(offsets + o_list, before % PAIR - tl.where(is_want, 0, wanted % PAIR), mask=m & moves)

    m = o < 2 * stages * (n_owners + 1)
    owner = o % (n_owners + 1)  # [BLOCK]
    side_stage = o // (n_owners + 1)  # [BLOCK]
    # Each side has one bound more than (stage, owner) entries. The last column counts the pairs of the whole stage.
    is_last = owner == n_owners  # [BLOCK]
    first = side_stage * n_owners + side_stage // stages + tl.where(is_last, 0, owner)  # [BLOCK]
    end = first + tl.where(is_last, n_owners, 1)  # [BLOCK]
    moved = _before(sums, tl.load(bounds + end, mask=m, other=0), m)  # [BLOCK]
    moved -= _before(sums, tl.load(bounds + first, mask=m, other=0), m)
    tl.store(sizes + o, tl.where(is_last, moved // PAIR, moved % PAIR), mask=m)


@triton.jit(do_not_specialize=["n_kv", "n_owners", "stages", "s_ends"], do_not_specialize_on_alignment=["ends"])
def _sum_up_kernel(
    arrived, header_at, ends, costs, stats, candidates, out, n_kv, n_owners, stages, s_ends, BLOCK: tl.constexpr
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    n_sizes = 2 * stages * (n_owners + 1)
    m = o < n_sizes  # [BLOCK]
    owner = o % (n_owners + 1)  # [BLOCK]
    stage = o // (n_owners + 1) % stages  # [BLOCK]
    m_owner = m & (owner < n_owners)  # [BLOCK]
    m_received = m_owner & (o < n_sizes // 2)  # [BLOCK]
    at = tl.load(header_at + owner, mask=m_received, other=0)  # [BLOCK]
    sent = _rows_to(ends, s_ends, stage * n_owners + owner, m_owner & (o >= n_sizes // 2))  # [BLOCK]
    tl.store(out + o, _word(arrived, at + 8 * stage, m_received) + sent, mask=m)

    total = tl.zeros([BLOCK], tl.int64)  # [BLOCK]
    rows = tl.zeros([BLOCK], tl.int64)  # [BLOCK]
    for p in range(0, n_owners, BLOCK):
        o_p = p + tl.arange(0, BLOCK)  # [BLOCK]
        at = tl.load(header_at + o_p, mask=o_p < n_owners, other=0)
        total += _word(arrived, at + 8 * stages, o_p < n_owners)
        rows += _word(arrived, at + 8 * stages + 8, o_p < n_owners)
    stat = tl.where(o == 0, tl.sum(total, 0), 0)  # [BLOCK]
    stat = tl.where(o == 5, tl.sum(rows, 0), stat)
    stat = tl.where(o == 1, tl.load(stats), stat)
    stat = tl.where(o == 2, tl.load(candidates) * n_kv, stat)
    stat = tl.where(o == 3, tl.load(costs + n_owners), stat)
    stat = tl.where(o == 4, tl.load(stats + 1), stat)
    tl.store(out + n_sizes + o, stat, mask=m)


class Pairs(NamedTuple):
    """As :class:`moba_cp.eager.exchange.Pairs`."""

    ids: Tensor
    before: Tensor


def write_request(need: Tensor, source: Tensor, ends: Tensor | None = None, costs: Tensor | None = None) -> Tensor:
    """See :func:`moba_cp.eager.exchange.write_request`."""
    request = torch.empty(source.numel(), dtype=torch.uint8, device=need.device)
    assert need.is_contiguous()
    check_limit("the number of bytes of a request", source.numel(), FIX)
    if request.numel():
        n_owners = 0 if ends is None else costs.numel() - 1
        stages, s_ends = (0, 0) if ends is None else (ends.numel() // n_owners, ends.stride(0))
        with on_device(need):
            _request_kernel[(cdiv(source.numel(), BLOCK),)](
                need=need, source=source, ends=ends, costs=costs, request=request, n_bytes=source.numel(),
                n_owners=n_owners, stages=stages, s_ends=s_ends,
                HEADERS=ends is not None, TOTALS=TOTALS, BLOCK=BLOCK, **launch_options(4),
            )  # fmt: skip
    return request


def relay_request(fetch: Tensor, arrived: Tensor, asked_at: Tensor) -> Tensor:
    """See :func:`moba_cp.eager.exchange.relay_request`."""
    need = torch.empty(fetch.shape, dtype=torch.uint8, device=fetch.device)
    assert fetch.is_contiguous() and asked_at.is_contiguous()
    if need.numel():
        with on_device(fetch):
            _relay_kernel[(cdiv(need.numel(), BLOCK),)](
                fetch=fetch, arrived=arrived, asked_at=asked_at, need=need, n_pairs=need.numel(),
                n_peers=asked_at.shape[0], BLOCK=BLOCK, **launch_options(4),
            )  # fmt: skip
    return need.view(torch.bool)


def list_pairs(need: Tensor, arrived: Tensor, tables, sizes: Tensor) -> tuple[Pairs, Pairs]:
    """See :func:`moba_cp.eager.exchange.list_pairs`."""
    n_entries, (_, stages, columns) = tables.pairs.numel(), sizes.shape
    moved = torch.empty(n_entries, dtype=torch.int64, device=need.device)
    lists, offsets = torch.empty(2, n_entries, dtype=torch.int64, device=need.device)
    assert need.is_contiguous() and sizes.is_contiguous()
    check_limit("the number of (KV head, block) pairs that ranks can ask for", n_entries, FIX)
    numbers = dict(n_entries=n_entries, n_want=tables.n_want)
    with on_device(need):
        if n_entries:
            _moved_kernel[(cdiv(n_entries, BLOCK),)](
                need=need, arrived=arrived, flag_at=tables.flag_at, weight=tables.weight, moved=moved, **numbers,
                BLOCK=BLOCK, **launch_options(4),
            )  # fmt: skip
        _lists_kernel[(cdiv(max(n_entries, sizes.numel()), BLOCK),)](
            sums=moved.cumsum(0), pairs=tables.pairs, bounds=tables.bounds, lists=lists, offsets=offsets, sizes=sizes,
            **numbers, n_owners=columns - 1, stages=stages, PAIR=tables.unit, BLOCK=BLOCK, **launch_options(4),
        )  # fmt: skip
    return tuple(Pairs(lists[side], offsets[side]) for side in (slice(0, tables.n_want), slice(tables.n_want, None)))


def sum_up(
    arrived: Tensor,
    header_at: Tensor,
    ends: Tensor,
    costs: Tensor,
    stats: Tensor,
    candidates: Tensor,
    n_kv: int,
    out: Tensor,
) -> None:
    """See :func:`moba_cp.eager.exchange.sum_up`."""
    assert out.is_contiguous() and out[0].numel() >= 6
    with on_device(arrived):
        _sum_up_kernel[(cdiv(out[0].numel(), BLOCK),)](
            arrived=arrived, header_at=header_at, ends=ends, costs=costs, stats=stats, candidates=candidates, out=out,
            n_kv=n_kv, n_owners=header_at.numel(), stages=out.shape[2], s_ends=ends.stride(0),
            BLOCK=BLOCK, **launch_options(4),
        )  # fmt: skip
