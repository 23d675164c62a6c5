"""The index branch written plainly: the specification that both backends are compared with.

Loops over documents, rows and blocks, in any floating dtype, differentiable by autograd.

Legend: T tokens, g KV heads, m queries of the scorer for each, d their width, Hq query heads, D head dim, B block size,
S selected blocks of a row beside its current one.
"""

import torch
from torch import Tensor

from ..reference import _documents


def block_scores(
    queries: Tensor, weights: Tensor, keys: Tensor, block_size: int, score: str, cu_seqlens: Tensor | None = None
) -> dict[tuple[int, int], Tensor]:
    """The scores of the candidates of every row and KV head: (row, KV head) -> [candidates], the oldest first.

    The candidates of a row are the blocks of its document before its current one, all of them complete.

    Args:
        queries: [T, g, m, d]; weights: [T, g, m]; keys: [T, g, d].
        score: ``mean`` or ``max``.
    """
    found = {}
    for begin, end in _documents(keys.shape[0], cu_seqlens):
        for row in range(begin, end):
            for head in range(keys.shape[1]):
                scores = []
                for block in range((row - begin) // block_size):
                    inside = keys[begin + block * block_size : begin + (block + 1) * block_size, head]
                    if score == "mean":
                        inside = inside.mean(0, keepdim=True)
                    products = queries[row, head] @ inside.T
                    scores.append((weights[row, head] @ products.relu()).max())
                found[row, head] = torch.stack(scores) if scores else keys.new_zeros(0)
    return found


def select_blocks(
    queries: Tensor,
    weights: Tensor,
    keys: Tensor,
    block_size: int,
    top_k: int,
    score: str,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """[T, g, top_k - 1] int64, the candidates with the highest scores, best first, counted within the row's document;
    -1 where there are fewer. Equal scores: the more recent block."""
    chosen = torch.full((*keys.shape[:2], top_k - 1), -1, dtype=torch.int64)
    for (row, head), scores in block_scores(queries, weights, keys, block_size, score, cu_seqlens).items():
        order = sorted(range(len(scores)), key=lambda block: (float(scores[block].detach()), block), reverse=True)
        for slot, block in enumerate(order[: top_k - 1]):
            chosen[row, head, slot] = block
    return chosen


def block_masses(
    q: Tensor, k: Tensor, lse: Tensor, block_size: int, scale: float, cu_seqlens: Tensor | None = None
) -> dict[tuple[int, int], Tensor]:
    """What attention gives each candidate, summed over the heads of a group: (row, KV head) -> [candidates].

    Args:
        q: [T, Hq, D]; k: [T, g, D]; lse: [T, Hq], of all that each row attends to.
    """
    found, group = {}, q.shape[1] // k.shape[1]
    for begin, end in _documents(k.shape[0], cu_seqlens):
        for row in range(begin, end):
            for head in range(k.shape[1]):
                masses, heads = [], slice(head * group, (head + 1) * group)
                for block in range((row - begin) // block_size):
                    inside = k[begin + block * block_size : begin + (block + 1) * block_size, head]
                    masses.append((q[row, heads] @ inside.T * scale - lse[row, heads, None]).exp().sum())
                found[row, head] = torch.stack(masses) if masses else k.new_zeros(0)
    return found


def index_loss(
    scores: dict[tuple[int, int], Tensor], masses: dict[tuple[int, int], Tensor], chosen: Tensor | None = None
) -> Tensor:
    """The KL divergence from what attention gives the blocks, made to sum to one, to the softmax of the scores; [],
    summed over rows, the mean over KV heads.

    Args:
        chosen: [T, g, S], of :func:`select_blocks`: only these blocks count. None: all candidates do, as where
            attention is full.
    """
    total, heads = 0.0, 1 + max(head for _, head in scores)
    for (row, head), of_row in scores.items():
        mass = masses[row, head].detach()
        if chosen is not None:
            blocks = [int(block) for block in chosen[row, head] if block >= 0]
            of_row, mass = of_row[blocks], mass[blocks]
        if mass.sum() > 0:
            target = mass / mass.sum()
            logs = of_row.log_softmax(0)
            total = total + (torch.xlogy(target, target) - target * logs).sum()
    return torch.as_tensor(total, dtype=next(iter(scores.values())).dtype) / heads
