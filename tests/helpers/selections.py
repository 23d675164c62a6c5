"""Gates and selections that several test files draw, and what the reference makes of them."""

import random

import torch

from moba_cp import MoBAConfig, reference
from tests.helpers.cases import Case, run


def draw_config(rng: random.Random, case: Case, deterministic: bool = False) -> MoBAConfig:
    """Any gate, for a case's blocks and at least its top-k."""
    top_k = max(case.top_k, rng.choice([1, 2, 4]))
    sink = top_k > 1 and rng.random() < 0.5
    min_recent = rng.randint(0, top_k - 1 - sink)
    sharing, score = rng.choice(["none", "sum", "max"]), rng.choice(["mean", "max"])
    return MoBAConfig(case.block_size, top_k, deterministic, sharing, score, min_recent, sink)


def reference_selection(case: Case, config: MoBAConfig) -> torch.Tensor:
    """[T, G, S] int64 block ids."""
    return reference.select_blocks(case.q, case.k, config.block_size, config.top_k, case.cu_seqlens, *config.gate)


def reference_results(case: Case, chosen: torch.Tensor) -> list[torch.Tensor]:
    """[out, dq, dk, dv, lse] with selected block ids."""
    return run(reference.moba_attention, case, case.block_size, case.top_k, case.cu_seqlens, chosen=chosen)


def first_blocks(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] int64 each: the first block id of each token's document, and the number of its block within that."""
    bounds = case.cu_seqlens.long()
    n_blocks = (bounds.diff() + case.block_size - 1) // case.block_size
    firsts = torch.cat([n_blocks.new_zeros(1), n_blocks.cumsum(0)])
    token = torch.arange(case.q.shape[0])
    document = torch.searchsorted(bounds, token, right=True) - 1
    return firsts[document], (token - bounds[document]) // case.block_size


def numbers_in_documents(case: Case, chosen: torch.Tensor) -> torch.Tensor:
    """Block ids [T, G, S] as ``block_indices`` has them."""
    first, _ = first_blocks(case)
    return torch.where(chosen < 0, -1, chosen - first[:, None, None]).int()


def draw_indices(case: Case, seed: int, shared: bool, n_slots: int) -> torch.Tensor:
    """[T, G, S] int32 in a document's numbers, that no gate would choose: -1 among them, in any order, none twice."""
    g = torch.Generator().manual_seed(seed)
    _, own = first_blocks(case)
    n_groups = case.k.shape[1] if shared else case.q.shape[1]
    most = max(int(own.max()), n_slots, 1)
    order = torch.rand(*case.q.shape[:1], n_groups, most, generator=g).argsort(-1)[..., :n_slots]
    there = (order < own[:, None, None]) & (torch.rand(order.shape, generator=g) < 0.8)
    return torch.where(there, order, -1).int()
