"""What the exchange counts and lists, against the plain PyTorch path: integers, so equal to the last bit."""

import pytest
import torch

from moba_cp import eager, kernels
from moba_cp.eager import exchange as choices
from tests.helpers.kernel_inputs import DEVICE, poisoned

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


def _bits(fetch):
    """[C, Hkv, n] bool -> [Hkv, n] int32."""
    bit = 1 << torch.arange(len(fetch), dtype=torch.int32, device=fetch.device)
    return (fetch * bit[:, None, None]).sum(0, dtype=torch.int32)


def _count_rows(module, chosen, place, fetch, n_owners):
    return module.count_rows(chosen, place, _bits(fetch), len(fetch), n_owners).sum(0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_counts_and_lists(case):
    chosen, place, fetch, n_owners, n_places = _case(*case)
    for unit in (0, 1 << 16):
        with poisoned():
            ours = kernels.count_choices(chosen, place, unit)
        expected = choices.count_choices(chosen, place, unit)
        assert ours.dtype == expected.dtype and torch.equal(ours.sum(1), expected.sum(1))
    args = chosen, place, fetch, n_owners
    assert torch.equal(_count_rows(kernels, *args), _count_rows(choices, *args))
    for one in fetch:
        goes = torch.where(one, -1, place)
        with poisoned():
            slots, ends = kernels.list_rows(chosen, goes, n_places)
        expected, expected_ends = choices.list_rows(chosen, goes, n_places)
        assert torch.equal(ends, expected_ends) and slots.dtype == expected.dtype and ends.dtype == torch.int32
        assert torch.equal(slots[: ends[-1]], expected[: ends[-1]])


def test_counters_have_copies(monkeypatch):
    """Many tiles on few blocks use all copies; their number is bounded by memory too."""
    monkeypatch.setattr(kernels.exchange.choices, "TILE_SLOTS", 32)
    chosen, place, fetch, n_owners, n_places = _case(*CASES[0])
    chosen = chosen[:40]
    expected = choices.count_choices(chosen, place, 1 << 16)
    for entries, copies in ((1 << 20, 32), (5 * place.numel(), 4), (place.numel() - 1, 1)):
        monkeypatch.setattr(kernels.exchange.choices, "COUNT_ENTRIES", entries)
        counts = kernels.count_choices(chosen, place, 1 << 16)
        assert counts.shape[1] == copies and torch.equal(counts.sum(1), expected.sum(1))
    assert counts[0].any() and _count_rows(kernels, chosen, place, fetch, n_owners).any()
    assert torch.equal(
        _count_rows(kernels, chosen, place, fetch, n_owners), _count_rows(choices, chosen, place, fetch, n_owners)
    )
    slots, ends = kernels.list_rows(chosen, place, n_places)
    assert torch.equal(slots[: ends[-1]], choices.list_rows(chosen, place, n_places)[0][: ends[-1]])


def test_a_row_goes_to_a_place_once():
    chosen = torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int32, device=DEVICE)
    place = torch.tensor([[5, 5, -1, 4]], dtype=torch.int32, device=DEVICE)
    fetch = torch.zeros(1, 1, 4, dtype=torch.bool, device=DEVICE)
    for module in (choices, kernels):
        chose, share = module.count_choices(chosen, place, 12).sum(1)
        assert chose.tolist() == [[1, 1, 1, 1]] and share.tolist() == [[6, 6, 0, 12]]
        assert _count_rows(module, chosen, place, fetch, 3).tolist() == [[0, 1, 1]]
        slots, ends = module.list_rows(chosen, place, 6)
        assert ends.tolist() == [0, 0, 0, 0, 1, 2] and slots[:2].tolist() == [3, 0]
        goes = torch.tensor([[-1, 5, -1, 4]], dtype=torch.int32, device=DEVICE)
        assert module.list_rows(chosen, goes, 6)[0][:2].tolist() == [3, 1]


@pytest.mark.parametrize("shape", [(4, 2, 0), (0, 2, 3)], ids=str)
def test_nothing_chosen(shape):
    chosen = torch.zeros(shape, dtype=torch.int32, device=DEVICE)
    place = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    fetch = torch.zeros(1, 1, 3, dtype=torch.bool, device=DEVICE)
    for module in (choices, kernels):
        assert not module.count_choices(chosen, place, 4).any()
        assert not _count_rows(module, chosen, place, fetch, 2).any()
        slots, ends = module.list_rows(chosen, place, 2)
        assert slots.numel() == 0 and ends.tolist() == [0, 0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_sent_and_what_they_want(case):
    chosen, place, fetch, _, n_places = _case(*case)
    place = torch.where(fetch[1], -1, place)
    slots, ends = choices.list_rows(chosen, place, n_places)
    slots = slots[: ends[-1]]
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
