"""CPContext: a sequence, its documents and the ranks it is spread over."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..blocks import check_cu_seqlens, fitted_block_size
from .comm import Communicator, Counters
from .exchange.tables import WireTables, build_wire_tables
from .full.schedule import FullPlan
from .geometry import BlockGeometry, build_geometry
from .layout import positions_of, rank_segments
from .options import ExchangeOptions
from .symmetric_memory import PeerMemory


@dataclass(frozen=True, eq=False)
class CPContext:
    """How one (packed) sequence is spread over the ranks of a context-parallel group.

    Built once per batch shape, on every rank with equal arguments, and passed to :func:`moba_cp.moba_attention` and
    :func:`moba_cp.full_attention`. ``shard`` and ``unshard`` carry no gradient.

    Raises:
        ValueError: unknown layout, bad ``cu_seqlens``, or a length that does not divide by the ranks.
    """

    group: dist.ProcessGroup | Communicator | None
    """The context-parallel group; None for a single rank."""
    layout: str = "zigzag"
    """``contiguous``, ``zigzag`` or ``zigzag_per_document``; see :mod:`moba_cp.cp.layout`."""
    seq_len: int = 0
    """T, tokens of the whole sequence: a multiple of P (contiguous) or 2P (zigzag)."""
    cu_seqlens: Tensor | None = None
    """[n_docs + 1] int, document boundaries in the whole sequence; None for one document."""
    device: torch.device | str | None = None
    """Where index tensors live; default: the current GPU for an NCCL group, else the CPU."""
    exchange: ExchangeOptions = field(default_factory=ExchangeOptions)
    """What MoBA layers move, and how; a mode's name stands for the options with that mode."""
    observer: Callable[[str, Tensor, int, int], None] | None = None
    """Called with every MoBA layer's name, selection [L, Hq, k - 1], KV heads and block size; see
    :class:`moba_cp.cp.recorder.SelectionRecorder`."""
    comm: Communicator = field(init=False, repr=False)
    """The group's collectives and byte counters."""
    positions: Tensor = field(init=False, repr=False)
    """[L] int64, global position of each local token."""
    document_positions: Tensor = field(init=False, repr=False)
    """[L] int64, position of each local token within its document, as RoPE wants it."""
    document_starts: Tensor = field(init=False, repr=False)
    """[L] int64, global position at which each local token's document starts."""

    def __post_init__(self):
        comm = self.group if isinstance(self.group, Communicator) else Communicator(self.group)
        device = torch.device(self.device if self.device is not None else _default_device(comm.group))
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, self.seq_len], dtype=torch.int64)
        cu_seqlens = torch.as_tensor(cu_seqlens).cpu()
        check_cu_seqlens(cu_seqlens, self.seq_len)
        bounds = cu_seqlens.numpy().astype(np.int64)
        segments = rank_segments(self.layout, self.seq_len, comm.size, bounds)
        positions = positions_of(segments[comm.rank])
        starts = bounds[np.searchsorted(bounds, positions, side="right") - 1]

        def freeze(name, value):
            object.__setattr__(self, name, value)

        exchange = ExchangeOptions(mode=self.exchange) if isinstance(self.exchange, str) else self.exchange
        if exchange.ranks_per_node is None:
            exchange = replace(exchange, ranks_per_node=comm.ranks_per_node())
        per_node = exchange.ranks_per_node
        if per_node is not None and comm.size % per_node:
            raise ValueError(f"ranks_per_node={per_node} does not divide cp_size={comm.size}; nodes must be equal")
        freeze("exchange", exchange)
        freeze("comm", comm)
        freeze("device", device)
        freeze("cu_seqlens", cu_seqlens)
        freeze("positions", torch.from_numpy(positions).to(device))
        freeze("document_starts", torch.from_numpy(starts).to(device))
        freeze("document_positions", torch.from_numpy(positions - starts).to(device))
        freeze("_segments", segments)
        freeze("_geometry", {})
        freeze("_wire", {})

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
        block_size = fitted_block_size(block_size, self.seq_len)
        if block_size not in self._geometry:
            bounds = self.cu_seqlens.numpy().astype(np.int64)
            self._geometry[block_size] = build_geometry(self._segments, self.rank, bounds, block_size, self.device)
        return self._geometry[block_size]

    def wire(self, block_size: int, n_kv_heads: int) -> WireTables:
        """Tables of the exchange for one block size and number of KV heads; built at the first call and kept."""
        key = block_size, n_kv_heads
        if key not in self._wire:
            options = self.exchange
            self._wire[key] = build_wire_tables(
                self.geometry(block_size), n_kv_heads, options.stages, options.ranks_per_node, self.rank
            )
        return self._wire[key]

    @property
    def peers(self) -> PeerMemory | None:
        """Memory that all ranks read, where they have it and it is to be used; asking first is a collective call."""
        return self.comm.peers(self.device) if self.exchange.may_copy(self.size) else None

    @cached_property
    def gathered_positions(self) -> Tensor:
        """[T] int64, global position of each row of an all-gather over the ranks."""
        return torch.cat(self.rank_positions()).to(self.device)

    @cached_property
    def full_plan(self) -> FullPlan:
        """What full attention sees and moves; built at the first use and kept."""
        return FullPlan(self._segments, self.rank, self.cu_seqlens.numpy().astype(np.int64))

    def rank_positions(self) -> list[Tensor]:
        """Global positions [L] of every rank's tokens, on the CPU."""
        return [torch.from_numpy(positions_of(segments)) for segments in self._segments]

    def shard(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's share of ``x``, whose dimension ``dim`` is the whole sequence."""
        if x.shape[dim] != self.seq_len:
            raise ValueError(f"dimension {dim} of x has length {x.shape[dim]}, not seq_len={self.seq_len}")
        return x.detach().index_select(dim, self.positions.to(x.device))

    def unshard(self, x: Tensor, dim: int = 0) -> Tensor:
        """The whole sequence from every rank's share ``x``; a collective call, all ranks get the result."""
        if x.shape[dim] != self.local_len:
            raise ValueError(f"dimension {dim} of x has length {x.shape[dim]}, not this rank's {self.local_len} tokens")
        gathered = self.comm.gather_uncounted(x.detach().movedim(dim, 0)).flatten(0, 1)
        whole = torch.empty_like(gathered)
        whole[self.gathered_positions.to(x.device)] = gathered
        return whole.movedim(0, dim)


def _default_device(group: dist.ProcessGroup | None) -> torch.device:
    if group is not None and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
