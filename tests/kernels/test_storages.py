"""Forward and backward on several storages, into what is there and cut into slices, against float64."""

from dataclasses import replace

import pytest
import torch

from moba_cp import eager, kernels
from moba_cp.kernels.work import FORWARD_SCRATCH
from tests.helpers.kernel_inputs import DEVICE, Problem, close, exact, strided


def test_storages_of_any_layout_merge_to_the_whole():
    """Half of the blocks in place, the others packed one head after another in another storage; rows in any order."""
    p = Problem([160], (4, 2), 32, 32, 4)
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

    order = torch.randperm(160, generator=torch.Generator().manual_seed(1)).to(p.q.device)
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


@pytest.mark.parametrize("block_size, scratch", [(16, None), (48, None), (48, 1 << 15)], ids=str)
def test_storages_alike_share_their_work(block_size, scratch):
    """A storage for each KV head, or two, with rows in common, as where all K and V come: tasks are cut once for as
    many heads."""
    p = Problem([90, 50], (8, 4), 32, block_size, 3)
    out, lse, delta, grads = exact(p)
    row = p.pages.row.contiguous()
    index = kernels.routing_index(p.q, *p.visits, row)
    merged = torch.full_like(p.q, torch.nan), torch.full(lse.shape, torch.nan, device=p.q.device)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (p.q, p.k, p.v))
    forward, backward = {}, {}
    how = dict(index=index, scratch_bytes=scratch)
    # Where each head lies in the storage that has it.
    place = torch.tensor([0, 0, 1, 0], dtype=torch.int32, device=p.q.device)[:, None].expand(4, row.shape[1])
    for heads in (slice(0, 1), slice(1, 3), slice(3, 4)):
        k, v = p.k[:, heads].contiguous(), p.v[:, heads].contiguous()
        pages = replace(p.pages, k=k, v=v, row=row, head=place)
        inputs = p.q, pages, *p.visits, p.scale
        kernels.attend(*inputs, kv_heads=heads, out=merged, overwrite_out=True, task_cache=forward, **how)
        kernels.attend_backward(
            *inputs, p.dout, lse.float(), delta.float(), kv_heads=heads, out=(dq, dk[:, heads], dv[:, heads]),
            overwrite_dkv=True, overwrite_dq=True, task_cache=backward, **how,
        )  # fmt: skip
    assert len(forward) == len(backward) == 2
    for actual, expected in zip((*merged, dq, dk, dv), (out, lse, *grads)):
        close(actual, expected)
    for other in (replace(pages, row=row.clone()), replace(pages, head=place.clone())):
        with pytest.raises(AssertionError, match="one table of blocks"):
            kernels.attend(
                p.q,
                other,
                *p.visits,
                p.scale,
                kv_heads=heads,
                out=merged,
                overwrite_out=True,
                task_cache=forward,
                **how,
            )


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


@pytest.mark.parametrize(
    "block_size, deterministic, has_index",
    [(16, False, True), (48, True, True), (16, True, False), (48, False, False)],
    ids=["short-atomics-index", "long-deterministic-index", "short-deterministic", "long-atomics"],
)
def test_results_join_what_is_there(block_size, deterministic, has_index):
    """Two storages one after the other into the same tensors, some heads at a time and by one index of the visits to
    both, as the exchange does it."""
    p = Problem([110], (4, 2), 32, block_size, 4)
    out, lse, delta, grads = exact(p)
    n_blocks = p.pages.row.shape[1]
    is_first = torch.arange(n_blocks, device=p.q.device) % 2 == 0
    storages = [replace(p.pages, row=torch.where(is_first == first, p.pages.row, -1)) for first in (True, False)]
    merged = strided(torch.full_like(p.q, torch.nan)), torch.full(lse.shape, -torch.inf, device=p.q.device)
    # K and V side by side, with something in them before.
    both = torch.ones(110, 2, 2, 32, device=p.q.device)
    dq = torch.ones_like(p.q)
    rest = p.dout, lse.float(), delta.float()
    index = kernels.routing_index(p.q, *p.visits, p.pages.row) if has_index else None
    for pages in storages:
        for kv_heads in (slice(0, 1), slice(1, 2)):
            inputs = p.q, pages, *p.visits, p.scale
            joined = kernels.attend(*inputs, index=index, kv_heads=kv_heads, out=merged)
            assert all(a is b for a, b in zip(joined, merged))
            kernels.attend_backward(
                *inputs, *rest, deterministic, index=index, kv_heads=kv_heads,
                out=(dq, both[:, :, 0], both[:, :, 1]),
            )  # fmt: skip
    for actual, expected in zip(merged, (out, lse)):
        close(actual, expected)
    for actual, expected in zip((dq, both[:, :, 0], both[:, :, 1]), grads):
        close(actual - 1, expected)


@pytest.mark.parametrize(
    "deterministic, block_size, dtype, scratch",
    [
        (False, 16, torch.float32, None),
        (True, 16, torch.float32, 1 << 15),
        (True, 48, torch.float32, None),
        (False, 48, torch.float32, 1 << 15),
        (False, 48, torch.bfloat16, None),
        (True, 48, torch.bfloat16, 1 << 15),
    ],
    ids=str,
)
def test_fresh_gradients_need_no_zeros(deterministic, block_size, dtype, scratch):
    """Storages whose gradients, of any dtype, hold nothing yet, one of them with a block that nobody chose."""
    p = Problem([110], (4, 2), 32, block_size, 4)
    p.chosen = torch.where(p.chosen == 1, -1, p.chosen)
    p.visible = torch.where(p.own == 1, 0, p.visible)
    out, lse, delta, grads = exact(p)
    n_blocks = p.pages.row.shape[1]
    is_first = torch.arange(n_blocks, device=p.q.device) % 2 == 0
    index = kernels.routing_index(p.q, *p.visits, p.pages.row)
    dq = torch.zeros_like(p.q)
    for first in (True, False):
        pages = replace(p.pages, row=torch.where(is_first == first, p.pages.row, -1))
        both, seen = torch.full((2, 110, 2, 32), torch.nan, dtype=dtype, device=p.q.device), []
        kernels.attend_backward(
            p.q, pages, *p.visits, p.scale, p.dout, lse.float(), delta.float(), deterministic, scratch_bytes=scratch,
            index=index, out=(dq, *both), overwrite_dkv=True, dkdv_done=lambda: seen.append(both.clone()),
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
    p = Problem([110], (4, 2), 32, 48, 4)
    out, lse, delta, grads = exact(p)
    index = kernels.routing_index(p.q, *p.visits, p.pages.row)
    for scratch in (FORWARD_SCRATCH, 1 << 15):
        dq, both = torch.ones_like(p.q), torch.ones(110, 2, 2, 32, device=p.q.device)
        close(kernels.attend(p.q, p.pages, *p.visits, p.scale, scratch_bytes=scratch, index=index)[0], out)
        kernels.attend_backward(
            p.q, p.pages, *p.visits, p.scale, p.dout, lse.float(), delta.float(), deterministic, scratch_bytes=scratch,
            index=index, out=(dq, both[:, :, 0], both[:, :, 1]),
        )  # fmt: skip
        for actual, expected in zip((dq, both[:, :, 0], both[:, :, 1]), grads):
            close(actual - 1, expected)
