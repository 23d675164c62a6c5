"""Selections across ranks that need more than block means: by the keys themselves, or checked as they come from
outside.

Legend: L local tokens, T tokens of the sequence, Hq query heads, Hkv key/value heads, D head dim, n blocks, G heads of
a selection, S = k - 1 selected blocks per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MoBAConfig
from ..given import fault_message, first_fault
from .calls import Where
from .context import CPContext
from .geometry import BlockGeometry


class WholeSequence(NamedTuple):
    """Where blocks lie in a storage of all tokens in order."""

    start: Tensor
    """[n] int64, first token of each block."""


def select_by_keys(
    q: Tensor, k: Tensor, config: MoBAConfig, cp: CPContext, geometry: BlockGeometry, ops, where: Where
) -> Tensor:
    """[L, G, S] int32, the best blocks by their best keys; a collective call.

    The keys of one KV head of the whole sequence come here while those of the one before are scored: no rank holds more
    than two heads. A score depends on its row and its block alone, as on one rank.

    Args:
        q: [L, Hq, D]; k: [L, Hkv, D], this rank's share.
    """
    gate, comm, n_kv = config.gate, cp.comm, k.shape[1]
    whole = cp.cached(WholeSequence, geometry.block_size, lambda: _whole_sequence(geometry))
    asked = whole.start, geometry.first, geometry.current_block, geometry.block_size, config.top_k
    how = gate.shared_by_group, gate.min_recent, gate.sink
    if comm.size == 1:
        return ops.select_by_keys(q, k, *asked, *how)
    group, parts = q.shape[1] // n_kv, []
    wait = comm.all_gather_async(k[:, 0], "keys", where)
    for head in range(n_kv):
        arrived = wait().flatten(0, 1)
        if head + 1 < n_kv:
            wait = comm.all_gather_async(k[:, head + 1], "keys", where)
        keys = torch.empty_like(arrived)
        keys[cp.gathered_positions] = arrived
        queries = q[:, head * group : (head + 1) * group]
        parts.append(ops.select_by_keys(queries, keys[:, None], *asked, *how))
    return torch.cat(parts, 1)


def _whole_sequence(geometry: BlockGeometry) -> WholeSequence:
    length = geometry.length.long()
    return WholeSequence(length.cumsum(0) - length)


def refuse_faults(block_indices: Tensor, geometry: BlockGeometry, cp: CPContext) -> None:
    """Raise ValueError on all ranks unless every rank's ``block_indices`` [L, G, S] name what they may; a collective
    call."""
    fault = first_fault(block_indices, geometry.first, geometry.current_block)
    if fault is None:
        mine = [cp.seq_len, 0, 0, 0]
    else:
        mine = [int(cp.positions[fault[0]]), *fault[1:]]
    every = cp.comm.gather_on_host(torch.tensor(mine, dtype=torch.int64)).view(-1, 4).tolist()
    position, head, number, own = min(every)
    if position < cp.seq_len:
        raise ValueError(fault_message(position, head, number, own, "token"))
