"""``moba-cp bench exchange``: bytes per rank of each exchange mode, for any number of ranks, on one machine.

The decisions are those of training (:mod:`moba_cp.cp.exchange.plan`, :mod:`moba_cp.cp.allgather.costs`), made for one
rank after another on selections from a gate; nothing is sent. Time per layer is predicted from these bytes and from the
speeds of links and kernels, as if communication and computation did not slow each other down. That holds for copy
engines; NCCL's kernels take a part of the GPU.

Legend: T tokens, P ranks, L = T / P, Hq query heads, Hkv key/value heads, D head dim, B block size, k top-k,
e bytes per element.
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from ..cp.allgather.costs import GatherCosts
from ..cp.exchange.costs import WireCosts
from ..cp.exchange.plan import decide
from ..cp.exchange.tables import build_decision_tables, number_dtype
from ..cp.geometry import BlockGeometry, build_geometry
from ..cp.heads.choice import Layer as HeadLayer
from ..cp.heads.choice import choose_team
from ..cp.heads.costs import HeadCosts
from ..cp.layout import positions_of, rank_segments
from ..cp.options import ExchangeOptions
from ..ops import integer_backend
from .chart import Curve, Panel, draw
from .gates import RecordedGate, SyntheticGate
from .links import Links
from .rows import Report, Row, Table, number
from .shape import GATES, Shape, whole_numbers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TABLE = Table(
    (
        ("ranks", 5, lambda row: str(row.ranks)),
        ("mode", 10, lambda row: row.name),
        ("GB", 9, number("predicted_gb", 3)),
        ("between", 9, number("between_gb", 3)),
        ("of ring", 9, number("of_ring", 3)),
        ("needed", 8, number("needed")),
        ("busiest", 9, number("busiest")),
        ("ms", 9, number("predicted_ms")),
        ("exposed", 9, number("exposed_ms")),
    )
)
# auto is a broad band under the others, so that it is seen where it equals one of them.
STYLES = {
    "auto": {"color": "tab:blue", "linewidth": 6, "alpha": 0.45, "markersize": 12},
    "kv": {"color": "tab:orange", "marker": "s"},
    "query": {"color": "tab:green", "marker": "^"},
    "allgather": {"color": "tab:red", "marker": "v"},
    "heads": {"color": "tab:purple", "marker": "D"},
}


def main(args: argparse.Namespace) -> int:
    """Print the table."""
    _check(args)
    if args.tokens is None:
        args.tokens = 1 << 20 if _device(args) == "cuda" else 1 << 16
    if args.gate in GATES:
        shape = Shape.of(args)
        gate = SyntheticGate(args.gate, shape.heads, shape.kv_heads, args.block_size, args.top_k, args.seed)
    else:
        gate = RecordedGate(args.gate, args.gate_layer)
        args.tokens, args.heads, n_slots = gate.selection.shape
        args.kv_heads, args.top_k, args.block_size = gate.n_kv, n_slots + 1, gate.block_size
        shape = Shape.of(args)
    modes, sizes = args.modes.split(","), whole_numbers("ranks", args.ranks)
    for mode in modes:
        ExchangeOptions(mode, row_weight=args.row_weight)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)}
    report = Report({}, settings, TABLE, args.json)
    title = f"{args.tokens} tokens, {shape}"
    print(f"{title}, {args.dtype}; per rank and layer, forward and backward\n{TABLE.header()}", flush=True)
    for size in sizes:
        for row in measure(size, gate, modes, args):
            report.add(row)
    if args.plot:
        draw(args.plot, panels(report.rows), title)
    return 0


def _check(args: argparse.Namespace) -> None:
    for speed in fields(Links):
        value, may_be_none = getattr(args, speed.name), speed.name.endswith("_us")
        if not (value > 0 or (may_be_none and value == 0)):
            least = "0 or more" if may_be_none else "above 0"
            raise ValueError(
                f"{speed.name.replace('_', '-')}={value:g} is not {least}; leave it out for {speed.default:g}"
            )
    for name, least in (("ranks_per_node", 1), ("nodes", 0)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"{name.replace('_', '-')}={value} is below {least}; use {least} or more")
    if args.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={args.device!r} is not one of auto, cpu, cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': PyTorch finds no GPU here; use auto or cpu")


def _device(args: argparse.Namespace) -> str:
    return args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def panels(rows: list[Row]) -> list[Panel]:
    """Bytes of each mode and of a dense ring against P."""
    ring = {row.ranks: row.predicted_gb / row.of_ring for row in rows if row.of_ring}
    curves = [Curve("dense ring", list(ring.items()), {"color": "black", "linestyle": "--", "marker": ""})]
    for mode in dict.fromkeys(row.name for row in rows):
        points = [(row.ranks, row.predicted_gb) for row in rows if row.name == mode]
        curves.append(Curve(mode, points, STYLES[mode]))
    return [Panel("ranks", "GB per rank and layer, forward and backward", curves)]


@dataclass(frozen=True)
class Counted:
    """A layer whose bytes are counted."""

    shape: Shape
    tokens: int
    dtype: torch.dtype
    options: ExchangeOptions
    """``ranks_per_node`` is set."""
    links: Links = Links()

    def by_mode(self, mode: str) -> "Counted":
        """The same layer in an exchange mode."""
        return replace(self, options=replace(self.options, mode=mode))

    def gather_costs(self, geometry: BlockGeometry) -> GatherCosts:
        """What all-gather moves; any rank's geometry serves."""
        by_copies = self.options.may_copy(len(geometry.owned))
        return GatherCosts(geometry, self.shape.kv_heads, self.shape.dim, self.dtype, self.options, by_copies)

    def exchanges_heads(self, size: int) -> bool:
        """Whether ``auto`` exchanges tokens for heads among all of ``size`` ranks."""
        options = self.options
        if options.mode != "auto" or size == 1 or not options.may_copy(size):
            return False
        return choose_team(self.head_layer(size), options).h == size

    def head_layer(self, size: int) -> HeadLayer:
        """What ``auto`` depends on there, on ``size`` ranks."""
        moba = self.shape.moba.block_size, self.shape.moba.top_k
        heads = self.shape.heads, self.shape.kv_heads
        return HeadLayer(size, self.tokens // size, heads, self.shape.dim, self.dtype, moba)

    def head_costs(self, size: int) -> HeadCosts:
        """What exchanging tokens for heads moves among ``size`` ranks."""
        heads = self.shape.heads, self.shape.kv_heads
        return HeadCosts(size, self.tokens // size, heads, self.shape.dim, self.dtype, self.options)

    def wire_costs(self, geometry: BlockGeometry) -> WireCosts:
        """What a token of a block costs, and a row."""
        ids = number_dtype(geometry, self.shape.kv_heads)
        return WireCosts.of(self.dtype, self.shape.dim, self.shape.moba.top_k - 1, self.options, ids)

    def compute_ms(self, n_local: int) -> float:
        """Forward and backward of ``n_local`` tokens: k - 1 whole blocks and half of the current one each."""
        heads, _, dim, block_size, top_k = self.shape.numbers
        flop = 4 * n_local * heads * dim * block_size * (top_k - 0.5)
        return 1e3 * flop * (1 + 2.5) / (self.links.tflops * 1e12)


@dataclass
class Asked:
    """What one rank's decision moves, in bytes of forward and backward."""

    total: int
    between: int
    """Rows to other nodes; blocks are counted per node."""
    fetch: torch.Tensor
    """[Hkv, n] bool, blocks that come to this rank."""
    needed: float


def measure(size: int, gate, modes: list[str], args: argparse.Namespace) -> list[Row]:
    """Rows of the table for ``size`` ranks."""
    device = _device(args)
    bounds = getattr(gate, "bounds", np.array([0, args.tokens]))
    segments = rank_segments(args.layout, args.tokens, size, bounds)
    options = ExchangeOptions(
        keep=args.keep,
        gradient_dtype=args.gradient_dtype,
        ranks_per_node=min(args.ranks_per_node, size),
        row_weight=args.row_weight,
        copy_engines=not args.no_copy_engines,
    )
    links = Links(**{speed.name: getattr(args, speed.name) for speed in fields(Links)})
    layer = Counted(Shape.of(args), args.tokens, DTYPES[args.dtype], options, links)
    n_nodes = -(-size // options.ranks_per_node)
    count = n_nodes if args.nodes == 0 else min(n_nodes, args.nodes)
    # From both ends, so that the early and the late ranks of a contiguous layout count alike.
    nodes = {round((i + 0.5) * n_nodes / count - 0.5) for i in range(count)}
    modes = [mode for mode in modes if mode != "heads" or layer.shape.heads % size == 0]
    asked: dict[str, dict[int, Asked]] = {mode: {} for mode in _counted(modes)}
    for rank in range(size):
        if rank // options.ranks_per_node in nodes:
            geometry = build_geometry(segments, rank, bounds, args.block_size, device)
            selection = gate(positions_of(segments[rank])).to(device)
            for mode in asked:
                asked[mode][rank] = ask(layer.by_mode(mode), rank, selection, geometry)
    return [_row(size, layer.by_mode(mode), asked, geometry) for mode in modes]


def predict(layer: Counted, asked: list[Asked], geometry: BlockGeometry) -> Row:
    """The row of the layer's mode from what each of all ranks asks; ``geometry`` is that of any of them."""
    size, mode = len(asked), layer.options.mode
    by_mode = {
        name: {
            rank: asked[rank] if name == mode else ask(layer.by_mode(name), rank, None, geometry)
            for rank in range(size)
        }
        for name in _counted([mode])
    }
    return _row(size, layer, by_mode, geometry)


def _counted(modes: list[str]) -> list[str]:
    """The modes of which bytes must be known: ``auto`` may end in all-gather."""
    return list(dict.fromkeys([*modes, "allgather"] if "auto" in modes else modes))


def ask(layer: Counted, rank: int, selection: torch.Tensor | None, geometry: BlockGeometry) -> Asked:
    """What ``rank`` asks of the others for its selection [L, Hq, k - 1]; ``geometry`` is its own.

    For ``allgather`` and ``heads`` the selection is not looked at, and any rank's geometry serves.
    """
    options, size = layer.options, len(geometry.owned)
    if options.mode == "heads":
        costs, nothing = layer.head_costs(size), torch.zeros_like(geometry.is_remote)
        total = costs.forward_bytes + costs.backward_bytes
        elsewhere = max(0, size - options.ranks_per_node) / (size - 1) if size > 1 else 0
        return Asked(total, round(total * elsewhere), nothing.expand(layer.shape.kv_heads, -1), 1.0)
    if options.mode == "allgather":
        total = layer.gather_costs(geometry).bytes_of(rank)
        return Asked(total, 0, (geometry.owner != rank).expand(layer.shape.kv_heads, -1), 1.0)
    costs, candidates = layer.wire_costs(geometry), layer.shape.kv_heads * max(1, int(geometry.remote_candidate.sum()))
    weighing = options.weighing(size)
    tables = build_decision_tables(geometry, layer.shape.kv_heads, 1, costs, weighing)
    decision = decide(selection, tables, options.mode, integer_backend(selection))
    ranks = torch.arange(size, device=selection.device)
    elsewhere = ranks // options.ranks_per_node != rank // options.ranks_per_node
    tokens = (decision.fetch * geometry.length.long()).sum(0)
    owner_fetch = torch.zeros_like(decision.cost).scatter_add_(0, geometry.owner, tokens)
    rows_between = int((decision.cost - owner_fetch * costs.kv_token)[elsewhere].sum())
    return Asked(int(decision.cost.sum()), rows_between, decision.fetch, int(decision.needed) / candidates)


def _between(layer: Counted, asked: dict[int, Asked], geometry: BlockGeometry) -> int:
    """Bytes that cross nodes for the ranks in ``asked``, which are all of their nodes; each block once per node."""
    per_node, total = layer.options.ranks_per_node, sum(one.between for one in asked.values())
    for node in {rank // per_node for rank in asked}:
        needed = torch.stack([one.fetch for rank, one in asked.items() if rank // per_node == node]).any(0)
        tokens = int((needed * (geometry.owner // per_node != node) * geometry.length).sum())
        total += tokens * layer.wire_costs(geometry).kv_token
    return total


def _row(size: int, layer: Counted, by_mode: dict[str, dict[int, Asked]], geometry: BlockGeometry) -> Row:
    """The row of the layer's mode from what ranks ask in every mode."""
    mode, shape, links = layer.options.mode, layer.shape, layer.links
    e, others, local = layer.dtype.itemsize, (size - 1) / size, layer.tokens // size
    plan = moves = by_mode[mode]
    n_ranks = len(plan)
    everything = layer.gather_costs(geometry)
    at_once = everything.at_once(local * shape.heads, shape.moba.top_k)
    planned = sum(one.total for one in plan.values()) / n_ranks
    by_heads = mode == "heads" or layer.exchanges_heads(size)
    if by_heads and mode == "auto":
        moves = {rank: ask(layer.by_mode("heads"), rank, None, geometry) for rank in plan}
    elif mode == "auto" and (at_once or everything.instead_of(planned * size)):
        moves = by_mode["allgather"]
    mean = sum(one.total for one in moves.values()) / n_ranks
    # Means are padded to the most blocks that any rank owns; requests have a byte for each (KV head, block).
    most = max(ids.numel() for ids in geometry.owned)
    means = (size - 1) * most * shape.kv_heads * shape.dim * e
    overhead = means + others * geometry.n_blocks * shape.kv_heads * (not at_once)
    if by_heads:
        # No rank asks another for anything.
        overhead = 0
    several_nodes = layer.options.ranks_per_node < size
    per_rank = mean + overhead
    between = _between(layer, moves, geometry) / n_ranks + (overhead if several_nodes else 0)
    ring = 3 * (size - 1) * local * 2 * shape.kv_heads * shape.dim * e
    compute = layer.compute_ms(local)
    by_copies = everything.by_copies and (by_heads or moves is by_mode.get("allgather"))
    within_gbps = links.copy_gbps if by_copies else links.within_gbps
    wire = between / links.between_gbps / 1e6 + max(0, per_rank - between) / within_gbps / 1e6
    latency = (links.between_latency_us if several_nodes else links.within_latency_us) / 1e3
    # Means and requests come before anything can overlap; the first messages of either direction too.
    exposed = max(0.0, wire - compute) + 4 * latency if size > 1 else 0.0
    if by_heads and size > 1:
        # Nothing hides how the first stage comes and the last one returns.
        exposed = max(exposed, wire / len(layer.head_costs(size).stages) + 4 * latency)
    return Row(
        "exchange",
        mode,
        layer.tokens,
        size,
        shape.numbers,
        predicted_gb=per_rank / 1e9,
        between_gb=between / 1e9,
        of_ring=per_rank / ring if ring else 0.0,
        needed=sum(one.needed for one in plan.values()) / n_ranks,
        busiest=max(one.total for one in moves.values()) / mean if mean else 1.0,
        predicted_ms=compute + exposed,
        exposed_ms=exposed,
    )
