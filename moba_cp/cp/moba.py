"""MoBA attention across ranks.

Where tokens are exchanged for heads (:mod:`.heads`), every h ranks first give one another the rows of their heads; what
follows is done by the ranks that have the same heads, and is nothing but attention where that is one.

Tails of straddling blocks go to the owners; block means are all-gathered; local queries select among all blocks. There
are two ways to attend to blocks of other ranks then: all K and V come here, some heads at a time (:mod:`.allgather`),
or a plan says which blocks come here and which query rows go to theirs (:mod:`.exchange`). Both have the methods of
:class:`.ways.Way`.

Legend: L local tokens, X extra rows (assembled straddling blocks), n blocks, Hq query heads, Hkv key/value heads,
D head dim, S = k - 1 selected blocks per row.
"""

import torch
from torch import Tensor

from ..blocks import Pages
from ..config import MoBAConfig
from ..given import numbers_in_documents
from ..ops import backend
from ..transforms import once_differentiable, without_autocast
from .allgather.strategy import AllGather, Transport, build_transport
from .calls import TAG_BYTES, Call, agree
from .comm import Communicator, HostCopy, wait_for
from .compiling import outside_graphs
from .context import CPContext, check_context, signature
from .exchange.strategy import Exchange, ExchangeTables, build_exchange_tables
from .geometry import BlockGeometry
from .heads.choice import TeamSize, head_ranks
from .heads.collectives import Collectives, Part, Stage
from .heads.copies import team_transport
from .heads.local import LocalMoBA
from .heads.strategy import HeadExchange, Saved
from .heads.tables import HeadTables, build_head_tables
from .options import GATHERING_MODES
from .records import HeadPass, OwnedTables, Pass
from .selecting import refuse_faults, select_by_keys
from .straddle import assemble, assemble_backward
from .ways import OutputGradient, Queries, Seen, Way


@outside_graphs
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    scale: float,
    cp: CPContext,
    block_indices: Tensor | None = None,
    check_indices: bool = False,
    return_selection: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """MoBA attention of local queries to the whole sequence; a collective call.

    Args:
        q: [L, Hq, D]; k, v: [L, Hkv, D], this rank's share.
        block_indices: [L, G, S] int32, a selection for this rank's rows in numbers of blocks within their documents; S
            is then ``config.top_k - 1``, and its gate MoBA's own.
        check_indices, return_selection: as of :func:`moba_cp.moba_attention`.

    Returns:
        out [L, Hq, D] in q's dtype, lse [L, Hq] wide, and if it is asked for the selection [L, G, S] as
        ``block_indices`` has it; these two without gradient.

    Raises:
        ValueError: q is not this rank's share of ``cp``'s sequence, or on another kind of device; or with
            ``check_indices`` on all ranks, if on one of them a row names what it must not.
    """
    check_context(cp, q)
    if torch.is_inference_mode_enabled():
        # Buffers and tables that this call makes outlive it, and serve training too.
        with torch.inference_mode(False), torch.no_grad():
            return moba_attention(q, k, v, config, scale, cp, block_indices, check_indices, return_selection)
    given = None
    if block_indices is not None:
        geometry = cp.geometry(config.block_size)
        if check_indices:
            refuse_faults(block_indices, geometry, cp)
        given = backend(q).given_blocks(block_indices, geometry.first, geometry.current_block)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    call = enter(q, k, config, cp, wanted, torch.is_grad_enabled(), given, return_selection)
    # Where other ranks want gradients, this one has to take part in their backward pass.
    others_may = torch.is_grad_enabled() and not wanted and cp.size > 1
    anchor = torch.empty(0, dtype=torch.float32, requires_grad=True) if others_may else None
    out, lse, selection = _MoBAAcrossRanks.apply(q, k, v, config, scale, cp, call, anchor, given, return_selection)
    if return_selection:
        selection = numbers_in_documents(selection, cp.geometry(config.block_size).first)
    return out if anchor is None or call.anybody_wants() else out.detach(), lse, selection


def enter(
    q: Tensor,
    k: Tensor,
    config: MoBAConfig,
    cp: CPContext,
    wanted: bool,
    needs_grad: bool,
    given: Tensor | None = None,
    return_selection: bool = False,
) -> Call:
    """A call of :func:`forward_pass` begins: whether this rank wants gradients of it, and whether it could have any."""
    gate = tuple(config.gate) if given is None else ("given", given.shape[1])
    moba = config.block_size, config.top_k, gate
    if not cp.comm.calls.count:
        agree(cp.comm, signature(cp, q, k, kind="moba", block_size=config.block_size, top_k=config.top_k, gate=gate))
    what = cp.digest, q.shape[1], k.shape[1:], str(q.dtype), *moba, return_selection
    return Call(cp.comm, what, wanted, needs_grad)


def choose(q: Tensor, k: Tensor, config: MoBAConfig, cp: CPContext, ops, call: Call) -> Way:
    """The way that serves a call: an all-gather if it is asked for, or known beforehand to be the cheapest; otherwise
    an exchange, which in ``auto`` falls back to an all-gather if its plan would save little.

    The choice depends only on what is the same on all ranks, so all of them make the same.
    """
    options, transport, n_slots = cp.exchange, None, config.top_k - 1
    if cp.comm.size == 1:
        return Exchange(None, options, None, ops, cp, call, q.shape[1])
    layer = config.block_size, q.shape[1], k.shape[1:], k.dtype, n_slots
    if options.mode in GATHERING_MODES:
        transport = cp.cached(Transport, layer, lambda: build_transport(cp, config.block_size, q, k, config.top_k))
        if transport.tables.at_once:
            return AllGather(transport, ops, call)
    tables = cp.cached(ExchangeTables, layer, lambda: build_exchange_tables(cp, config.block_size, n_slots, k))
    return Exchange(tables, options, transport, ops, cp, call, q.shape[1])


def forward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    scale: float,
    cp: CPContext,
    call: Call,
    given: Tensor | None = None,
    return_selection: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None], Pass | HeadPass]:
    """The forward pass of :func:`moba_attention` without autograd; a collective call.

    Args:
        given: [L, G, S] int32, ids of the blocks to attend to, each a candidate of its row and named once.

    Returns:
        out [L, Hq, D] in q's dtype, lse [L, Hq] wide, with ``return_selection`` block ids [L, G, S], what depends on
        the selection, and what :func:`backward_pass` is called with.
    """
    options = cp.exchange
    if options.mode in ("heads", "auto") or options.head_ranks is not None:
        moba = config.block_size, config.top_k
        key = q.shape[1:], k.shape[1], q.dtype, moba
        h = cp.cached(TeamSize, key, lambda: head_ranks(cp, q, k, moba)).h
        if h > 1:
            return _forward_of_heads(q, k, v, config, scale, cp, call, h, given, return_selection)
    geometry, comm, ops, where = cp.geometry(config.block_size), cp.comm, backend(q), call.where
    tables = owned_tables(cp, geometry, k.shape[1])
    k_rows, v_rows = assemble(k, v, geometry, comm, where) if geometry.straddles else (k, v)
    owned = owned_pages(k_rows, v_rows, tables, geometry)
    way = choose(q, k, config, cp, ops, call)
    way.start(owned, where)
    if given is None:
        block_indices = _select(q, k, k_rows, config, cp, geometry, tables, ops, call)
    else:
        block_indices = given
        send_tag(q, comm, call)
    way.plan(block_indices, owned)
    seen = Seen(block_indices, geometry.current_block, geometry.visible, scale)
    index = ops.routing_index(q, *seen[:3], geometry.any_row.expand(k.shape[1], -1))
    out, lse, saved, way = way.forward(Queries(q, seen, index), owned)
    out = out.to(q.dtype)
    comm.count_ring(k, 1, where)
    if cp.observer is not None:
        # Last, so that an observer that raises interrupts no collective.
        cp.observer(where.layer, block_indices, k.shape[1], config.block_size)
    made = Pass(scale, config.deterministic, call, comm, geometry, tables, way, ops)
    return out, lse, block_indices if return_selection else None, [block_indices, index, *saved], made


def _select(
    q: Tensor,
    k: Tensor,
    k_rows: Tensor,
    config: MoBAConfig,
    cp: CPContext,
    geometry: BlockGeometry,
    tables: OwnedTables,
    ops,
    call: Call,
) -> Tensor:
    """[L, G, S] int32, the blocks that this rank's rows choose; k_rows [L + X, Hkv, D]; a collective call."""
    gate, comm = config.gate, cp.comm
    if gate.score == "max":
        send_tag(q, comm, call)
        return select_by_keys(q, k, config, cp, geometry, ops, call.where)
    means = gather_means(k_rows, tables, geometry, ops, comm, call)
    how = gate.shared_by_group, gate.min_recent, gate.sink
    return ops.select_blocks(q, means, geometry.first, geometry.current_block, config.top_k, *how)


def send_tag(q: Tensor, comm: Communicator, call: Call) -> None:
    """Say which ``call`` this rank makes, where no block means do; a collective call."""
    if comm.size == 1:
        return
    with comm.on_comm_stream(comm.record_event(q)):
        tags = comm.all_gather_async(call.tag(q.device), "means", call.where, uncounted=TAG_BYTES)()
        call.arrive(HostCopy(tags))


def backward_pass(
    made: Pass | HeadPass,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    kept: list[Tensor | None],
    dout: Tensor,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in their inputs' dtype, from what :func:`forward_pass` returned; a collective call.

    Args:
        kept: routing indices among them may be missing (None): they are made again from the selection.
        delta: [L, Hq] wide, row sums of ``dout * out`` where they are known; then ``out`` is not needed.
    """
    if delta is None:
        delta = made.ops.row_sums(dout, out)
    if isinstance(made, HeadPass):
        dq, dk, dv = made.exchange.backward(kept, q, k, v, delta, lse, dout, made.call.enter_backward())
        made.call.comm.count_ring(k, 2, made.call.where)
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    block_indices, index, *saved = kept
    geometry, comm, way, where = made.geometry, made.comm, made.way, made.call.enter_backward()
    k_rows, v_rows = assemble(k, v, geometry, comm, where) if geometry.straddles else (k, v)
    owned = owned_pages(k_rows, v_rows, made.tables, geometry)
    way.start(owned, where, saved)
    seen = Seen(block_indices, geometry.current_block, geometry.visible, made.scale)
    if index is None:
        index = made.ops.routing_index(q, *seen[:3], geometry.any_row.expand(k.shape[1], -1))
    queries = Queries(q, seen, index)
    output = OutputGradient(dout, lse, delta, made.deterministic)
    dq, grads = way.backward(saved, queries, output, owned, where)
    dk, dv = assemble_backward(*grads, geometry, comm, where) if geometry.straddles else grads
    comm.count_ring(k, 2, where)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _forward_of_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    scale: float,
    cp: CPContext,
    call: Call,
    h: int,
    given: Tensor | None,
    return_selection: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Saved, HeadPass]:
    """:func:`forward_pass` where every ``h`` ranks exchange tokens for heads."""
    ops, comm, where = backend(q), cp.comm, call.where
    key = h, q.shape[1], k.shape[1:], k.dtype
    tables = cp.cached(HeadTables, key, lambda: build_head_tables(cp, h, q, k))
    selection = given
    if given is None and config.gate.shared and tables.shares_kv:
        # The heads of a group go to several ranks, and choose together before they part.
        geometry = cp.geometry(config.block_size)
        k_rows, _ = assemble(k, v, geometry, comm, where) if geometry.straddles else (k, v)
        owned = owned_tables(cp, geometry, k.shape[1])
        selection = _select(q, k, k_rows, config, cp, geometry, owned, ops, call)
    else:
        send_tag(q, comm, call)
    inner = tables.inner
    if inner.size == 1:
        attention = LocalMoBA(config, scale, inner, ops)
    else:
        attention = _MoBAOfHeads(config, scale, inner, where.layer, call.needs_grad)
    of_selection = []
    if selection is not None and selection.shape[2]:
        of_selection.append(Part(selection, selection.shape[1] != q.shape[1], selection.dtype))
    exchange = HeadExchange(team_transport(cp, key, tables), attention, cp.exchange.keep)
    out, lse, saved = exchange.forward(q, k, v, where, call.needs_grad, of_selection)
    made = HeadPass(call, exchange, ops)
    comm.count_ring(k, 1, where)
    if selection is None and (return_selection or cp.observer is not None):
        call.check()
        n_groups = config.gate.n_groups(q.shape[1], k.shape[1])
        selection = torch.empty(q.shape[0], n_groups, config.top_k - 1, dtype=torch.int32, device=q.device)
        by_messages, targets = Collectives(tables, comm), [Part(selection, config.gate.shared, selection.dtype)]
        of_stages = [saved[index - 1] for index in made.indices]
        for number, (units, part) in enumerate(zip(tables.stages, of_stages, strict=True)):
            stage = Stage(number, units)
            by_messages.give_back(stage, targets, slice(0, 1), [part], where)
            for event in by_messages.collect(stage):
                wait_for(event)
    if cp.observer is not None:
        call.check()
        cp.observer(where.layer, selection, k.shape[1], config.block_size)
    return out, lse, selection if return_selection else None, saved, made


class _MoBAOfHeads:
    """MoBA of some heads among the ranks that have them, see :class:`.heads.strategy.Attention`."""

    def __init__(self, config: MoBAConfig, scale: float, context: CPContext, layer: str, needs_grad: bool):
        self._config, self._scale, self._context, self._layer = config, scale, context, layer
        self._needs_grad = needs_grad
        self._made: list[Pass] = []

    def forward(
        self, number: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, given: Tensor | None = None
    ) -> tuple[Tensor, Saved]:
        """See :class:`.heads.strategy.Attention`; ``given`` as of :func:`forward_pass`."""
        cp, config = self._context, self._config
        cp.comm.layer = self._layer
        if given is not None:
            # What came here may be overwritten by the next stage but one, and this is saved.
            given = given.clone()
        call = enter(q, k, config, cp, self._needs_grad, self._needs_grad, given)
        result, lse, _, kept, made = forward_pass(q, k, v, config, self._scale, cp, call, given)
        self._made.append(made)
        out.copy_(result)
        return lse, kept

    def backward(self, number: int, saved: Saved, inputs, grads, dkdv_done) -> None:
        """See :class:`.heads.strategy.Attention`."""
        q, k, v, dout, lse, delta = inputs
        found = backward_pass(self._made[number], q, k, v, None, lse, saved, dout, delta)
        for target, grad in zip(grads, found, strict=True):
            target.copy_(grad)
        dkdv_done()


class _MoBAAcrossRanks(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, config: MoBAConfig, scale: float, cp: CPContext, call: Call, _anchor, given, asked: bool):
        out, lse, selection, kept, ctx.made = forward_pass(q, k, v, config, scale, cp, call, given, asked)
        # No tensors on ctx itself: activation checkpointing drops only what autograd has saved, and backward needs the
        # selection, the plan and the log-sum-exp of one and the same forward.
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        # What comes in must not go out as it is.
        selection = selection.clone() if selection is given and asked else selection
        ctx.mark_non_differentiable(lse, *([selection] if asked else []))
        return out, lse, selection

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout, *_):
        q, k, v, out, lse, *kept = ctx.saved_tensors
        return *backward_pass(ctx.made, q, k, v, out, lse, kept, dout), *[None] * 7


def gather_means(k: Tensor, tables: OwnedTables, geometry: BlockGeometry, ops, comm: Communicator, call: Call):
    """Mean key of every block of the sequence, [n, Hkv, D] in k's dtype; k [L + X, Hkv, D]; a collective call.

    The same message says which ``call`` this rank makes.
    """
    means = owned_means(k, tables, geometry, ops)
    if comm.size == 1:
        return means[geometry.local_index]
    message = torch.cat([means.view(-1).view(torch.uint8), call.tag(k.device)])
    arrived = comm.all_gather_async(message, "means", call.where, uncounted=TAG_BYTES)()
    call.arrive(HostCopy(arrived[:, means.nbytes :]))
    every = arrived[:, : means.nbytes].view(k.dtype).unflatten(1, means.shape)
    return every[geometry.owner, geometry.local_index]


def owned_means(k: Tensor, tables: OwnedTables, geometry: BlockGeometry, ops) -> Tensor:
    """Mean keys of the blocks that this rank owns, and zeros up to the most of any rank; k [L + X, Hkv, D]."""
    means = ops.block_means(k, tables.row, tables.length, geometry.block_size)
    if means.shape[0] < tables.most:
        means = torch.cat([means, means.new_zeros(tables.most - means.shape[0], *means.shape[1:])])
    return means


def owned_tables(cp: CPContext, geometry: BlockGeometry, n_kv: int) -> OwnedTables:
    """Built at the first call and kept with the context."""

    def build() -> OwnedTables:
        mine, most = geometry.owned[cp.rank], max(ids.numel() for ids in geometry.owned)
        head = torch.arange(n_kv, device=geometry.row.device, dtype=torch.int32)[:, None]
        table = geometry.row.expand(n_kv, -1), head.expand(-1, geometry.n_blocks)
        return OwnedTables(geometry.row[mine], geometry.length[mine], most, *table)

    return cp.cached(OwnedTables, (geometry.block_size, n_kv), build)


def owned_pages(k: Tensor, v: Tensor, tables: OwnedTables, geometry: BlockGeometry) -> Pages:
    """Pages of the blocks this rank owns; k, v [L + X, Hkv, D]."""
    return Pages(k, v, tables.page_row, tables.page_head, geometry.length, geometry.block_size)
