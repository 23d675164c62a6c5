"""CPContext: a sequence, its documents and the ranks it is spread over."""

import hashlib
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..blocks import check_cu_seqlens, fitted_block_size
from ..host import to_device
from .comm import Communicator
from .counters import Counters
from .geometry import BlockGeometry, build_geometry
from .layout import Layout, Segments, check_layout, positions_of, rank_segments
from .options import ExchangeOptions, Mode
from .sharing import check_length, unshard
from .symmetric_memory import PeerMemory, peer_memory, team_memory

T = TypeVar("T")


class CPContext:
    """How one (packed) sequence is spread over the ranks of a context-parallel group.

    Built once per batch, on every rank with equal arguments, and passed to :func:`moba_cp.moba_attention` and
    :func:`moba_cp.full_attention`. Its attributes do not change. What it starts and allocates is its own or the
    group's, so a program may make as many as it has batches.

    Not a dataclass: FSDP's mixed precision takes the dataclasses among a module's arguments apart and builds them anew.

    Args:
        group: the process group whose ranks share the sequence; or a :class:`~torch.distributed.device_mesh.DeviceMesh`
            of one dimension, such as ``mesh["cp"]``. None is one rank, in a program that has no other.
        layout: ``contiguous``, ``zigzag`` or ``zigzag_per_document``; see :mod:`moba_cp.cp.layout`.
        seq_len: T, tokens of the whole sequence: a multiple of P (contiguous) or 2P (zigzag).
        cu_seqlens: [n_docs + 1] int32 or int64, or a sequence of ints: document boundaries in the whole sequence; None
            for one document.
        device: where index tensors live, and q, k, v; by default the current GPU if the group moves tensors of GPUs by
            a backend of their own, such as NCCL, else the CPU.
        exchange: what MoBA layers move, and how; a mode's name stands for the options with that mode.
        observer: called with every MoBA layer's name, selection [L, G, S], KV heads and block size; see
            :class:`moba_cp.cp.recorder.SelectionRecorder`.

    Raises:
        ValueError: an argument is of another kind, the layout is unknown, ``cu_seqlens`` does not fit ``seq_len``, that
            does not divide by the ranks, or ``group`` is None where torch.distributed has several ranks.
    """

    group: dist.ProcessGroup | Communicator | None
    """The context-parallel group; None for a single rank."""
    layout: Layout
    """``contiguous``, ``zigzag`` or ``zigzag_per_document``."""
    seq_len: int
    """T, tokens of the whole sequence."""
    cu_seqlens: Tensor
    """[n_docs + 1] int32 or int64 on the CPU, document boundaries in the whole sequence."""
    device: torch.device
    """Where index tensors live."""
    exchange: ExchangeOptions
    """What MoBA layers move, and how."""
    observer: Callable[[str, Tensor, int, int], None] | None
    """Sees what every MoBA layer selects."""
    comm: Communicator
    """The group's collectives and byte counters."""
    digest: str
    """Of layout, documents and options, which all ranks give alike."""
    segments: list[Segments]
    """The runs of tokens that each rank holds; see :mod:`moba_cp.cp.layout`."""
    positions: Tensor
    """[L] int64, global position of each local token."""
    document_positions: Tensor
    """[L] int64, position of each local token within its document, as RoPE wants it."""
    document_starts: Tensor
    """[L] int64, global position at which each local token's document starts."""

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | Communicator | None,
        layout: Layout = "zigzag",
        seq_len: int | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        exchange: ExchangeOptions | Mode = "auto",
        observer: Callable[[str, Tensor, int, int], None] | None = None,
    ):
        check_layout(layout)
        if observer is not None and not callable(observer):
            raise ValueError(f"observer={observer!r} cannot be called; pass a function or a SelectionRecorder")
        device_type = group.device_type if isinstance(group, DeviceMesh) else None
        self.group = _sharing_group(group)
        self.comm = self.group if isinstance(self.group, Communicator) else Communicator(self.group)
        self.device = _default_device(self.comm.group, device_type) if device is None else _device(device)
        self.layout, self.seq_len, self.observer = layout, _length(seq_len), observer
        self.cu_seqlens = _documents(cu_seqlens, self.seq_len)
        self.exchange = _options(exchange, self.comm)

        bounds = self.cu_seqlens.numpy().astype(np.int64)
        what = repr((layout, self.seq_len, self.exchange)).encode() + bounds.tobytes()
        self.digest = hashlib.blake2b(what, digest_size=8).hexdigest()
        self.segments = rank_segments(layout, self.seq_len, self.comm.size, bounds)
        positions = positions_of(self.segments[self.comm.rank])
        starts = bounds[np.searchsorted(bounds, positions, side="right") - 1]
        with torch.inference_mode(False):
            # A context made in validation may be kept, and index_select saves these for backward in training.
            self.positions = to_device(torch.from_numpy(positions), self.device)
            self.document_starts = to_device(torch.from_numpy(starts), self.device)
            self.document_positions = to_device(torch.from_numpy(positions - starts), self.device)
        self._geometry: dict[int, BlockGeometry] = {}
        self._cache: dict[tuple, Any] = {}
        self._frozen = True

    def __setattr__(self, name, value):
        if "_frozen" in self.__dict__:
            raise AttributeError(f"CPContext.{name} cannot be set; build another context")
        super().__setattr__(name, value)

    def __repr__(self):
        return (
            f"CPContext(rank {self.rank} of {self.size}, layout={self.layout!r}, seq_len={self.seq_len}, "
            f"documents={self.cu_seqlens.numel() - 1}, device={str(self.device)!r}, exchange={self.exchange.mode!r})"
        )

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """P, number of ranks."""
        return self.comm.size

    @property
    def local_len(self) -> int:
        """L, tokens on this rank."""
        return self.positions.numel()

    @property
    def counters(self) -> Counters:
        """Bytes moved for this context's group on this rank."""
        return self.comm.counters

    def geometry(self, block_size: int) -> BlockGeometry:
        """Block owners and rows for one block size; built at the first call and kept."""
        if block_size not in self._geometry:
            fitted = fitted_block_size(block_size, self.seq_len)
            if fitted not in self._geometry:
                bounds = self.cu_seqlens.numpy().astype(np.int64)
                self._geometry[fitted] = build_geometry(self.segments, self.rank, bounds, fitted, self.device)
            self._geometry[block_size] = self._geometry[fitted]
        return self._geometry[block_size]

    def cached(self, kind: type[T], key: Hashable, build: Callable[[], T]) -> T:
        """What ``build`` returns at the first call for ``key``, kept with the context: tables of this ``kind`` that a
        way across ranks derives from what is the same in every call."""
        if (kind, key) not in self._cache:
            self._cache[kind, key] = build()
        return self._cache[kind, key]

    @property
    def peers(self) -> PeerMemory | None:
        """Memory that all ranks read, where they have it and it is to be used; asking first is a collective call."""
        return peer_memory(self.comm, self.device) if self.exchange.may_copy(self.size) else None

    def team_peers(self, h: int) -> PeerMemory | None:
        """Memory that every ``h`` consecutive ranks read of one another, where they have it and it is to be used;
        asking first is a collective call."""
        if h == self.size:
            return self.peers
        options = self.exchange
        if h == 1 or not options.copy_engines or (options.ranks_per_node is not None and options.ranks_per_node % h):
            return None
        if self.device.type != "cuda" and self.comm.memory is None:
            return None
        return team_memory(self.cached(Communicator, h, lambda: self.comm.consecutive(h)), self.comm, self.device)

    @cached_property
    def gathered_positions(self) -> Tensor:
        """[T] int64, global position of each row of an all-gather over the ranks."""
        return to_device(torch.cat(self.rank_positions()), self.device)

    def rank_positions(self) -> list[Tensor]:
        """Global positions [L] of every rank's tokens, on the CPU."""
        return [torch.from_numpy(positions_of(segments)) for segments in self.segments]

    def shard(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's share of ``x``, whose dimension ``dim`` is the whole sequence and which all ranks hold alike.

        Differentiable, without communication: the gradient of ``x`` on a rank is that of its own tokens, zero
        elsewhere. Like the gradients of weights that all ranks hold, those of ``x``, and of what it was computed from,
        add up over the group to the whole.
        """
        check_length(x, dim, self.seq_len, "seq_len")
        return x.index_select(dim, self.positions.to(x.device))

    def unshard(self, x: Tensor, dim: int = 0) -> Tensor:
        """The whole sequence from every rank's share ``x``; a collective call, all ranks get the result.

        Differentiable if ``x`` requires a gradient, on all ranks or on none: backward is a collective call too. The
        gradient of ``x`` is this rank's share of the sum of all ranks' gradients, for the loss is the sum of what the
        ranks compute. A loss that all of them compute from the whole sequence counts once for each: divide it by
        ``size``, unless the gradients of weights are averaged over the group and not summed.
        """
        return unshard(x, dim, self)


def signature(cp: CPContext, q: Tensor, k: Tensor, **of_layer: object) -> dict[str, object]:
    """What all ranks of ``cp`` have to give alike: q [L, Hq, D], k [L, Hkv, D], and ``of_layer``."""
    bounds = cp.cu_seqlens.tolist()
    return {
        "seq_len": cp.seq_len,
        "layout": cp.layout,
        # The digest of all documents, and as many as can be shown.
        "cu_seqlens": (hashlib.blake2b(repr(bounds).encode(), digest_size=4).hexdigest(), bounds[:8]),
        "exchange": cp.exchange,
        **of_layer,
        "heads of q": q.shape[1],
        "heads of k and v": k.shape[1],
        "head_dim": q.shape[2],
        "dtype": q.dtype,
    }


def check_context(cp: CPContext, q: Tensor) -> None:
    """Raise ValueError unless ``cp`` is a context and ``q`` [L, Hq, D] this rank's share of its sequence,
    on its kind of device."""
    if not isinstance(cp, CPContext):
        raise ValueError(f"cp is a {type(cp).__name__}; pass CPContext(group, layout, seq_len=...)")
    if q.device.type != cp.device.type:
        raise ValueError(f"q is on {q.device} but cp's tables are on {cp.device}; pass CPContext(..., device=...)")
    if q.shape[0] != cp.local_len:
        raise ValueError(
            f"q has {q.shape[0]} tokens but rank {cp.rank} of {cp.size} holds {cp.local_len} of seq_len={cp.seq_len}; "
            "pass the local share, e.g. cp.shard(q)"
        )


def _sharing_group(group) -> dist.ProcessGroup | Communicator | None:
    """What ``group`` stands for, or ValueError."""
    if group is None:
        size = dist.get_world_size() if dist.is_initialized() else 1
        if size > 1:
            raise ValueError(
                f"group=None is one rank, but torch.distributed has {size}; pass the group whose ranks share the "
                "sequence, such as torch.distributed.group.WORLD if all do, or a group of this rank alone"
            )
        return None
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a DeviceMesh of {group.ndim} dimensions, {group.mesh_dim_names or 'without names'}; pass "
                'the one over which the sequence is spread, e.g. mesh["cp"]'
            )
        if group.get_coordinate() is None:
            raise ValueError("group is a DeviceMesh that this rank is not in; make the context on its ranks alone")
        return group.get_group()
    if isinstance(group, Communicator):
        return group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group is one that this rank is not in; make the context on its ranks alone")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group={group!r} is not a process group, a DeviceMesh of one dimension, or None")
    if dist.get_rank(group) < 0:
        raise ValueError("group is one that this rank is not in; make the context on its ranks alone")
    return group


def _default_device(group: dist.ProcessGroup | None, device_type: str | None = None) -> torch.device:
    """Where the tensors are that ``group`` moves: on the current GPU, if it has a backend for GPUs that is not the one
    for the CPU too, as gloo is; ``device_type`` is what a DeviceMesh says."""
    if device_type is None:
        config = dist.get_backend_config(group) if group is not None else ""
        backends = dict(pair.split(":") for pair in config.split(",") if ":" in pair)
        device_type = "cuda" if "cuda" in backends and backends["cuda"] != backends.get("cpu") else "cpu"
    if device_type != "cuda":
        return torch.device("cpu")
    bound = getattr(group, "bound_device_id", None)
    return bound if bound is not None else torch.device("cuda", torch.cuda.current_device())


def _device(device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r} is no device; use 'cuda' or 'cpu', or leave it out") from None


def _length(seq_len) -> int:
    if seq_len is None:
        raise ValueError(
            'seq_len=None; give the tokens of the whole sequence, all ranks together: CPContext(group, "zigzag", 8192)'
        )
    try:
        length = operator.index(seq_len)
    except TypeError:
        raise ValueError(f"seq_len={seq_len!r} is not an integer; give the tokens of the whole sequence") from None
    if length < 1:
        raise ValueError(f"seq_len={length} is not positive; a sequence needs at least one token")
    return length


def _documents(cu_seqlens, seq_len: int) -> Tensor:
    """``cu_seqlens`` as a tensor on the CPU that cuts ``seq_len`` tokens, or ValueError."""
    if cu_seqlens is None:
        return torch.tensor([0, seq_len], dtype=torch.int64)
    try:
        bounds = torch.as_tensor(cu_seqlens)
        # Not the caller's memory, which may hold the next batch's documents soon.
        bounds = bounds.clone() if bounds.device.type == "cpu" else bounds.cpu()
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        raise ValueError(
            f"cu_seqlens is a {type(cu_seqlens).__name__} that holds no integers to be read; pass a 1-D int32 tensor "
            "[0, end of document 1, ..., seq_len]"
        ) from None
    check_cu_seqlens(bounds, seq_len)
    return bounds


def _options(exchange: ExchangeOptions | Mode, comm: Communicator) -> ExchangeOptions:
    """``exchange`` with what the launcher says of nodes, or ValueError."""
    if isinstance(exchange, str):
        exchange = ExchangeOptions(mode=exchange)
    if not isinstance(exchange, ExchangeOptions):
        raise ValueError(f"exchange={exchange!r} is neither ExchangeOptions nor the name of a mode; use 'auto'")
    if exchange.ranks_per_node is None:
        exchange = replace(exchange, ranks_per_node=comm.ranks_per_node())
    per_node = exchange.ranks_per_node
    if per_node is not None and comm.size % per_node:
        raise ValueError(f"ranks_per_node={per_node} does not divide cp_size={comm.size}; nodes must be equal")
    return exchange
