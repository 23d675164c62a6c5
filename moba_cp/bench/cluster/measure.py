"""Attention on the first P ranks: all candidates in turn, and MoBA with and without communication.

Legend: T tokens, P ranks, L = T / P local tokens, Hq query heads, Hkv key/value heads, D head dim.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import CPContext, full_attention, moba_attention
from ...cp.options import ExchangeOptions
from ...cp.symmetric_memory import PeerMemory, peer_memory
from ..judge import BOUND
from ..rows import Row
from ..shape import Shape
from ..timing import Candidate, time_passes
from ..torch_cp import ROTATE_METHODS, torch_context_parallel
from .inputs import make_inputs
from .modes import exchange_options
from .ranks import Ranks
from .replay import ReplayCommunicator

MOBA, FULL, TORCH = "moba", "full", "torch"
PASS_FLOPS = 450e12
"""FLOP/s assumed of dense attention on one GPU where nothing was measured yet."""


@dataclass(frozen=True)
class Limits:
    """How long measuring may take."""

    repeats: int
    most_ms: float
    """A pass (forward and backward) that would take longer is not measured."""
    budget_ms: float = 3000.0
    """No more repeats of a candidate after so many ms, but at least two."""


class Layer:
    """One layer's inputs on the first P ranks, and ways to attend to them; collective over these ranks."""

    def __init__(self, shape: Shape, n_tokens: int, size: int, ranks: Ranks):
        self.shape, self.n_tokens, self.size, self.ranks = shape, n_tokens, size, ranks
        self.comm = ReplayCommunicator(ranks.group(size) if size > 1 else None)
        # One node, unless the launcher says otherwise.
        self.per_node = self.comm.ranks_per_node() or size
        cp = self.context(ExchangeOptions())
        self.shard = cp.shard
        q, k, v, self.dout = make_inputs(shape, n_tokens, cp.positions, ranks.device)
        self.leaves = [x.requires_grad_() for x in (q, k, v)]
        self._torch_leaves: list[Tensor] | None = None
        self._mesh = None

    def context(self, options: ExchangeOptions, observer=None) -> CPContext:
        """The context with an exchange of its own; all count with one communicator."""
        return CPContext(
            self.comm, self.shape.layout, self.n_tokens, device=self.ranks.device, exchange=options, observer=observer
        )

    def moba(self, mode: str, name: str | None = None, observer=None) -> Candidate:
        """MoBA in one exchange mode; on one rank as on any single GPU."""
        cp = self.context(exchange_options(mode, self.per_node), observer) if self.size > 1 else None

        def forward() -> Tensor:
            return moba_attention(*self.leaves, self.shape.moba, cp=cp)

        return Candidate(name or f"{MOBA} {mode}", forward, self.dout, self.leaves)

    def full(self, method: str = "auto", name: str = FULL) -> Candidate:
        """Our full attention, by the kernels that it chooses."""
        cp = self.context(ExchangeOptions()) if self.size > 1 else None
        return Candidate(name, lambda: full_attention(*self.leaves, cp=cp, method=method), self.dout, self.leaves)

    def torch(self) -> list[Candidate]:
        """PyTorch's attention by cuDNN: its context_parallel by both rotate methods; on one rank by itself."""
        if not self.ranks.on_gpu or self.shape.layout != "zigzag":
            return []
        if self._torch_leaves is None:
            heads_first = [x.detach().transpose(0, 1)[None].contiguous() for x in (*self.leaves, self.dout)]
            self._torch_leaves = [x.requires_grad_() for x in heads_first[:3]] + heads_first[3:]
        *leaves, dout = self._torch_leaves
        options = {"enable_gqa": True} if self.shape.heads != self.shape.kv_heads else {}

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(*leaves, is_causal=True, **options)

        if self.size == 1:
            inside = functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
            return [Candidate(f"{TORCH} cudnn", forward, dout, leaves, inside)]
        if self._mesh is None:
            from torch.distributed.device_mesh import DeviceMesh

            self._mesh = DeviceMesh.from_group(self.ranks.group(self.size), "cuda")
        return [
            Candidate(
                f"{TORCH} {method}", forward, dout, leaves,
                functools.partial(torch_context_parallel, self._mesh, self.n_tokens, method),
            )
            for method in ROTATE_METHODS
        ]  # fmt: skip

    def disagreement(self, ours: Candidate, theirs: Candidate) -> str | None:
        """How far the output of PyTorch's attention is from ours, if it is too far."""
        with torch.no_grad():
            mine = ours.forward()
            with theirs.inside():
                other = theirs.forward()[0].transpose(0, 1)
        error = self.ranks.most(_difference(other, mine), self.size)
        return None if error < BOUND else f"wrong: the output differs from ours by {error:.1e}"

    def peers(self) -> PeerMemory | None:
        """The memory that copy engines use; ranks on several nodes have none."""
        return peer_memory(self.comm) if self.per_node >= self.size else None

    def row(self, part: str, name: str) -> Row:
        """An empty row."""
        return Row(part, name, self.n_tokens, self.size, self.shape.numbers)


def measure(
    layer: Layer, part: str, candidates: list[Candidate], limits: Limits, estimate: Callable[[str], float]
) -> list[Row]:
    """A row for each candidate; collective over the layer's ranks.

    ``estimate(name)`` is how many ms forward and backward may take; what takes too long, or fails, gets a note.
    """
    rows = {candidate.name: layer.row(part, candidate.name) for candidate in candidates}
    able = []
    for candidate in candidates:
        row, expected = rows[candidate.name], estimate(candidate.name)
        if expected > limits.most_ms:
            row.note = f"skipped: about {expected:.0f} ms, more than {limits.most_ms:.0f}"
            continue
        row.note = _warm(layer, candidate, row) or ""
        if not row.note:
            able.append(candidate)
    for name, times in in_turn(layer, [c.name for c in able], able, limits).items():
        rows[name].fill(*times)
    return list(rows.values())


def _warm(layer: Layer, candidate: Candidate, row: Row) -> str | None:
    """First forward and backward pass: compiles, counts bytes and memory; what went wrong on any rank."""
    ranks, comm, size = layer.ranks, layer.comm, layer.size
    problem = None
    for x in candidate.leaves:
        x.grad = None
    comm.reset_counters()
    shared = layer.peers()
    stages = shared.stages if shared is not None else 0
    if ranks.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        time_passes(candidate, True)
    except Exception as error:  # out of memory, or PyTorch's attention cannot run: a result too
        lines = str(error).strip().splitlines()
        problem = f"failed: {type(error).__name__}: {lines[0][:120] if lines else ''}"
        del error
    problem = ranks.problem(problem, size)
    if problem is not None:
        return problem
    if not candidate.name.startswith(TORCH):
        row.received_gb = ranks.total(sum(comm.counters.received.values()), size) / size / 1e9
    if ranks.on_gpu:
        # What other GPUs map was allocated once, of the largest size so far, outside of PyTorch's allocator.
        mapped = shared.nbytes_since(stages) if shared is not None and shared.stages > stages else 0
        peak = torch.cuda.max_memory_allocated() - before + mapped
        row.peak_gib = ranks.most(peak / 2**30, size)
    return None


def in_turn(
    layer: Layer, names: list[str], candidates: list[Candidate], limits: Limits
) -> dict[str, list[list[float]]]:
    """Times [forward, forward + backward] of warm candidates, of the slowest rank each; collective over the layer's
    ranks. Candidates take turns, so that changes of the clock affect all of them alike."""
    ready = layer.ranks.ready(layer.size)
    times: dict[str, list[list[float]]] = {name: [[], []] for name in names}
    for repeat in range(limits.repeats):
        for name, candidate in zip(names, candidates, strict=True):
            if repeat >= 2 and sum(map(sum, times[name])) > limits.budget_ms:
                continue
            for measured, backward in zip(times[name], (False, True), strict=True):
                (mine,) = time_passes(candidate, backward, before=ready)
                measured.append(layer.ranks.most(mine, layer.size))
    for candidate in candidates:
        for x in candidate.leaves:
            x.grad = None
    return times


def overlap(layer: Layer, candidate: Candidate, limits: Limits) -> Row:
    """A row with communication and with its replay from memory; collective over the layer's ranks."""
    row, ranks, comm = layer.row("overlap", candidate.name), layer.ranks, layer.comm
    try:
        row.note = _record(layer, candidate, row) or ""
        if not row.note:
            off = Candidate(candidate.name, candidate.forward, candidate.dout, candidate.leaves, comm.replaying)
            times = in_turn(layer, ["on", "off"], [candidate, off], limits)
            row.fill(*times["off"])
            row.off_forward, row.off_both = row.forward, row.both
            row.fill(*times["on"])
    finally:
        comm.forget()
        if ranks.on_gpu:
            torch.cuda.empty_cache()
    return row


def _record(layer: Layer, candidate: Candidate, row: Row) -> str | None:
    """Record a pass and play it back; what went wrong on any rank."""
    ranks, comm, problem = layer.ranks, layer.comm, None
    if ranks.on_gpu:
        # What collectives and copies hand out is kept, and results twice.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        comm.handed_bytes = 0
        candidate.results()
        need = comm.handed_bytes + 2 * sum(x.nbytes for x in (layer.dout, *layer.leaves))
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()
        short = ranks.most(need - free, layer.size)
        if short > 0:
            return f"memory is short by {short / 2**30:.1f} GiB for a recording"
    try:
        with comm.recording():
            wanted = candidate.results()
        # A replay does not wait for the others before it writes what they may still be reading.
        ranks.settle(layer.size)
        with comm.replaying():
            errors = [_difference(a, b) for a, b in zip(candidate.results(), wanted, strict=True)]
        row.off_error = max(errors)
    except torch.OutOfMemoryError:
        problem = "out of memory while recording"
    problem = ranks.problem(problem, layer.size)
    if problem is None:
        row.off_error = ranks.most(row.off_error, layer.size)
        # Sums by atomics differ from run to run by a rounding of bfloat16.
        if not row.off_error <= (BOUND if ranks.on_gpu else 0.0):
            problem = f"wrong: without communication results differ by {row.off_error:.1e}"
    return problem


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value, without a wide copy of either."""
    return ((a - b).abs().max().float() / b.abs().max().float().clamp(min=1e-30)).item()


def dense_estimate(layer: Layer, name: str, before: list[Row]) -> float:
    """ms that a forward and a backward pass of dense attention may take; 0 on a CPU, of which nothing is known.

    By the square of T from what it took ``before``, otherwise by its FLOPs.
    """
    n_tokens, size = layer.n_tokens, layer.size
    for row in reversed(before):
        if (row.part, row.name, row.ranks) == ("attention", name, size) and row.both is not None:
            return row.both * (n_tokens / row.tokens) ** 2
    flop = 3.5 * 2 * n_tokens**2 * layer.shape.heads * layer.shape.dim
    return 1e3 * flop / (size * PASS_FLOPS) if layer.ranks.on_gpu else 0.0
