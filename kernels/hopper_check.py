"""Decides whether the kernels for Hopper serve with a version of Triton that they were not measured with.

Each kind of them is compiled, and its results on a small case are compared with those of the portable kernels. The
check calls :mod:`.attention` and :mod:`.select`, which ask :mod:`.hopper` what serves them, so it stands above all
three: :mod:`moba_cp.kernels` gives :func:`compare` to :func:`.hopper.check_with`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import attend, attend_backward
from .common import cdiv
from .select import select_blocks

# D, B and the dtype of gradients: one case for each entry of the table at the end of :mod:`.tuned`. Gradients are
# rounded in their place, or added to float32 sums, which are two kernels.
BLOCKS = (
    (64, torch.bfloat16),
    (128, torch.bfloat16),
    (256, torch.float32),
    (256, torch.bfloat16),
    (1152, torch.bfloat16),
)
CASES = [(dim, *block) for dim in (64, 128) for block in BLOCKS]
# Of results, relative to the largest: several roundings of bfloat16, far below what a wrong kernel would do.
TOLERANCE = 2**-5


@dataclass(frozen=True)
class _Pages:
    """As much of :class:`moba_cp.blocks.Pages` as the kernels use, for the blocks of one document where they are."""

    k: Tensor
    v: Tensor
    row: Tensor
    head: Tensor
    length: Tensor
    block_size: int

    def query_heads(self, heads: slice, n_heads: int) -> slice:
        group = n_heads // self.row.shape[0]
        return slice(heads.start * group, heads.stop * group)


def compare(device: torch.device, forced) -> None:
    """Raise unless both sets of kernels agree; ``forced.serves`` chooses the set for calls of this thread."""
    for case in CASES:
        results = []
        for serves in (True, False):
            forced.serves = serves
            results.append(run(*case, device))
        for (name, ours), (_, theirs) in zip(*(x.items() for x in results), strict=True):
            if name == "selection":
                wrong = not torch.equal(ours, theirs)
            else:
                # Written so that NaN is wrong too.
                wrong = not (ours.float() - theirs.float()).abs().max() <= TOLERANCE * theirs.float().abs().max()
            if wrong:
                raise RuntimeError(f"{name} differs from the portable kernels' for D, B, dtype = {case}")


def run(dim: int, block_size: int, grad_dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Selection, forward and backward of a document of three blocks, the last one short, by either set of kernels."""
    n_tokens, n_heads, n_kv = 2 * block_size + block_size // 2 + 5, 4, 2
    g = torch.Generator(device).manual_seed(dim + block_size)
    q, k, v, dout = (
        torch.randn(n_tokens, h, dim, dtype=torch.float32, device=device, generator=g).bfloat16()
        for h in (n_heads, n_kv, n_kv, n_heads)
    )
    n_blocks = cdiv(n_tokens, block_size)
    token = torch.arange(n_tokens, dtype=torch.int32, device=device)
    current_block, visible, first = token // block_size, token % block_size + 1, torch.zeros_like(token)
    start = torch.arange(n_blocks, dtype=torch.int64, device=device) * block_size
    length = (n_tokens - start).clamp(max=block_size).int()
    head = torch.arange(n_kv, dtype=torch.int32, device=device)[:, None].expand(-1, n_blocks).contiguous()
    pages = _Pages(k, v, start.expand(n_kv, -1), head, length, block_size)

    # Not of the scores: where two differ by their rounding, each set may choose another.
    block_indices = (current_block - 1)[:, None, None].expand(-1, n_heads, 1)
    visits, scale = (block_indices, current_block, visible), dim**-0.5
    out, lse = attend(q, pages, *visits, scale)
    delta = (out * dout.float()).sum(-1)
    dq, dk, dv = attend_backward(
        q, pages, *visits, scale, dout, lse, delta, local_dtype=None if grad_dtype == torch.float32 else grad_dtype
    )
    # Scores that are whole numbers are exact in any order of summing, and often equal.
    selection = select_blocks(q.sign(), k[:100].sign(), first, (token // 3).clamp(max=100), 8)
    return {"selection": selection, "output": out, "log-sum-exp": lse, "dQ": dq, "dK": dk, "dV": dv}
