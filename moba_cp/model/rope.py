"""Frequencies of rotary position embedding.

Legend: R width of a head's part that turns, even.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """A change of the frequencies, for sequences longer than those the model was trained on first.

    Raises:
        ValueError: a field is out of range; the message names it, its value and the rule.
    """

    factor: float = 8.0
    """What low frequencies are divided by (linear: all); at least 1."""

    low_freq_factor: float = 1.0
    """llama3: turns within the original length below which a frequency is low."""

    high_freq_factor: float = 4.0
    """llama3: turns within the original length above which a frequency is high; more than ``low_freq_factor``."""

    original_max_position_embeddings: int = 8192
    """Tokens of the sequences that the model was trained on first."""

    kind: Literal["llama3", "linear", "yarn"] = "llama3"
    """llama3, as Llama 3.1: a frequency that turns at least ``high_freq_factor`` times within the original length
    stays, one that turns at most ``low_freq_factor`` times is divided by ``factor``, and between the two the divisor is
    interpolated. linear: all are divided. yarn: as llama3, but interpolated by a frequency's place between those that
    turn ``beta_fast`` and ``beta_slow`` times, and scores are scaled by ``attention_factor`` squared."""

    beta_fast: float = 32.0
    """yarn: turns above which a frequency stays."""

    beta_slow: float = 1.0
    """yarn: turns below which a frequency is divided; less than ``beta_fast``."""

    attention_factor: float | None = None
    """yarn: what queries and keys are multiplied by; null: 0.1 ln(factor) + 1."""

    def __post_init__(self):
        if self.kind not in ("llama3", "linear", "yarn"):
            raise ValueError(f"kind={self.kind!r} is not one of llama3, linear, yarn")
        numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast")
        for name in (*numbers, "beta_slow", *(("attention_factor",) if self.attention_factor is not None else ())):
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
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} is not more than beta_slow={self.beta_slow}")

    @property
    def score_factor(self) -> float:
        """What attention scores are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        factor = 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor
        return factor**2

    def scale(self, frequencies: Tensor, base: float) -> Tensor:
        """The scaled ``frequencies`` [R / 2], radians per token, which are the powers of ``base``."""
        if self.kind == "linear":
            return frequencies / self.factor
        kept = self._kept_by_llama(frequencies) if self.kind == "llama3" else self._kept_by_yarn(frequencies, base)
        return frequencies * (kept + (1 - kept) / self.factor)

    def _kept_by_llama(self, frequencies: Tensor) -> Tensor:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)

    def _kept_by_yarn(self, frequencies: Tensor, base: float) -> Tensor:
        half = frequencies.numel()

        def place(turns: float) -> float:
            """The index of the frequency that turns so often, as a real number."""
            return half * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(base)

        low, high = max(math.floor(place(self.beta_fast)), 0), min(math.ceil(place(self.beta_slow)), 2 * half - 1)
        index = torch.arange(half, dtype=frequencies.dtype, device=frequencies.device)
        return 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)


def rope_frequencies(dim: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians that each pair turns by per token.

    Args:
        dim: R.
        base: pair i of R / 2 turns by ``base ** (-2 i / R)``.
        scaling: a change of these, or none.

    Returns:
        [R / 2] float64, on the CPU.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    frequencies = base**-exponents
    return frequencies if scaling is None else scaling.scale(frequencies, base)
