"""What a MoBA layer is told: block size, top-k, how blocks are chosen, and nothing about devices or ranks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

BLOCK_SIZE_MULTIPLE = 16
MAX_TOP_K = 64

Sharing = Literal["none", "sum", "max"]
Score = Literal["mean", "max"]
SHARINGS = "none", "sum", "max"
SCORES = "mean", "max"


class Gate(NamedTuple):
    """How blocks are chosen; the fields are those of :class:`MoBAConfig`."""

    shared_by_group: Sharing = "none"
    score: Score = "mean"
    min_recent: int = 0
    sink: bool = False

    @property
    def shared(self) -> bool:
        """Whether the query heads of a KV head have one selection."""
        return self.shared_by_group != "none"

    def n_groups(self, n_heads: int, n_kv: int) -> int:
        """Heads of a selection of Hq query and Hkv KV heads."""
        return n_kv if self.shared else n_heads

    def changed(self) -> dict[str, str | int | bool]:
        """The fields that are not MoBA's own."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}


@dataclass(frozen=True)
class MoBAConfig:
    """Hyper-parameters of MoBA attention (arXiv 2502.13189).

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the rule.
    """

    block_size: int
    """Tokens per key/value block; a multiple of 16."""

    top_k: int
    """Blocks each query attends to, its own block included; 1 to 64. 1 means the own block alone."""

    deterministic: bool = False
    """Bit-identical results from run to run on a fixed number of ranks, at some cost in the backward pass."""

    shared_by_group: Sharing = "none"
    """Whether the query heads of a KV head attend to the same blocks: ``none``, each chooses for itself; ``sum`` or
    ``max``, they share the blocks with the highest sum, or maximum, of their scores."""

    score: Score = "mean"
    """A block's score: ``mean``, the product of query and mean key, as MoBA has it; ``max``, the highest product of the
    query and one of the block's keys. That reads every key for every query, which is half the products that full
    attention's forward pass has, and across ranks all keys come here, a KV head at a time."""

    min_recent: int = 0
    """So many blocks before a query's own are always taken; with ``sink`` at most ``top_k - 1``."""

    sink: bool = False
    """The document's first block is always taken, as one of the ``top_k``."""

    def __post_init__(self):
        _require_int("block_size", self.block_size, 512)
        _require_int("top_k", self.top_k, 8)
        if self.block_size < BLOCK_SIZE_MULTIPLE or self.block_size % BLOCK_SIZE_MULTIPLE:
            lower = max(1, self.block_size // BLOCK_SIZE_MULTIPLE) * BLOCK_SIZE_MULTIPLE
            raise ValueError(
                f"block_size={self.block_size} is not a positive multiple of {BLOCK_SIZE_MULTIPLE}; "
                f"use {lower} or {lower + BLOCK_SIZE_MULTIPLE}"
            )
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(
                f"top_k={self.top_k} is not between 1 and {MAX_TOP_K}; "
                "it counts the query's own block, so 1 attends to the own block alone"
            )
        for name in ("deterministic", "sink"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} is not a bool; use True or False")
        for name, known in (("shared_by_group", SHARINGS), ("score", SCORES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is unknown; use {', '.join(map(repr, known))}")
        _require_int("min_recent", self.min_recent, 1)
        most = self.top_k - 1 - self.sink
        if most < 0:
            raise ValueError("sink=True takes a block beside the query's own, but top_k=1; use top_k=2 or more")
        if not 0 <= self.min_recent <= most:
            others = "the query's own block and the sink" if self.sink else "the query's own block"
            raise ValueError(
                f"min_recent={self.min_recent} is not between 0 and {most}, what top_k={self.top_k} leaves beside "
                f"{others}; use such a number, or another top_k up to {MAX_TOP_K}"
            )

    @cached_property
    def gate(self) -> Gate:
        """How blocks are chosen."""
        return Gate(self.shared_by_group, self.score, self.min_recent, self.sink)


def _require_int(name: str, value, usual: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not an integer; use a whole number such as {usual}")
