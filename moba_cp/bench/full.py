"""What one rank computes of full attention under context parallelism, beside dense attention on one device.

The ring runs as on P ranks, but its transfers are instant: shards of other ranks lie ready, so that times are those of
computing alone, and outputs are those of a real rank and can be checked. PyTorch's own ``context_parallel`` runs
likewise, over a process group that moves nothing. A quarter (1 / P) of the dense time is what a rank could reach.

Legend: T tokens of the sequence, P ranks, L = T / P local tokens, Hq query heads, Hkv key/value heads, D head dim.
"""

import argparse
import contextlib
import functools
import json
import statistics
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import CPContext, dense, full_attention
from ..cp.comm import Communicator
from ..cp.layout import LAYOUTS
from .environment import environment
from .timing import Candidate, time_once
from .torch_cp import ROTATE_METHODS, torch_context_parallel

CHECKED_ROWS = 32
HEAT_MS = 300.0


@dataclass
class Row:
    """One line of the table; times in ms, medians."""

    name: str
    forward: float
    forward_backward: float
    spread: float
    """largest minus smallest forward + backward time over the repetitions."""
    share: float | None = None
    """forward time over 1 / P of the dense one."""
    share_backward: float | None = None
    """the same of forward + backward."""
    shards: float | None = None
    """peak memory of the forward pass above inputs and results, in KV shards."""


class InstantRing(Communicator):
    """Rank ``rank`` of ``size`` in a full-attention ring whose transfers are instant.

    K and V of the other ranks were put there beforehand; gradients come from nowhere and count as zero.
    """

    def __init__(self, rank: int, size: int):
        super().__init__(None)
        self.rank, self.size = rank, size
        self.arrivals: list[Tensor] = []
        """K, V of the rank before, of the one before that, and so on."""
        self._next = 0
        self._gradients: dict[int, Tensor] = {}

    def fill(self, k: Tensor, v: Tensor, positions: list[Tensor]) -> None:
        """Put the shards of k, v [T, Hkv, D] there; ``positions`` [L] are those of every rank's tokens."""
        for step in range(1, self.size):
            source = positions[(self.rank - step) % self.size].to(k.device)
            self.arrivals += [k[source], v[source]]

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int], kind: str):
        """See :meth:`Communicator.all_to_all`; messages of a pass arrive in the order of ``arrivals``."""
        if kind == "full_kv":
            arrived = self.arrivals[self._next % len(self.arrivals)]
            self._next += 1
            return lambda: arrived
        # Made once: the ring adds to it, which must cost what it costs, and filling it is no part of that.
        rows = sum(receive)
        if rows not in self._gradients:
            self._gradients[rows] = x.new_zeros(rows, *x.shape[1:])
        return lambda: self._gradients[rows]


class CopyingRing(InstantRing):
    """An :class:`InstantRing` whose messages take memory of their own from the moment they are asked for."""

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int], kind: str):
        """See :meth:`Communicator.all_to_all`."""
        arrived = super().all_to_all(x, send, receive, kind)().clone()
        return lambda: arrived


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``moba-cp bench full``."""
    parser.add_argument("--tokens", type=int, default=131072, help="T, tokens of the whole sequence")
    parser.add_argument("--ranks", type=int, default=4, help="P")
    parser.add_argument("--rank", type=int, action="append", help="ranks to measure (default: first and last)")
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as query heads)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layout", choices=LAYOUTS, default="zigzag")
    parser.add_argument("--backend", action="append", help="local kernels (default: auto and each that can serve)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write rows and environment to this file")


def main(args: argparse.Namespace) -> int:
    """Check, measure, print a table; 1 if a check fails."""
    if not torch.cuda.is_available():
        raise SystemExit("bench full needs a CUDA device")
    torch.manual_seed(0)
    shapes = [args.heads, args.kv_heads or args.heads, args.kv_heads or args.heads, args.heads]
    q, k, v, dout = (torch.randn(args.tokens, h, args.head_dim, device="cuda", dtype=torch.bfloat16) for h in shapes)
    dense_one = _dense(q, k, v, dout)
    out = dense_one.forward()
    out.backward(dout)
    dense_results = [out.detach(), dense_one.leaves[0].grad.clone()]
    del out

    rows = []
    for rank in args.rank or sorted({0, args.ranks - 1}):
        candidates = [dense_one]
        for backend in args.backend or _backends(q):
            candidate, error = _one_rank(q, k, v, dout, rank, args, backend, dense_results)
            candidates.append(candidate)
            if error:
                print(f"{candidate.name}: {error}; nothing is published")
                return 1
        with _instant_group(rank, args.ranks):
            rows += _timed(candidates + _context_parallel(q, k, v, dout, rank, args), args)
    _print(rows, args)
    if args.json:
        with open(args.json, "w") as file:
            report = {"environment": environment(), "options": vars(args), "rows": [asdict(row) for row in rows]}
            json.dump(report, file, indent=1)
    return 0


def _backends(q: Tensor) -> list[str]:
    return [name for name, b in dense.BACKENDS.items() if name != "plain" and b.refusal(q, False) is None]


def _timed(candidates: list[Candidate], args) -> list[Row]:
    """Rows of the candidates, the first of which is the dense one.

    All in turn, and each right after work of its own kind: under a power limit clocks follow the load of the last
    tenths of a second, so that whoever came after lighter kernels would run faster.
    """
    times = {(c.name, backward): [] for c in candidates for backward in (False, True)}
    failed = set()
    for repeat in range(args.repeats):
        first = repeat % len(candidates)
        for candidate in candidates[first:] + candidates[:first]:
            if candidate.name in failed:
                continue
            try:
                # The first time this also plans, compiles and takes memory.
                _heat(candidate)
                for backward in (False, True):
                    times[candidate.name, backward].append(time_once(candidate, backward))
            except Exception as error:  # a peer that cannot run is a result too
                print(f"{candidate.name}: {type(error).__name__}: {error}")
                failed.add(candidate.name)
    rows = []
    for candidate in candidates:
        if candidate.name in failed:
            continue
        forward, both = times[candidate.name, False], times[candidate.name, True]
        medians = statistics.median(forward), statistics.median(both)
        row = Row(candidate.name, *medians, max(both) - min(both), shards=candidate.shards)
        if rows:
            row.share = row.forward * args.ranks / rows[0].forward
            row.share_backward = row.forward_backward * args.ranks / rows[0].forward_backward
        rows.append(row)
    return rows


def _heat(candidate: Candidate) -> None:
    """Run the candidate for ``HEAT_MS``, untimed."""
    spent = 0.0
    while spent < HEAT_MS:
        spent += time_once(candidate, True)


def _dense(q, k, v, dout) -> Candidate:
    """PyTorch's attention on one device by cuDNN; gives [T, Hq, D]."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}

    def forward() -> Tensor:
        heads_first = [x.transpose(0, 1)[None] for x in leaves]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, **options)
        return out[0].transpose(0, 1)

    return Candidate("dense, one device (cuDNN)", forward, dout, leaves)


def _one_rank(q, k, v, dout, rank: int, args, backend: str, dense_results) -> tuple[Candidate, str | None]:
    """Our ring on one rank, and what is wrong with its output if anything is."""
    comm = InstantRing(rank, args.ranks)
    cp = CPContext(comm, args.layout, args.tokens, device=q.device)
    comm.fill(k, v, cp.rank_positions())
    leaves = [cp.shard(x).requires_grad_() for x in (q, k, v)]
    dout = cp.shard(dout)

    def forward() -> Tensor:
        return full_attention(*leaves, cp=cp, method="ring", backend=backend)

    out = forward()
    out.backward(dout)
    error = _wrong(q, k, v, cp, out.detach(), leaves[0].grad, dout, dense_results)
    del out
    name = f"moba_cp ring, rank {rank} of {args.ranks} ({backend})"
    return Candidate(name, forward, dout, leaves, shards=_forward_memory(leaves, cp, backend)), error


def _forward_memory(leaves: list[Tensor], cp: CPContext, backend: str) -> float:
    """Peak of the ring's forward pass above its inputs and results, in KV shards.

    Shards are copied as they arrive, as on real ranks. Results are what any joined attention holds: the joined output
    in float32, one step's output, and their log-sum-exps.
    """
    q, k, v = (x.detach() for x in leaves)
    comm = CopyingRing(cp.rank, cp.size)
    comm.arrivals = cp.comm.arrivals
    copying = CPContext(comm, cp.layout, cp.seq_len, device=q.device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    full_attention(q, k, v, cp=copying, method="ring", backend=backend)
    torch.cuda.synchronize()
    results = 3 * q.nbytes + 2 * 4 * q.shape[0] * q.shape[1]
    return (torch.cuda.max_memory_allocated() - before - results) / (k.nbytes + v.nbytes)


def _wrong(q, k, v, cp, out, dq, dout, dense_results) -> str | None:
    """What is wrong with sampled rows of out and dq, against float64 and by the error of the dense kernels."""
    local = torch.linspace(0, cp.local_len - 1, CHECKED_ROWS, device=q.device).long()
    position = cp.positions[local]
    exact = _exact_rows(q, k, v, position, dout[local])
    for name, ours, plain, want, factor in zip(("out", "dq"), (out, dq), dense_results, exact, (2, 3)):
        error, allowed = ((x.double() - want).abs().max().item() for x in (ours[local], plain[position]))
        if not error <= factor * allowed + 1e-5:
            return f"{name} is off by {error:.2e}, dense attention by {allowed:.2e}"
    return None


def _exact_rows(q, k, v, position: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """out and dq [rows, Hq, D] in float64 of the rows at ``position``, whose output gradients are ``dout``."""
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    outs, dqs = [], []
    seen = torch.arange(k.shape[0], device=k.device) <= position[:, None]
    for head in range(q.shape[1]):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        do = dout[:, head].double()
        prob = (q[position, head].double() @ keys.T * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        out = prob @ values
        dscore = prob * (do @ values.T - (do * out).sum(-1, keepdim=True)) * scale
        outs.append(out)
        dqs.append(dscore @ keys)
    return torch.stack(outs, 1), torch.stack(dqs, 1)


@contextlib.contextmanager
def _instant_group(rank: int, size: int):
    """A process group of ``size`` ranks that moves nothing and waits for nobody."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _context_parallel(q, k, v, dout, rank: int, args) -> list[Candidate]:
    """PyTorch's context_parallel by both ways of moving K and V: the same steps, no wire, meaningless output."""
    n_local = args.tokens // args.ranks
    leaves = [x[:n_local].transpose(0, 1)[None].clone().requires_grad_() for x in (q, k, v)]
    grad = dout[:n_local].transpose(0, 1)[None].contiguous()
    options = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(*leaves, is_causal=True, **options)

    name = f"torch context_parallel, rank {rank} of {args.ranks}"
    return [
        Candidate(f"{name} ({method})", forward, grad, leaves, functools.partial(_torch_ring, args, method))
        for method in ROTATE_METHODS
    ]


@contextlib.contextmanager
def _torch_ring(args, method: str):
    from torch.distributed.device_mesh import init_device_mesh

    with torch_context_parallel(init_device_mesh("cuda", (args.ranks,)), args.tokens, method):
        with _instant_transfers(args.ranks):
            yield


@contextlib.contextmanager
def _instant_transfers(size: int):
    """PyTorch's collectives as its context_parallel calls them give back what was sent.

    A process group that moves nothing leaves what was in memory before: often zeros, with which a GPU runs faster.
    """
    from torch.distributed import _functional_collectives as collectives

    gathered: dict[torch.Size, Tensor] = {}

    def gather(x: Tensor, gather_dim: int, group) -> Tensor:
        if x.shape not in gathered:
            gathered[x.shape] = torch.cat([x] * size, gather_dim)
        return gathered[x.shape]

    replaced = {"permute_tensor": lambda x, destinations, group: x}
    replaced |= {name: gather for name in ("all_gather_single", "all_gather_tensor") if hasattr(collectives, name)}
    before = {name: getattr(collectives, name) for name in replaced}
    for name, function in replaced.items():
        setattr(collectives, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(collectives, name, function)


def _print(rows: list[Row], args) -> None:
    env = environment()
    print(
        f"{env['gpu']}, torch {env['torch']}, cuDNN {env['cudnn']}, commit {env['commit']}; bf16, causal, {args.layout}"
    )
    print(f"T = {args.tokens}, {args.heads} heads, D = {args.head_dim}, P = {args.ranks}; ms, median of {args.repeats}")
    print(f"{'':58}{'fwd':>8}{'fwd+bwd':>9}{'spread':>8}   of dense / P   KV shards")
    for row in rows:
        share = f"{row.share:6.3f} {row.share_backward:6.3f}" if row.share else ""
        shards = f"{row.shards:10.2f}" if row.shards is not None else ""
        print(f"{row.name:58}{row.forward:8.1f}{row.forward_backward:9.1f}{row.spread:8.1f}   {share}{shards}")
