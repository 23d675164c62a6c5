"""Forward, backward and merge on one storage and on several, against the plain PyTorch path in float64."""

from dataclasses import replace

import pytest
import torch

from moba_cp import eager, kernels
from moba_cp.kernels import tuned
from moba_cp.kernels.merge import merge_visits
from moba_cp.kernels.work import FORWARD_SCRATCH
from tests.helpers.kernel_inputs import DEVICE, Problem, poisoned, strided

# lengths, (Hq, Hkv), D, B, k. In float32 a tile holds 32 keys: B = 16 and 32 are short blocks, the others long ones.
PROBLEMS = [
    ([100], (2, 1), 32, 16, 3),
    ([50, 0, 127, 63], (4, 2), 40, 64, 3),
    ([77], (2, 2), 64, 32, 1),
    ([150, 110], (3, 1), 16, 48, 4),
    ([33], (1, 1), 24, 16, 20),
]


def exact(p: Problem, pages=None):
    pages = pages or p.pages
    pages = replace(pages, k=pages.k.double(), v=pages.v.double())
    out, lse = eager.attend(p.q.double(), pages, *p.visits, p.scale)
    delta = eager.row_sums(p.dout.double(), out)
    grads = eager.attend_backward(p.q.double(), pages, *p.visits, p.scale, p.dout.double(), lse, delta)
    return out, lse, delta, grads


def close(actual, expected, rounding=1e-5):
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_forward_and_backward(problem, deterministic):
    p = Problem(*problem)
    out, lse, delta, grads = exact(p)
    pages = replace(p.pages, k=strided(p.k), v=strided(p.v))
    with poisoned():
        ours, ours_lse = kernels.attend(strided(p.q), pages, *p.visits, p.scale)
        close(ours, out)
        close(ours_lse, lse)
        rest = p.scale, strided(p.dout), lse.float(), delta.float(), deterministic
        for actual, expected in zip(kernels.attend_backward(strided(p.q), pages, *p.visits, *rest), grads):
            close(actual, expected)


def test_gradients_of_local_pages_a_few_heads_and_rows_at_a_time():
    p = Problem([120, 80], (4, 4), 32, 32, 3)
    out, lse, delta, grads = exact(p)
    # Room for one head: heads are cut. Room for a part of one: rows are cut too.
    for scratch in (1 << 17, 1 << 15):
        with poisoned():
            ours, ours_lse = kernels.attend(p.q, p.pages, *p.visits, p.scale, scratch_bytes=scratch)
            rest = p.scale, p.dout, lse.float(), delta.float(), False
            actual = kernels.attend_backward(
                p.q, p.pages, *p.visits, *rest, local_dtype=torch.float32, scratch_bytes=scratch
            )
        close(ours, out)
        close(ours_lse, lse)
        for x, expected in zip(actual, grads):
            close(x, expected)


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("rows", [32, 96])
def test_gradients_of_lists_longer_than_a_task(monkeypatch, deterministic, rows):
    """Sums have a place per list where there are few lists, and per R visits where there are many."""
    p = Problem([170, 0, 30], (2, 1), 16, 16, 3)
    # Everybody's first choice is the first block of their document; rows of one block see nothing at all.
    p.chosen[..., 0] = torch.where(p.table.first < p.own, p.table.first, -1)[:, None]
    p.chosen[..., 1:][p.chosen[..., 1:] == p.chosen[..., :1]] = -1
    p.visible = torch.where(p.own == p.own[169], 0, p.visible)
    p.chosen[p.own == p.own[169]] = -1
    p.chosen[p.chosen == p.own[169]] = -1
    tile = tuned.key_tile(16, 16, torch.float32, p.q.device)
    monkeypatch.setattr(tuned, "key_tile", lambda *_: tile._replace(task_rows=rows))
    _, lse, delta, grads = exact(p)
    n_lists, n_visits = p.pages.row.numel(), p.q.shape[0] * 2 * 3
    assert (n_lists <= n_visits // rows) == (rows == 32)
    with poisoned():
        rest = p.scale, p.dout, lse.float(), delta.float(), deterministic
        actual = kernels.attend_backward(p.q, p.pages, *p.visits, *rest, local_dtype=torch.float32)
    assert not grads[1][160:170].any()
    for x, expected in zip(actual, grads):
        close(x, expected)


def test_storages_of_any_layout_merge_to_the_whole():
    """Half of the blocks in place, the others packed one head after another in another storage; rows in any order."""
    p = Problem([300], (4, 2), 32, 32, 4)
    out, lse, delta, grads = exact(p)
    n_kv, n_blocks = p.pages.row.shape
    is_packed = torch.arange(n_blocks, device=p.q.device) % 3 == 1
    here = replace(p.pages, row=torch.where(is_packed, -1, p.pages.row))
    packed_k, packed_v = torch.zeros(2, n_kv * n_blocks * 32 + 7, 1, 32, device=p.q.device)
    row = torch.full_like(p.pages.row, -1)
    for h in range(n_kv):
        for b in is_packed.nonzero()[:, 0].tolist():
            at, start, length = 7 + (h * n_blocks + b) * 32, int(p.table.start[b]), int(p.table.length[b])
            row[h, b] = at
            packed_k[at : at + length, 0] = p.k[start : start + length, h]
            packed_v[at : at + length, 0] = p.v[start : start + length, h]
    there = replace(p.pages, k=packed_k, v=packed_v, row=row, head=torch.zeros_like(p.pages.head))

    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(p.q.device)
    visits = p.chosen[order], p.own[order], p.visible[order]
    parts = [kernels.attend(p.q[order], pages, *visits, p.scale) for pages in (here, there)]
    ours, ours_lse = eager.attention.merge(*zip(*parts))
    close(ours, out[order])
    close(ours_lse, lse[order])

    rest = p.scale, p.dout[order], lse[order].float(), delta[order].float(), True
    dq, dk, dv = zip(*(kernels.attend_backward(p.q[order], pages, *visits, *rest) for pages in (here, there)))
    close(dq[0] + dq[1], grads[0][order])
    for part, whole in ((dk, grads[1]), (dv, grads[2])):
        joined = part[0].clone()
        for h in range(n_kv):
            for b in is_packed.nonzero()[:, 0].tolist():
                start, length = int(p.table.start[b]), int(p.table.length[b])
                assert (joined[start : start + length, h] == 0).all()
                joined[start : start + length, h] = part[1][row[h, b] : row[h, b] + length, 0]
        close(joined, whole)


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("has_index", [True, False], ids=["index", "no index"])
def test_results_join_what_is_there(block_size, deterministic, has_index):
    """Two storages one after the other into the same tensors, some heads at a time and by one index of the visits to
    both, as the exchange does it."""
    p = Problem([150], (4, 2), 32, block_size, 4)
    out, lse, delta, grads = exact(p)
    n_blocks = p.pages.row.shape[1]
    is_first = torch.arange(n_blocks, device=p.q.device) % 2 == 0
    storages = [replace(p.pages, row=torch.where(is_first == first, p.pages.row, -1)) for first in (True, False)]
    into = strided(torch.full_like(p.q, torch.nan)), torch.full(lse.shape, -torch.inf, device=p.q.device)
    # K and V side by side, with something in them before.
    both = torch.ones(150, 2, 2, 32, device=p.q.device)
    dq = torch.ones_like(p.q)
    rest = p.dout, lse.float(), delta.float()
    index = kernels.routing_index(p.q, *p.visits, p.pages.row) if has_index else None
    for pages in storages:
        for kv_heads in (slice(0, 1), slice(1, 2)):
            inputs = p.q, pages, *p.visits, p.scale
            joined = kernels.attend(*inputs, index=index, kv_heads=kv_heads, into=into)
            assert all(a is b for a, b in zip(joined, into))
            kernels.attend_backward(
                *inputs, *rest, deterministic, index=index, kv_heads=kv_heads,
                into=(dq, both[:, :, 0], both[:, :, 1]),
            )  # fmt: skip
    for actual, expected in zip(into, (out, lse)):
        close(actual, expected)
    for actual, expected in zip((dq, both[:, :, 0], both[:, :, 1]), grads):
        close(actual - 1, expected)


@pytest.mark.parametrize("block_size, scratch", [(16, None), (48, None), (48, 1 << 14)], ids=str)
def test_storages_alike_share_their_work(block_size, scratch):
    """A storage for each KV head, or two, with rows in common, as where all K and V come: tasks are cut once for as
    many heads."""
    p = Problem([150, 90], (8, 4), 32, block_size, 4)
    out, lse, delta, grads = exact(p)
    row = p.pages.row.contiguous()
    index = kernels.routing_index(p.q, *p.visits, row)
    into = torch.full_like(p.q, torch.nan), torch.full(lse.shape, torch.nan, device=p.q.device)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (p.q, p.k, p.v))
    forward, backward = {}, {}
    how = dict(index=index, scratch_bytes=scratch, whole=True)
    # Where each head lies in the storage that has it.
    place = torch.tensor([0, 0, 1, 0], dtype=torch.int32, device=p.q.device)[:, None].expand(4, row.shape[1])
    for heads in (slice(0, 1), slice(1, 3), slice(3, 4)):
        k, v = p.k[:, heads].contiguous(), p.v[:, heads].contiguous()
        pages = replace(p.pages, k=k, v=v, row=row, head=place)
        inputs = p.q, pages, *p.visits, p.scale
        kernels.attend(*inputs, kv_heads=heads, into=into, shared=forward, **how)
        kernels.attend_backward(
            *inputs, p.dout, lse.float(), delta.float(), kv_heads=heads, into=(dq, dk[:, heads], dv[:, heads]),
            fresh=True, shared=backward, **how,
        )  # fmt: skip
    assert len(forward) == len(backward) == 2
    for actual, expected in zip((*into, dq, dk, dv), (out, lse, *grads)):
        close(actual, expected)
    for other in (replace(pages, row=row.clone()), replace(pages, head=place.clone())):
        with pytest.raises(AssertionError, match="one table of blocks"):
            kernels.attend(p.q, other, *p.visits, p.scale, kv_heads=heads, into=into, shared=forward, **how)


@pytest.mark.parametrize("n_parts", [0, 3, 40])
def test_parts_of_single_rows_are_joined_and_added(n_parts):
    g = torch.Generator().manual_seed(n_parts)
    draw = lambda *size: torch.randn(*size, generator=g).to(DEVICE)
    out, lse, packed = draw(23, 4, 40), draw(23, 4), draw(n_parts, 41)
    out[3], lse[3] = 0, -torch.inf
    part, part_lse = packed[:, :-1], packed[:, -1]
    place = torch.full((23, 4, 3), -1, dtype=torch.int32)
    place.view(-1)[torch.randperm(23 * 4 * 3, generator=g)[:n_parts]] = torch.arange(n_parts, dtype=torch.int32)
    index = place.to(DEVICE)
    wide = [out.double(), lse.double()]
    eager.merge_rows(*wide, part.double(), part_lse.double(), index)
    ours, ours_lse, added = strided(out), lse.clone(), strided(out)
    kernels.merge_rows(ours, ours_lse, part, part_lse, index)
    close(ours, wide[0])
    close(ours_lse, wide[1])
    total = out.double()
    eager.add_rows(total, part.double(), index)
    kernels.add_rows(added, part, index)
    close(added, total)


def test_rows_that_see_nothing():
    p = Problem([64], (2, 1), 32, 16, 3)
    p.chosen[10:20] = -1
    p.visible[10:20] = 0
    out, lse = kernels.attend(p.q, p.pages, *p.visits, p.scale)
    assert (out[10:20] == 0).all() and (lse[10:20] == -torch.inf).all() and lse[:10].isfinite().all()
    no_own, no_lse = kernels.attend(p.q, p.pages, p.chosen, None, None, p.scale)
    assert (no_own[:16] == 0).all() and (no_lse[:16] == -torch.inf).all() and no_lse[-1].isfinite().all()
    nothing = replace(p.pages, row=torch.full_like(p.pages.row, -1))
    dq, dk, dv = kernels.attend_backward(p.q, nothing, *p.visits, p.scale, p.dout, lse, lse)
    assert not dq.any() and not dk.any() and not dv.any()


def test_very_negative_scores():
    """Every key far below zero: an exponential of an unmasked, absent key would overflow."""
    p = Problem([150], (1, 1), 32, 48, 4)
    p.k, p.q = -p.k.abs() - 18, p.q.abs() + 1
    p.pages = replace(p.pages, k=p.k)
    out, lse, delta, grads = exact(p)
    assert lse.max() < -100
    actual = kernels.attend_backward(p.q, p.pages, *p.visits, p.scale, p.dout, lse.float(), delta.float())
    for x, expected in zip(actual, grads):
        assert (x - expected).abs().max() < 1e-3 * expected.abs().max().clamp(min=1)


def test_nan_stays_in_its_head_and_document():
    p = Problem([70, 90], (4, 2), 32, 16, 3)
    p.k[20, 0], p.v[100, 1] = torch.nan, torch.inf
    out, lse = kernels.attend(p.q, p.pages, *p.visits, p.scale)
    assert out[:70, :2].isnan().any() and not out[70:, 2:].isfinite().all()
    assert out[:70, 2:].isfinite().all() and out[70:, :2].isfinite().all()


def test_merge_keeps_its_inputs():
    outs, lses = ([torch.randn(7, 3, *dim, device=DEVICE) for _ in range(3)] for dim in ((40,), ()))
    outs[1][2], lses[1][2] = 0, -torch.inf
    lses[0][4] = lses[1][4] = lses[2][4] = -torch.inf
    kept = [x.clone() for x in outs + lses]
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    parts, parts_lse = torch.stack(outs, 2), torch.stack(lses, 2)
    merge_visits(parts, parts_lse, out, lse)
    expected, expected_lse = eager.attention.merge([x.double() for x in outs], [x.double() for x in lses])
    close(lse, expected_lse)
    close(out, expected)
    assert all(torch.equal(x, y) for x, y in zip([*parts.unbind(2), *parts_lse.unbind(2)], kept, strict=True))


def test_head_dim_too_large_is_named():
    p = Problem([20], (1, 1), 264, 16, 2)
    with pytest.raises(ValueError, match="head_dim=264 is above 256"):
        kernels.attend(p.q, p.pages, *p.visits, p.scale)


@pytest.mark.parametrize("scratch", [None, 1 << 14], ids=["whole", "cut"])
@pytest.mark.parametrize("block_size, dtype", [(16, torch.float32), (48, torch.float32), (48, torch.bfloat16)])
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_fresh_gradients_need_no_zeros(deterministic, block_size, dtype, scratch):
    """Storages whose gradients, of any dtype, hold nothing yet, one of them with a block that nobody chose."""
    p = Problem([150], (4, 2), 32, block_size, 4)
    p.chosen = torch.where(p.chosen == 1, -1, p.chosen)
    p.visible = torch.where(p.own == 1, 0, p.visible)
    out, lse, delta, grads = exact(p)
    n_blocks = p.pages.row.shape[1]
    is_first = torch.arange(n_blocks, device=p.q.device) % 2 == 0
    index = kernels.routing_index(p.q, *p.visits, p.pages.row)
    dq = torch.zeros_like(p.q)
    for first in (True, False):
        pages = replace(p.pages, row=torch.where(is_first == first, p.pages.row, -1))
        both, seen = torch.full((2, 150, 2, 32), torch.nan, dtype=dtype, device=p.q.device), []
        kernels.attend_backward(
            p.q, pages, *p.visits, p.scale, p.dout, lse.float(), delta.float(), deterministic, scratch_bytes=scratch,
            index=index, into=(dq, *both), fresh=True, keys_done=lambda: seen.append(both.clone()),
        )  # fmt: skip
        here = (is_first == first)[p.own.long()]
        assert len(seen) == 1 and torch.equal(seen[0].nan_to_num(), both.nan_to_num())
        for actual, expected in zip(both, grads[1:]):
            # The interpreter does not round to nearest.
            close(actual[here], expected[here], max(1e-5, torch.finfo(dtype).eps))
            assert scratch or actual[~here].isnan().all()
    close(dq, grads[0])


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_rows_that_are_cut_do_without_the_index(deterministic):
    """Slices of rows have indices of their own; gradients of several slices add to what is there."""
    p = Problem([150], (4, 2), 32, 48, 4)
    out, lse, delta, grads = exact(p)
    index = kernels.routing_index(p.q, *p.visits, p.pages.row)
    for scratch in (FORWARD_SCRATCH, 1 << 14):
        dq, both = torch.ones_like(p.q), torch.ones(150, 2, 2, 32, device=p.q.device)
        close(kernels.attend(p.q, p.pages, *p.visits, p.scale, scratch_bytes=scratch, index=index)[0], out)
        kernels.attend_backward(
            p.q, p.pages, *p.visits, p.scale, p.dout, lse.float(), delta.float(), deterministic, scratch_bytes=scratch,
            index=index, into=(dq, both[:, :, 0], both[:, :, 1]),
        )  # fmt: skip
        for actual, expected in zip((dq, both[:, :, 0], both[:, :, 1]), grads):
            close(actual - 1, expected)
