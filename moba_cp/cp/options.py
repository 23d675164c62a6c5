"""How blocks and rows are exchanged between ranks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

Mode = Literal["auto", "kv", "query", "allgather", "heads"]
MODES: tuple[Mode, ...] = get_args(Mode)
SEQUENCE_MODES: tuple[Mode, ...] = MODES[:-1]
"""Modes that leave heads where they are; they may serve between ranks with the same heads."""
GATHERING_MODES: tuple[Mode, ...] = ("auto", "allgather")
"""Modes that bring all K and V, or may do so, by copy engines where there are any."""
WireDtype = Literal["input", "float32"]
WIRE_DTYPES: tuple[WireDtype, ...] = get_args(WireDtype)


@dataclass(frozen=True)
class ExchangeOptions:
    """What moves between ranks, when, and in which dtype. Equal on every rank.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the rule.
    """

    mode: Mode = "auto"
    """``kv``: selected blocks come to the queries. ``query``: query rows go to the blocks, partial results come back.
    ``auto``: whichever moves fewer bytes, those of rows counted ``row_weight`` times, decided per (KV head, block);
    all-gather where a plan would save little (:meth:`share_to_gather`), or where it costs attention nothing
    (``copy_engines``).
    ``allgather``: all K and V go everywhere, by copy engines all that a rank's queries can see.
    ``heads``: tokens are exchanged for heads: every rank attends to the whole sequence with a share of the heads. The
    ranks have to divide the query heads."""

    head_ranks: int | None = None
    """h: exchange tokens for heads among every h consecutive ranks of the group, and let ``mode`` serve between ranks
    with the same heads. It divides the ranks and the query heads. 1: never. None: all ranks with mode ``heads``; with
    ``auto``, by predicted time, on one node with copy engines all ranks or none, on several nodes none, some or all of
    a node, or all; none with others."""

    stages: int = 2
    """Parts in which remote work is done. While one part is computed the next one travels; buffers hold two parts, or
    three where copy engines bring them. All-gathering makes more parts of long sequences."""

    keep: bool = False
    """Keep what was received in forward for backward, instead of sending it again: fewer bytes, more memory."""

    gradient_dtype: WireDtype = "float32"
    """Dtype of dK, dV and dQ on the wire: ``float32``, or ``input`` (that of q, k, v): a quarter fewer bytes, but each
    rank's part is then rounded before it is summed. The root mean square error of gradients was then 1.0 to 1.4 times
    that on one rank, in 120 cases in bfloat16; the largest error of a case up to 3.5 times."""

    ranks_per_node: int | None = None
    """Ranks that share a node, consecutive in the group; a block that several of them need crosses the network once.
    1: every rank for itself. None: by LOCAL_WORLD_SIZE, where a launcher has set it."""

    row_weight: float | None = None
    """In ``auto``, how much more a byte of rows counts than a byte of blocks: rows make work on both sides, which only
    a slow network pays back. 1 moves the fewest bytes. None: 4 within a node (``ranks_per_node``), 1 between nodes, and
    there a block counts by the part that this rank has in it if its node's ranks need as much as it does."""

    measure_links: bool = True
    """Across nodes ``auto`` goes by the speed of links, which a group's ranks measure together at their first call, in
    a fraction of a second. False assumes NVLink within nodes and a card of 200 Gbit/s for each rank."""

    copy_engines: bool = True
    """Where the ranks' GPUs map each other's memory, all-gather by their copy engines; ``auto`` then does so at once
    where that hides behind attention. Not where ``ranks_per_node`` says that ranks are on several nodes."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"exchange mode={self.mode!r} is not one of {', '.join(MODES)}")
        if not _is_int(self.stages) or not 1 <= self.stages <= 64:
            raise ValueError(f"exchange stages={self.stages!r} is not an integer between 1 and 64; use 2 to 4")
        if self.gradient_dtype not in WIRE_DTYPES:
            raise ValueError(f"exchange gradient_dtype={self.gradient_dtype!r} is not one of {', '.join(WIRE_DTYPES)}")
        if self.ranks_per_node is not None and (not _is_int(self.ranks_per_node) or self.ranks_per_node < 1):
            raise ValueError(
                f"exchange ranks_per_node={self.ranks_per_node!r} is not a positive integer; leave it out, or use 1"
            )
        h = self.head_ranks
        if h is not None and (not _is_int(h) or h < 1):
            raise ValueError(f"exchange head_ranks={h!r} is not a positive integer; leave it out, or use 1")
        weight = self.row_weight
        if weight is not None and (not _is_number(weight) or not 0 < weight < 1e6):
            raise ValueError(f"exchange row_weight={weight!r} is not a number in (0, 1e6); leave it out, or use 1 to 8")
        if not isinstance(self.measure_links, bool):
            raise ValueError(
                f"exchange measure_links={self.measure_links!r} is not True or False; leave it out, or use False"
            )
        if not isinstance(self.copy_engines, bool):
            raise ValueError(
                f"exchange copy_engines={self.copy_engines!r} is not True or False; leave it out, or use False for NCCL"
            )

    def wire_dtype(self, dtype: "torch.dtype") -> "torch.dtype":
        """Dtype of gradients on the wire for inputs of ``dtype``."""
        # Command lines name these options, and their help does not wait for PyTorch.
        from ..dtypes import WIDE

        return WIDE[dtype] if self.gradient_dtype == "float32" else dtype

    def share_to_gather(self, by_copy_engines: bool) -> float:
        """``auto`` all-gathers where its plan would move at least this share of all-gather's bytes.

        Copy engines leave the GPU to attention, so they are the faster way to move more bytes.
        """
        return 0.6 if by_copy_engines else 0.98

    def may_copy(self, size: int) -> bool:
        """Whether copy engines may serve a group of ``size`` ranks: none of them is said to be on another node."""
        return self.copy_engines and (self.ranks_per_node is None or self.ranks_per_node >= size)

    def weighing(self, size: int) -> "Weighing":
        """How ``auto`` compares blocks and rows on ``size`` ranks."""
        per_node = min(self.ranks_per_node or 1, size)
        if self.row_weight is not None:
            return Weighing(self.row_weight, self.row_weight, 1, per_node)
        return Weighing(4.0, 1.0, per_node, per_node)


@dataclass(frozen=True)
class Weighing:
    """How ``auto`` compares a byte of rows with a byte of blocks."""

    near: float
    """weight of rows to and from ranks of the same node: they make work on both sides, and there the wire is fast."""
    far: float
    """weight of rows to and from other nodes, against blocks that come for this rank alone"""
    sharing: int
    """ranks that can share a block which comes from another node"""
    per_node: int
    """ranks of a node"""


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
