"""What blocks and rows cost on the wire."""

from dataclasses import dataclass

import torch

from ...dtypes import WIDE
from ..options import ExchangeOptions


@dataclass(frozen=True)
class WireCosts:
    """Bytes that forward and backward together put on the wire.

    With e bytes per input element, g per gradient element and w per wide element (4, or 8 for float64), D head dim and
    S = k - 1 selected blocks per row:

    - a token of a fetched (KV head, block): K and V forward, K and V again in backward unless kept, dK and dV back:
      ``2 D e (2 or 1) + 2 D g``;
    - a row (token, query head) sent to a block's owner: q and S block ids (of i bytes) forward, partial output and lse
      back in wide; in backward q and ids again unless kept, dout, lse and delta there, dq back:
      ``(D e + S i) (2 or 1) + (D + 1) w + D e + 2 w + D g``.

    In bf16 with float32 gradients and everything sent again that is 16 D per token and 14 D + 4 S + 12 per row: a block
    of B tokens is worth fetching from about 1.1 B rows on.
    """

    kv_token: int
    row: int

    @classmethod
    def of(
        cls, dtype: torch.dtype, dim: int, n_slots: int, options: ExchangeOptions, ids: torch.dtype = torch.int16
    ) -> "WireCosts":
        """Costs for inputs of ``dtype`` and head dim ``dim``, ``n_slots`` selected blocks per row, block ``ids``."""
        e, g = dtype.itemsize, options.wire_dtype(dtype).itemsize
        w = WIDE[dtype].itemsize
        times = 1 if options.keep else 2
        return cls(
            kv_token=2 * dim * e * times + 2 * dim * g,
            row=(dim * e + n_slots * ids.itemsize) * times + (dim + 1) * w + dim * e + 2 * w + dim * g,
        )
