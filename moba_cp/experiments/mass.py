"""How much of full attention's softmax lies inside the blocks that MoBA would choose.

A trained model with full attention reads held-out documents; of some queries in the second half of each, the weights
of all keys are added up over the current block and the blocks whose mean keys score highest, for many block sizes and
numbers of blocks.
"""

import torch
from torch import Tensor

from ..train.batch import Batches
from ..train.config import TrainConfig
from ..train.evaluate import model_with
from ..train.mesh import open_mesh
from ..train.plan import plan_run

TOP_K = (1, 2, 4, 8, 16, 32, 64)
# Documents, and queries of each.
_DOCUMENTS, _QUERIES = 4, 64


def block_sizes(length: int) -> list[int]:
    """Powers of two from 1/512 of a document, at least 16 tokens, to 1/8 of it."""
    return [size for size in (2**i for i in range(4, 21)) if length / 512 <= size <= length / 8]


def mass_inside(q: Tensor, k: Tensor, positions: Tensor, scale: float, block_size: int, top_k: list[int]) -> Tensor:
    """The share of the softmax inside the chosen blocks.

    Args:
        q: [n, Hq, D], some queries of one document.
        k: [T, Hkv, D], its keys from the first on.
        positions: [n] int64, of the queries.
        scale: of the scores.
        top_k: blocks a query attends to, its current block included.

    Returns:
        [len(top_k)] float32, the mean over queries and heads.
    """
    q, k = q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    length, device = k.shape[0], q.device
    scores = torch.einsum("nhd,thd->nht", q, k) * scale
    later = torch.arange(length, device=device) > positions[:, None]
    weights = scores.masked_fill(later[:, None], float("-inf")).softmax(-1)
    n_blocks = -(-length // block_size)
    of_key = torch.arange(length, device=device) // block_size
    shares = weights.new_zeros(*weights.shape[:2], n_blocks).index_add_(2, of_key, weights)
    means = k.new_zeros(n_blocks, *k.shape[1:]).index_add_(0, of_key, k)
    means /= torch.bincount(of_key, minlength=n_blocks)[:, None, None]
    gate = torch.einsum("nhd,bhd->nhb", q, means)
    current = (positions // block_size)[:, None]
    block = torch.arange(n_blocks, device=device)
    gate = gate.masked_fill((block > current)[:, None], float("-inf")).masked_fill(
        (block == current)[:, None], float("inf")
    )
    order = gate.argsort(-1, descending=True)
    inside = shares.gather(2, order).cumsum(-1).mean((0, 1))
    return torch.stack([inside[min(number, n_blocks) - 1] for number in top_k])


@torch.no_grad()
def weigh(config: TrainConfig, length: int) -> dict:
    """The shares in the model of the run's folder, by block size and number of blocks.

    Args:
        length: tokens of a document, all of which have the same.

    Returns:
        ``{block size: {number of blocks: share}}``, the mean over layers, heads, queries and documents.
    """
    mesh, plan = open_mesh(config.run), plan_run(config, 1)
    module = model_with(config.run.directory, config, config.attention, mesh)
    scale = config.model.softmax_scale or config.model.head_dim**-0.5
    sizes = block_sizes(length)
    sums, seen = {size: torch.zeros(len(TOP_K), dtype=torch.float32, device=mesh.device) for size in sizes}, 0
    positions = torch.linspace(length // 2, length - 1, _QUERIES, dtype=torch.float64, device=mesh.device).long()
    n_documents = 0

    def look(core, args, kwargs) -> None:
        nonlocal seen
        query, key = args[0].squeeze(1), core.convolved(args[1], batch.context).squeeze(1)
        for first in range(0, query.shape[0], length)[:_DOCUMENTS]:
            one = slice(first, first + length)
            for size in sizes:
                sums[size] += mass_inside(query[one][positions], key[one], positions, scale, size, list(TOP_K))
            seen += 1

    # A layer whose attention has a hook runs Megatron's own forward, which calls it with queries and keys.
    for layer in module.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(look, with_kwargs=True)
    for batch in Batches(plan, mesh).validation():
        module(batch.tokens, batch.labels, batch.context)
        n_documents += len(batch.tokens) // length
        if n_documents >= _DOCUMENTS:
            break
    return {str(size): {str(k): round(float(x) / seen, 4) for k, x in zip(TOP_K, sums[size])} for size in sizes}
