"""What a MoBA layer is told: block size, top-k, and nothing about devices or ranks."""

from dataclasses import dataclass

BLOCK_SIZE_MULTIPLE = 16
MAX_TOP_K = 64


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

    def __post_init__(self):
        _require_int("block_size", self.block_size)
        _require_int("top_k", self.top_k)
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
        if not isinstance(self.deterministic, bool):
            raise ValueError(f"deterministic={self.deterministic!r} is not a bool; use True or False")


def _require_int(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not an integer; use a whole number such as 512")
