"""What an index branch is told."""

from dataclasses import dataclass
from typing import Literal, get_args

Score = Literal["mean", "max"]

INDEX_WEIGHT = ".index.weight"
"""How the name of a branch's parameter ends."""


@dataclass(frozen=True)
class IndexConfig:
    """The scorer of each MoBA layer, which chooses the blocks of each KV head's group in place of the mean keys.

    It has queries of its own, one key for each KV head, and for each query a weight that follows from the token. The
    score of a key is the weighted sum, over the queries, of the positive parts of their products with it.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the rule.
    """

    heads: int = 4
    """Queries of the scorer for each KV head."""

    dim: int = 64
    """Width of its queries and keys: even, and a divisor of ``model.head_dim``, whose rotary frequencies they share."""

    score: Score = "mean"
    """A block's score: ``mean``, that of its mean key, or ``max``, the highest of its keys', which reads every key for
    every query; across ranks all of the scorer's keys come here then."""

    def __post_init__(self):
        for name in ("heads", "dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"index.{name}={value!r} is not a positive integer; use 1 or more")
        if self.dim % 2:
            raise ValueError(f"index.dim={self.dim} is odd; rotary embedding turns pairs, so use an even number")
        if self.score not in get_args(Score):
            raise ValueError(f"index.score={self.score!r} is unknown; use one of {', '.join(get_args(Score))}")

    def width(self, n_kv: int) -> int:
        """Rows of the projection: of each KV head its queries, its key and the queries' weights."""
        return n_kv * (self.heads * self.dim + self.dim + self.heads)

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError unless the scorer's keys can share the rotary frequencies of heads of ``head_dim``."""
        if head_dim % self.dim:
            fits = [d for d in range(2, head_dim + 1, 2) if head_dim % d == 0]
            raise ValueError(
                f"index.dim={self.dim} does not divide head_dim={head_dim}, whose rotary frequencies it shares; "
                f"use one of {', '.join(map(str, fits))}"
            )
