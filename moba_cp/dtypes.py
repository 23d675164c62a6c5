"""Dtypes in which sums are kept."""

import torch

WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""Of inputs -> of sums, maxima, partial results and log-sum-exp."""
