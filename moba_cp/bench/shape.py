"""One layer's attention, the number of tokens aside, as the commands take it.

Legend: Hq query heads, Hkv key/value heads, D head dim, B block size, k top-k.
"""

import argparse
from dataclasses import dataclass

from ..config import MoBAConfig

GATES = ("uniform", "concentrated")
"""What :class:`.gates.SyntheticGate` draws."""
SHAPES = (
    "8192,16,16,128,128,8",
    "32768,16,16,128,128,8",
    "131072,16,16,128,128,8",
    "32768,16,16,128,512,3",
    "131072,16,16,128,512,8",
    "131072,32,8,128,512,8",
    "131072,16,16,64,128,8",
    "131072,16,16,128,4096,12",
    "32768,16,2,128,128,16,sum",
    "65536,64,4,128,64,16,sum",
    "131072,64,4,128,128,16,sum",
)
"""T, Hq, Hkv, D, B, k, as ``bench attention`` takes them, and how a group's heads join their scores where they share a
selection; of its chart all from Hq to k."""
CHART_SHAPE = "16,16,128,512,8"


@dataclass(frozen=True)
class Shape:
    """What :func:`add_arguments` asks for, checked."""

    heads: int
    kv_heads: int
    dim: int
    moba: MoBAConfig
    layout: str
    gate: str
    """One of :data:`GATES`; ``bench exchange`` takes files too."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Hq, Hkv, D, B, k."""
        return self.heads, self.kv_heads, self.dim, self.moba.block_size, self.moba.top_k

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Shape":
        """The shape that a command was given.

        Raises:
            ValueError: a number is out of range; the message names it, its value and the rule.
        """
        kv_heads = args.heads if args.kv_heads is None else args.kv_heads
        if args.heads < 1 or args.dim < 1:
            raise ValueError(f"heads={args.heads}, dim={args.dim}: both must be positive")
        if kv_heads < 1 or args.heads % kv_heads:
            raise ValueError(f"kv-heads={kv_heads} does not divide heads={args.heads}")
        return cls(args.heads, kv_heads, args.dim, MoBAConfig(args.block_size, args.top_k), args.layout, args.gate)

    def __str__(self) -> str:
        return (
            f"{self.heads} query heads, {self.kv_heads} KV heads, head dim {self.dim}, block {self.moba.block_size}, "
            f"top-k {self.moba.top_k}, {self.layout}, gate {self.gate}"
        )


def add_arguments(parser: argparse.ArgumentParser, heads: int, kv_heads: int | None, gate: str) -> None:
    """Options of a shape, with the defaults that differ between commands."""
    parser.add_argument("--heads", type=int, default=heads, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=kv_heads, help=f"default: {kv_heads or 'as query heads'}")
    parser.add_argument("--dim", type=int, default=128, help="head dim (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--layout", choices=("contiguous", "zigzag"), default="zigzag", help="default: %(default)s")
    parser.add_argument("--gate", default=gate, help=f"what queries select: {', '.join(GATES)} (default: %(default)s)")


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """The positive whole numbers of an option, by growing size.

    Raises:
        ValueError: ``text`` is something else.
    """
    try:
        numbers = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        numbers = (0,)
    if numbers[0] < 1:
        raise ValueError(f"{name}={text!r} is not a list of positive whole numbers; use e.g. 2,8,64")
    return numbers
