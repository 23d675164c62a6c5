"""``moba-cp bench exchange``: bytes per rank of each exchange mode, for any number of ranks, on one machine.

The decisions are those of training (:mod:`moba_cp.cp.exchange.decide`, :mod:`moba_cp.cp.allgather.costs`), made for one
rank after another on selections from a gate; nothing is sent. Time per layer is predicted from these bytes, the links'
speeds and the kernels' speed: what travels and what is computed meanwhile are taken not to slow each other, which is
true of copy engines, while NCCL's kernels take a part of the GPU.

Legend: T tokens, P ranks, L = T / P, Hq query heads, Hkv key/value heads, D head dim, B block size, k top-k,
e bytes per element.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from ..config import MoBAConfig
from ..cp.allgather.costs import COPY_RATE, GatherCosts
from ..cp.exchange.decide import decide
from ..cp.exchange.dispatch import id_dtype
from ..cp.geometry import BlockGeometry, build_geometry
from ..cp.layout import positions_of, rank_segments
from ..cp.options import MODES, WIRE_DTYPES, ExchangeOptions, WireCosts
from .gates import GATES, RecordedGate, SyntheticGate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _speed(default: float, meaning: str):
    return field(default=default, metadata={"help": f"{meaning} (%(default)s)"})


@dataclass(frozen=True)
class Links:
    """Speeds for the prediction; the defaults are an H100 or H200 node with one 400 Gb/s card per GPU."""

    within_gbps: float = _speed(370.0, "GB/s per GPU and direction within a node")
    copy_gbps: float = _speed(COPY_RATE / 1e9, "GB/s that copy engines bring a GPU from the others of its node")
    between_gbps: float = _speed(48.0, "GB/s per GPU and direction between nodes")
    within_latency_us: float = _speed(30.0, "microseconds per collective within a node")
    between_latency_us: float = _speed(90.0, "microseconds per collective between nodes")
    tflops: float = _speed(
        320.0,
        "TFLOP/s of a layer's attention, routing included, forward and backward (2.5 times the operations): an H100 at "
        "131,072 tokens in blocks of 512",
    )


@dataclass(frozen=True)
class Row:
    """One line of the table: one layer, forward and backward, means over the ranks looked at."""

    ranks: int
    mode: str
    gb: float
    """GB that a rank receives, and as many that it sends; block means and requests included, tails of straddling blocks
    not."""
    between_gb: float
    """the part of it that crosses nodes, with each block once per node."""
    of_ring: float
    """bytes over those of a dense ring."""
    needed: float
    """share of the (KV head, block) pairs of other ranks that could be chosen that are needed."""
    busiest: float
    """bytes that the busiest rank asks for over the mean."""
    layer_ms: float
    """predicted time of the layer's attention."""
    exposed_ms: float
    """the part of it in which a GPU waits for the wire."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--ranks", default="2,4,8,16,32,64", help="numbers of ranks, by commas (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="T (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=128, help="head dim (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--layout", choices=("contiguous", "zigzag"), default="zigzag", help="default: %(default)s")
    parser.add_argument(
        "--gate", default="concentrated", help=f"{', '.join(GATES)}, or a file of recorded selections (%(default)s)"
    )
    parser.add_argument("--gate-layer", type=int, help="layer of a recorded selection (default: the middle one)")
    parser.add_argument("--modes", default=",".join(MODES), help="by commas (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep what was received for backward")
    parser.add_argument(
        "--gradient-dtype", choices=WIRE_DTYPES, default=ExchangeOptions.gradient_dtype, help="default: %(default)s"
    )
    parser.add_argument(
        "--row-weight",
        type=float,
        help="how much more a byte of rows counts in auto (default: 4 within a node, 1 between nodes)",
    )
    parser.add_argument("--ranks-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--no-copy-engines",
        dest="copy_engines",
        action="store_false",
        help="GPUs of a node do not map each other's memory, or are not to use it",
    )
    parser.add_argument(
        "--nodes", type=int, default=1, help="nodes to look at per P, evenly spaced; 0: all (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="where to count: cpu, cuda, or auto for a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    for speed in fields(Links):
        option = f"--{speed.name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=speed.default, help=speed.metadata["help"])
    parser.add_argument("--json", type=Path, help="write settings and table here")
    parser.add_argument("--plot", type=Path, help="write a chart of bytes against P here (PNG)")


def main(args: argparse.Namespace) -> int:
    """Print the table."""
    MoBAConfig(args.block_size, args.top_k)
    modes = args.modes.split(",")
    for mode in modes:
        ExchangeOptions(mode, row_weight=args.row_weight)
    if args.heads % args.kv_heads:
        raise ValueError(f"heads={args.heads} is not a multiple of kv-heads={args.kv_heads}")
    if args.gate in GATES:
        gate = SyntheticGate(args.gate, args.heads, args.kv_heads, args.block_size, args.top_k, args.seed)
    else:
        gate = RecordedGate(args.gate, args.gate_layer)
        args.tokens, args.heads, n_slots = gate.chosen.shape
        args.kv_heads, args.top_k, args.block_size = gate.n_kv, n_slots + 1, gate.block_size
    try:
        sizes = [int(size) for size in args.ranks.split(",")]
    except ValueError:
        raise ValueError(f"ranks={args.ranks!r} is not a list of whole numbers; use 2,8,64") from None
    rows = []
    print(_header(args))
    for size in sizes:
        for row in measure(size, gate, modes, args):
            rows.append(row)
            print(_line(row), flush=True)
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)}
        args.json.write_text(json.dumps({"settings": settings, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if args.plot:
        _plot(rows, args)
    return 0


@dataclass
class Asked:
    """What one rank's decision moves, in bytes of forward and backward."""

    total: int
    between: int
    """rows to other nodes; blocks are counted per node."""
    fetch: torch.Tensor | None
    """[Hkv, n] bool."""
    needed: float


def measure(size: int, gate, modes: list[str], args: argparse.Namespace) -> list[Row]:
    """Rows of the table for ``size`` ranks."""
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bounds = getattr(gate, "bounds", np.array([0, args.tokens]))
    segments = rank_segments(args.layout, args.tokens, size, bounds)
    per_node = min(args.ranks_per_node, size)
    n_nodes = -(-size // per_node)
    count = n_nodes if args.nodes == 0 else min(n_nodes, args.nodes)
    # From both ends, so that the early and the late ranks of a contiguous layout count alike.
    nodes = sorted({round((i + 0.5) * n_nodes / count - 0.5) for i in range(count)})
    sums = {mode: _Sums() for mode in _counted(modes)}
    for node in nodes:
        asked: dict[str, list[Asked]] = {mode: [] for mode in sums}
        geometry = None
        for rank in range(node * per_node, min(size, (node + 1) * per_node)):
            geometry = build_geometry(segments, rank, bounds, args.block_size, device)
            chosen = gate(positions_of(segments[rank])).to(device)
            for mode in sums:
                asked[mode].append(ask(rank, chosen, geometry, mode, per_node, args))
        for mode in sums:
            sums[mode].add_node(asked[mode], geometry, node, per_node, _costs(geometry, args))
    return [_row(size, mode, sums, geometry, n_nodes, args) for mode in modes]


def predict(size: int, mode: str, asked: list[Asked], geometry: BlockGeometry, args: argparse.Namespace) -> Row:
    """The row of ``mode`` from what each of all ``size`` ranks asks; ``geometry`` is that of any of them."""
    per_node = min(args.ranks_per_node, size)
    sums = {mode: _Sums() for mode in _counted([mode])}
    for first in range(0, size, per_node):
        ranks = range(first, min(size, first + per_node))
        for name in sums:
            node = [asked[p] if name == mode else ask(p, None, geometry, name, per_node, args) for p in ranks]
            sums[name].add_node(node, geometry, first // per_node, per_node, _costs(geometry, args))
    return _row(size, mode, sums, geometry, -(-size // per_node), args)


def _counted(modes: list[str]) -> list[str]:
    """The modes of which bytes must be known: ``auto`` may end in all-gather."""
    return list(dict.fromkeys([*modes, "allgather"] if "auto" in modes else modes))


class _Sums:
    """Totals over the nodes looked at."""

    def __init__(self):
        self.ranks, self.total, self.between, self.needed, self.busiest = 0, 0, 0, 0.0, 0

    def add_node(self, asked: list[Asked], geometry: BlockGeometry, node: int, per_node: int, costs: WireCosts) -> None:
        """``geometry`` is that of any rank of the node."""
        self.ranks += len(asked)
        self.total += sum(a.total for a in asked)
        self.needed += sum(a.needed for a in asked)
        self.busiest = max(self.busiest, *(a.total for a in asked), 0)
        elsewhere = geometry.owner // per_node != node
        union = torch.stack([a.fetch for a in asked]).any(0) & elsewhere
        self.between += sum(a.between for a in asked) + int((union * geometry.length).sum()) * costs.kv_token


def _options(mode: str, per_node: int, args) -> ExchangeOptions:
    return ExchangeOptions(
        mode,
        keep=args.keep,
        gradient_dtype=args.gradient_dtype,
        ranks_per_node=per_node,
        row_weight=args.row_weight,
        copy_engines=args.copy_engines,
    )


def _costs(geometry: BlockGeometry, args) -> WireCosts:
    options = _options("auto", 1, args)
    return WireCosts.of(DTYPES[args.dtype], args.dim, args.top_k - 1, options, id_dtype(geometry, args.kv_heads))


def _gather_costs(geometry: BlockGeometry, mode: str, per_node: int, args) -> GatherCosts:
    options = _options(mode, per_node, args)
    by_copies = options.may_copy(len(geometry.owned))
    return GatherCosts(geometry, args.kv_heads, args.dim, DTYPES[args.dtype], options, by_copies)


def ask(rank: int, chosen: torch.Tensor | None, geometry: BlockGeometry, mode: str, per_node: int, args) -> Asked:
    """What ``rank`` asks of the others for its selection ``chosen`` [L, Hq, S]; ``geometry`` is its own.

    For ``allgather`` nothing need be chosen, and any rank's geometry serves.
    """
    if mode == "allgather":
        total = _gather_costs(geometry, mode, per_node, args).bytes_of(rank)
        return Asked(total, 0, (geometry.owner != rank).expand(args.kv_heads, -1), 1.0)
    costs, candidates = _costs(geometry, args), args.kv_heads * max(1, int(geometry.remote_candidate.sum()))
    weighing = _options(mode, per_node, args).weighing(len(geometry.owned))
    decision = decide(chosen, geometry, args.kv_heads, 1, costs, mode, weighing, rank)
    elsewhere = torch.arange(len(geometry.owned), device=chosen.device) // per_node != rank // per_node
    tokens = (decision.fetch * geometry.length.long()).sum(0)
    owner_fetch = torch.zeros_like(decision.cost).scatter_add_(0, geometry.owner, tokens)
    rows_between = int((decision.cost - owner_fetch * costs.kv_token)[elsewhere].sum())
    return Asked(int(decision.cost.sum()), rows_between, decision.fetch, int(decision.needed) / candidates)


def _row(
    size: int, mode: str, all_sums: dict[str, _Sums], geometry: BlockGeometry, n_nodes: int, args: argparse.Namespace
) -> Row:
    e, links = DTYPES[args.dtype].itemsize, Links(**{f.name: getattr(args, f.name) for f in fields(Links)})
    others, local = (size - 1) / size, args.tokens // size
    sums = plan = all_sums[mode]
    everything = _gather_costs(geometry, mode, min(args.ranks_per_node, size), args)
    at_once = everything.at_once(local * args.heads, args.top_k)
    if mode == "auto" and (at_once or everything.instead_of(plan.total / plan.ranks * size)):
        sums = all_sums["allgather"]
    # Means are padded to the most blocks that any rank owns; requests have a byte for each (KV head, block).
    most = max(ids.numel() for ids in geometry.owned)
    means = (size - 1) * most * args.kv_heads * args.dim * e
    overhead = means + others * geometry.n_blocks * args.kv_heads * (not at_once)
    per_rank = sums.total / sums.ranks + overhead
    between = sums.between / sums.ranks + (overhead if n_nodes > 1 else 0)
    ring = 3 * (size - 1) * local * 2 * args.kv_heads * args.dim * e
    compute = _compute_ms(local, args, links)
    by_copies = everything.by_copies and sums is all_sums.get("allgather")
    within_gbps = links.copy_gbps if by_copies else links.within_gbps
    wire = between / links.between_gbps / 1e6 + max(0, per_rank - between) / within_gbps / 1e6
    latency = (links.between_latency_us if n_nodes > 1 else links.within_latency_us) / 1e3
    # Means and requests come before anything can overlap; the first messages of either direction too.
    exposed = max(0.0, wire - compute) + 4 * latency if size > 1 else 0.0
    busiest = sums.busiest / (sums.total / sums.ranks) if sums.total else 1.0
    return Row(
        ranks=size,
        mode=mode,
        gb=per_rank / 1e9,
        between_gb=between / 1e9,
        of_ring=per_rank / ring if ring else 0.0,
        needed=plan.needed / plan.ranks,
        busiest=busiest,
        layer_ms=compute + exposed,
        exposed_ms=exposed,
    )


def _compute_ms(local: int, args, links: Links) -> float:
    """Block attention of ``local`` tokens, forward and backward: k - 1 whole blocks and half of the own one each."""
    flop = 4 * local * args.heads * args.dim * args.block_size * (args.top_k - 0.5)
    return 1e3 * flop * (1 + 2.5) / (links.tflops * 1e12)


def _header(args) -> str:
    return (
        f"{args.tokens} tokens, {args.heads} heads ({args.kv_heads} KV), D={args.dim}, B={args.block_size}, "
        f"k={args.top_k}, {args.dtype}, {args.layout}, gate {args.gate}; per rank and layer, forward and backward\n"
        f"{'ranks':>5} {'mode':>9} {'GB':>8} {'between':>8} {'of ring':>8} {'needed':>7} {'busiest':>8} "
        f"{'ms':>8} {'exposed':>8}"
    )


def _line(row: Row) -> str:
    return (
        f"{row.ranks:5d} {row.mode:>9} {row.gb:8.3f} {row.between_gb:8.3f} {row.of_ring:8.3f} {row.needed:7.2f} "
        f"{row.busiest:8.2f} {row.layer_ms:8.2f} {row.exposed_ms:8.2f}"
    )


def _plot(rows: list[Row], args) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    sizes = sorted({row.ranks for row in rows})
    ring = [next(row.gb / row.of_ring for row in rows if row.ranks == size and row.of_ring) for size in sizes]
    axes.plot(sizes, ring, "k--", label="dense ring")
    for mode in dict.fromkeys(row.mode for row in rows):
        axes.plot(sizes, [row.gb for row in rows if row.mode == mode], marker="o", label=mode)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("ranks")
    axes.set_ylabel("GB per rank and layer, forward and backward")
    axes.set_title(f"{args.tokens} tokens, B={args.block_size}, k={args.top_k}, gate: {Path(args.gate).name}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.plot, dpi=150)
