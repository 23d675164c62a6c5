"""Counting and listing the blocks that rows chose, for the exchange between ranks, in plain PyTorch.

Legend: N rows (tokens), Hq query heads, Hkv key/value heads, G = Hq // Hkv, S chosen blocks per row, n blocks. A
*slot* is one chosen block of one row and head. A *place* is where a row goes that wants a block: one number per owner
and stage (``stage * owners + owner``), -1 for blocks that are here. A row goes to a place once, by its first
slot that wants to.
"""

import torch
from torch import Tensor


def count_choices(chosen: Tensor, open_place: Tensor, unit: int) -> Tensor:
    """How many slots chose each block, and the shares of rows that would go to it.

    Args:
        chosen: [N, Hq, S] int32 block ids, -1 for none.
        open_place: [Hkv, n] int32 places; -1 also where rows are not to be counted.
        unit: a row's share is ``unit`` over the number of its slots with the same place; 0 for no shares.

    Returns:
        [1 or 2, R, Hkv, n] int64, to be summed over R: numbers of slots, and if ``unit`` is not 0 the shares, which are
        0 where ``open_place`` is -1.
    """
    counts = torch.zeros(2 if unit else 1, 1, *open_place.shape, dtype=torch.int64, device=chosen.device)
    for head, block, place in _by_head(chosen, open_place):
        at = block.clamp(min=0).flatten()
        counts[0, 0, head].scatter_add_(0, at, (block >= 0).long().flatten())
        if unit:
            together = torch.zeros_like(place)
            for slot in range(place.shape[-1]):
                together += (place == place[..., slot : slot + 1]) & (place >= 0)
            part = unit // together.clamp(min=1) * (place >= 0)
            counts[1, 0, head].scatter_add_(0, at, part.flatten())
    return counts


def count_rows(chosen: Tensor, place: Tensor, fetched: Tensor, n_candidates: int, n_owners: int) -> Tensor:
    """Rows sent to each owner, for several candidates of what is fetched instead.

    Args:
        chosen: [N, Hq, S] int32.
        place: [Hkv, n] int32.
        fetched: [Hkv, n] int32, bit ``c`` says that candidate ``c`` fetches the block.

    Returns:
        [R, candidates, owners] int32, to be summed over R.
    """
    rows = torch.zeros(1, n_candidates, n_owners, dtype=torch.int32, device=chosen.device)
    for head, block, at in _by_head(chosen, place):
        for candidate, counts in enumerate(rows[0]):
            fetch = (fetched[head] >> candidate & 1).bool()
            first = _first(torch.where((block >= 0) & ~fetch[block.clamp(min=0)], at, -1))
            counts.scatter_add_(0, at.clamp(min=0).flatten() % n_owners, first.int().flatten())
    return rows


def list_rows(chosen: Tensor, place: Tensor, n_places: int) -> tuple[Tensor, Tensor]:
    """The slots whose rows are sent; ``place`` [Hkv, n] int32 is -1 also for blocks that are fetched.

    Returns:
        int32 indices into the flattened [Hq, N, S] slots, int64 where there are 2^31 or more, by place, head, token,
        slot, as many as there are slots at all: those past the last end mean nothing; and [places] int32, where each
        place's part of the list ends.
    """
    places = [torch.where(_first(at), at, n_places) for _, _, at in _by_head(chosen, place)]
    flat = torch.cat(places, 1).transpose(0, 1).flatten()
    counts = torch.zeros(n_places + 1, dtype=torch.int32, device=chosen.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    dtype = torch.int32 if flat.numel() < 2**31 else torch.int64
    return flat.argsort(stable=True).to(dtype), counts[:-1].cumsum(0, dtype=torch.int32)


def _by_head(chosen: Tensor, place: Tensor):
    """(KV head, blocks, places) of its group's slots, [N, G, S] int64 each."""
    group = chosen.shape[1] // place.shape[0]
    for head, table in enumerate(place.long()):
        block = chosen[:, head * group : (head + 1) * group].long()
        yield head, block, torch.where(block >= 0, table[block.clamp(min=0)], -1)


def _first(at: Tensor) -> Tensor:
    """[N, G, S] bool, slots for which their row is sent: the first of each place; ``at`` [N, G, S], -1 for none."""
    first = at >= 0
    for slot in range(1, at.shape[-1]):
        first[..., slot] &= ~(at[..., :slot] == at[..., slot : slot + 1]).any(-1)
    return first


def row_ids(chosen: Tensor, slots: Tensor, place: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    """The blocks that each row sent wants from where it goes: those with the place of the slot that it is sent for.

    Args:
        chosen: [N, H, S] int32 block ids, -1 for none.
        slots: [M] int32, places in [H, N, S] of chosen blocks.
        place: [Hkv, n] int32, where a row goes that wants a block, -1 for nowhere.
        number: [Hkv, n], what a (KV head, block) is called there.
        dtype: of the result.

    Returns:
        [M, S] numbers, -1 for slots that want something else.
    """
    n_rows, n_heads, n_slots = chosen.shape
    slot = slots.long()
    row = slot // n_slots
    token, head = row % n_rows, row // n_rows
    block = chosen[token, head].long()
    at = (head // (n_heads // place.shape[0]))[:, None], block.clamp(min=0)
    goes = place[at]
    wanted = (block >= 0) & (goes == goes.gather(1, (slot % n_slots)[:, None]))
    return torch.where(wanted, number[at], -1).to(dtype)
