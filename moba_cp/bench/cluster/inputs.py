"""q, k, v and the gradient of the output, the same for any number of ranks: each rank makes its own part.

Legend: T tokens, L local tokens, Hq query heads, Hkv key/value heads, D head dim, B block size, S = k - 1 selected
blocks per row, n blocks.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...blocks import block_count
from ..gates import SyntheticGate
from ..shape import Shape

CHUNK = 4096
"""Tokens that are drawn with one seed."""
LOGIT = 2.0
"""Scaled score of a query with the mean key of a block that it is to select."""


def drawn_gate(shape: Shape) -> SyntheticGate:
    """What the queries of the concentrated gate are to select."""
    return SyntheticGate("concentrated", shape.heads, shape.kv_heads, shape.moba.block_size, shape.moba.top_k)


def make_inputs(shape: Shape, n_tokens: int, positions: Tensor, device: torch.device) -> list[Tensor]:
    """q, dout [L, Hq, D], k, v [L, Hkv, D] of the tokens at ``positions`` [L]; bfloat16, on a CPU float32.

    Returned as q, k, v, dout.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    out = [torch.empty(positions.numel(), n, shape.dim, dtype=dtype, device=device) for n in counts]
    codes = _codes(shape, n_tokens, device) if shape.gate == "concentrated" else None
    for here, chunk, inside in _chunks(positions.cpu().numpy()):
        g = torch.Generator(device).manual_seed(chunk)
        drawn = [
            torch.randn(CHUNK, n, shape.dim, generator=g, dtype=torch.float32, device=device)[inside] for n in counts
        ]
        if codes is not None:
            # The gate draws by where a run of queries begins, so draw for whole chunks.
            where = np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, n_tokens))
            selection = drawn_gate(shape)(where)[inside].to(device).long()
            drawn[0] = _queries(shape, selection, codes, drawn[0])
            drawn[1] += codes[torch.from_numpy(where[inside] // shape.moba.block_size).to(device)]
        for target, part in zip(out, drawn, strict=True):
            target[here] = part.to(dtype)
    return out


def _chunks(positions: np.ndarray) -> Iterator[tuple[slice, int, slice]]:
    """Runs of ``positions`` within a chunk: their places, the chunk, and where in it they are."""
    cuts = np.flatnonzero((np.diff(positions) != 1) | (positions[1:] % CHUNK == 0)) + 1
    for begin, end in zip([0, *cuts], [*cuts, len(positions)], strict=True):
        first = int(positions[begin])
        inside = first % CHUNK
        yield slice(int(begin), int(end)), first // CHUNK, slice(inside, inside + int(end - begin))


def _codes(shape: Shape, n_tokens: int, device: torch.device) -> Tensor:
    """[n, Hkv, D] of 1 and -1: what the keys of each block have in common."""
    g = torch.Generator(device).manual_seed(2**31)
    n_blocks = block_count(n_tokens, shape.moba.block_size, None)
    size = n_blocks, shape.kv_heads, shape.dim
    return torch.randint(2, size, generator=g, device=device).float() * 2 - 1


def _queries(shape: Shape, selection: Tensor, codes: Tensor, noise: Tensor) -> Tensor:
    """Queries [tokens, Hq, D] that score their blocks ``selection`` [tokens, Hq, S] alike, and other blocks about zero.

    A query is the combination of its blocks' codes whose product with each of them is the same. Codes of other blocks
    have random products with it, of standard deviation ``sqrt(S / D)`` of that: nearly all are below.
    """
    valid = (selection >= 0).float()
    group = shape.heads // shape.kv_heads
    kv_head = torch.arange(shape.heads, device=codes.device)[:, None] // group
    code = codes[selection.clamp(min=0), kv_head] * valid[..., None]
    gram = code @ code.transpose(-1, -2) / shape.dim
    weight = torch.zeros_like(gram[..., 0])
    # Random codes are nearly orthogonal, so that this converges in a few steps, quicker than solving small systems.
    for _ in range(16):
        weight += 0.7 * (valid - (gram @ weight[..., None])[..., 0])
    query = (weight[..., None] * code).sum(-2) * (LOGIT / shape.dim**0.5)
    return query + 0.05 * noise
