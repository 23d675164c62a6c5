"""What the exchange counts and lists, against the plain PyTorch path: integers, so equal to the last bit."""

import pytest
import torch

from moba_cp import choices, eager, kernels
from tests.kernels.inputs import DEVICE, poisoned

# N, (Hq, Hkv), S, n, owners, stages, share of slots without a block
CASES = [
    (300, (4, 2), 7, 40, 4, 2, 0.1),
    (70, (3, 3), 1, 9, 2, 1, 0.5),
    (33, (2, 1), 12, 100, 3, 3, 0.0),
    (5, (1, 1), 2, 4, 8, 2, 1.0),
]


def _case(n, heads, n_slots, n_blocks, n_owners, stages, empty):
    g = torch.Generator().manual_seed(n)
    # Distinct blocks in each row, as a selection has them; a view with strides, as slices of heads have them.
    order = torch.rand(n, heads[0] + 1, n_blocks, generator=g).argsort(-1)[..., :n_slots].int()
    chosen = torch.where(torch.rand(order.shape, generator=g) < empty, -1, order)[:, 1:]
    place = torch.randint(-1, n_owners * stages, (heads[1], n_blocks), generator=g, dtype=torch.int32)
    fetch = torch.rand(3, heads[1], n_blocks, generator=g) < torch.tensor([0.9, 0.4, 0.0])[:, None, None]
    return chosen.to(DEVICE), place.to(DEVICE), fetch.to(DEVICE), n_owners, n_owners * stages


@pytest.mark.parametrize("case", CASES, ids=str)
def test_counts_and_lists(case):
    chosen, place, fetch, n_owners, n_places = _case(*case)
    for unit in (0, 1 << 16):
        with poisoned():
            ours = kernels.count_choices(chosen, place, unit)
        for actual, expected in zip(ours, choices.count_choices(chosen, place, unit), strict=True):
            assert torch.equal(actual, expected)
    assert torch.equal(
        kernels.count_rows(chosen, place, fetch, n_owners), choices.count_rows(chosen, place, fetch, n_owners)
    )
    for one in fetch:
        with poisoned():
            slots, counts = kernels.list_rows(chosen, place, one, n_places)
        expected, expected_counts = choices.list_rows(chosen, place, one, n_places)
        assert torch.equal(counts, expected_counts) and slots.dtype == expected.dtype
        total = int(counts.sum())
        assert torch.equal(slots[:total], expected[:total])


def test_a_row_goes_to_a_place_once():
    chosen = torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int32, device=DEVICE)
    place = torch.tensor([[5, 5, -1, 4]], dtype=torch.int32, device=DEVICE)
    fetch = torch.zeros(1, 1, 4, dtype=torch.bool, device=DEVICE)
    for module in (choices, kernels):
        chose, share = module.count_choices(chosen, place, 12)
        assert chose.tolist() == [[1, 1, 1, 1]] and share.tolist() == [[6, 6, 0, 12]]
        assert module.count_rows(chosen, place, fetch, 3).tolist() == [[0, 1, 1]]
        slots, counts = module.list_rows(chosen, place, fetch[0], 6)
        assert counts.tolist() == [0, 0, 0, 0, 1, 1] and slots[:2].tolist() == [3, 0]
        fetch[0, 0, 0] = True
        assert module.list_rows(chosen, place, fetch[0], 6)[0][:2].tolist() == [3, 1]
        fetch[0, 0, 0] = False


def test_nothing_chosen():
    chosen = torch.zeros(4, 2, 0, dtype=torch.int32, device=DEVICE)
    place = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    fetch = torch.zeros(1, 1, 3, dtype=torch.bool, device=DEVICE)
    for module in (choices, kernels):
        assert not any(x.any() for x in module.count_choices(chosen, place, 4))
        assert not module.count_rows(chosen, place, fetch, 2).any()
        slots, counts = module.list_rows(chosen, place, fetch[0], 2)
        assert slots.numel() == 0 and not counts.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_sent_and_what_they_want(case):
    chosen, place, fetch, _, n_places = _case(*case)
    place = torch.where(fetch[1], -1, place)
    slots, counts = choices.list_rows(chosen, place, torch.zeros_like(fetch[1]), n_places)
    slots = slots[: int(counts.sum())]
    number = torch.arange(place.numel(), device=DEVICE).view(place.shape) * 3 % 1000
    x = torch.randn(*chosen.shape[:2], 24, device=DEVICE)[..., :20]
    with poisoned():
        ids = kernels.row_ids(chosen, slots, place, number, torch.int16)
        rows = kernels.gather_rows(x, slots, chosen.shape[2], torch.float32)
    assert torch.equal(ids, choices.row_ids(chosen, slots, place, number, torch.int16))
    assert torch.equal(rows, eager.gather_rows(x, slots, chosen.shape[2], torch.float32))
    # By hand, for each row: the slots with the place that it is sent to.
    n, _, n_slots = chosen.shape
    group = chosen.shape[1] // place.shape[0]
    for row, slot in enumerate(slots.tolist()):
        h, t, s = slot // n_slots // n, slot // n_slots % n, slot % n_slots
        goes = [int(place[h // group, b]) if b >= 0 else -1 for b in chosen[t, h].tolist()]
        want = [int(number[h // group, b]) if g == goes[s] else -1 for b, g in zip(chosen[t, h].tolist(), goes)]
        assert ids[row].tolist() == want and torch.equal(rows[row], x[t, h])
