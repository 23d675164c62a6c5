"""Dtypes in which sums are kept."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums, maxima and partial results for inputs of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)
