"""Scores as integers that sort like them: ``-0.0`` like ``0.0``, NaN below every number, no score below all."""

import triton
import triton.language as tl

# No candidate, then NaN, then -inf (-2139095041) and all numbers.
EMPTY = tl.constexpr(-(2**31))
NAN = tl.constexpr(-(2**31) + 1)


@triton.jit
def ordered(score):
    """int32 that sorts as the float32 scores do."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(score != score, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))
