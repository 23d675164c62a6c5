"""Frequencies of rotary position embedding.

Legend: R width of a head's part that turns, even.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's change of the frequencies, for sequences longer than those the model was trained on first.

    A frequency that turns at least ``high_freq_factor`` times within ``original_max_position_embeddings`` tokens stays,
    one that turns at most ``low_freq_factor`` times is divided by ``factor``, and between the two the divisor is
    interpolated.

    Raises:
        ValueError: a field is out of range; the message names it, its value and the rule.
    """

    factor: float = 8.0
    """What low frequencies are divided by; at least 1."""

    low_freq_factor: float = 1.0
    """Turns within the original length below which a frequency is low."""

    high_freq_factor: float = 4.0
    """Turns within the original length above which a frequency is high; more than ``low_freq_factor``."""

    original_max_position_embeddings: int = 8192
    """Tokens of the sequences that the model was trained on first."""

    def __post_init__(self):
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name}={value!r} is not a positive number")
        if self.factor < 1:
            raise ValueError(
                f"factor={self.factor} is less than 1; low frequencies are divided by it, so use 1 or more"
            )
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} is not more than low_freq_factor={self.low_freq_factor}"
            )

    def scale(self, frequencies: Tensor) -> Tensor:
        """The scaled ``frequencies``, radians per token, any shape and floating dtype."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rope_frequencies(dim: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians that each pair turns by per token.

    Args:
        dim: R.
        base: pair i of R / 2 turns by ``base ** (-2 i / R)``.
        scaling: Llama 3.1's, or none.

    Returns:
        [R / 2] float64, on the CPU.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    frequencies = base**-exponents
    return frequencies if scaling is None else scaling.scale(frequencies)
