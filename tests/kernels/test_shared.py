"""Selections shared by the query heads of a KV head: the same results as with a copy for each of them."""

from dataclasses import replace

import pytest
import torch

from moba_cp import kernels
from tests.helpers.kernel_inputs import Problem, close, exact, poisoned, strided

# lengths, (Hq, Hkv), D, B, k. In float32 a tile holds 32 keys: B = 16 and 32 are short blocks, the others long ones.
PROBLEMS = [
    ([70, 0, 30], (4, 1), 16, 16, 4),
    ([60, 50], (6, 2), 24, 48, 3),
    ([90], (10, 2), 16, 32, 3),
    ([40], (4, 2), 16, 32, 1),
]


def shared(problem) -> tuple[Problem, torch.Tensor]:
    """A problem in which all query heads of a KV head chose as the first, and the selection [N, Hkv, S] without
    copies."""
    p = Problem(*problem)
    group = p.q.shape[1] // p.k.shape[1]
    chosen = p.chosen[:, ::group].contiguous()
    p.chosen = chosen.repeat_interleave(group, 1)
    return p, chosen


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_forward_and_backward(problem, deterministic):
    p, chosen = shared(problem)
    out, lse, delta, grads = exact(p)
    pages = replace(p.pages, k=strided(p.k), v=strided(p.v))
    visits = chosen, p.own, p.visible
    with poisoned():
        index = kernels.routing_index(p.q, *visits, p.pages.row)
        size = kernels.index_size(p.q, p.k.shape[1], p.pages.row.shape[1], p.top_k, p.q.shape[1] // p.k.shape[1])
        assert index.numel() == size == p.q.shape[0] * p.k.shape[1] * p.top_k + p.pages.row.numel() + 1
        ours, ours_lse = kernels.attend(strided(p.q), pages, *visits, p.scale, index=index)
        close(ours, out)
        close(ours_lse, lse)
        rest = p.scale, strided(p.dout), lse.float(), delta.float(), deterministic
        for local in (None, torch.float32):
            actual = kernels.attend_backward(strided(p.q), pages, *visits, *rest, local_dtype=local, index=index)
            for x, expected in zip(actual, grads):
                close(x, expected)


def test_some_heads_and_rows_at_a_time():
    p, chosen = shared(([50, 30], (6, 3), 32, 32, 3))
    out, lse, delta, grads = exact(p)
    visits = chosen, p.own, p.visible
    # Room for one head: heads are cut. Room for a part of one: rows are cut too.
    for scratch in (1 << 16, 1 << 14):
        with poisoned():
            ours, ours_lse = kernels.attend(p.q, p.pages, *visits, p.scale, scratch_bytes=scratch)
            rest = p.scale, p.dout, lse.float(), delta.float(), False
            actual = kernels.attend_backward(
                p.q, p.pages, *visits, *rest, local_dtype=torch.float32, scratch_bytes=scratch
            )
        close(ours, out)
        close(ours_lse, lse)
        for x, expected in zip(actual, grads):
            close(x, expected)


@pytest.mark.parametrize("with_index", [False, True], ids=["no index", "index"])
def test_one_kv_head_after_the_other(with_index):
    p, chosen = shared(([45, 30], (6, 3), 16, 16, 3))
    out, lse, delta, grads = exact(p)
    visits = chosen, p.own, p.visible
    index = kernels.routing_index(p.q, *visits, p.pages.row) if with_index else None
    made = torch.full_like(p.q, torch.nan), torch.full(p.q.shape[:2], torch.nan, device=p.q.device)
    found = torch.full_like(p.q, torch.nan), torch.zeros_like(p.k), torch.zeros_like(p.v)
    for head in range(3):
        some = dict(index=index, kv_heads=slice(head, head + 1))
        kernels.attend(p.q, p.pages, *visits, p.scale, out=made, overwrite_out=True, **some)
        rest = p.scale, p.dout, lse.float(), delta.float()
        kernels.attend_backward(p.q, p.pages, *visits, *rest, out=found, overwrite_dq=True, **some)
    close(made[0], out)
    close(made[1], lse)
    for x, expected in zip(found, grads):
        close(x, expected)


def test_more_heads_than_a_tile_has_rows():
    p, chosen = shared(([40], (40, 1), 16, 16, 2))
    out, lse, delta, grads = exact(p)
    visits = chosen, p.own, p.visible
    size = kernels.index_size(p.q, 1, p.pages.row.shape[1], 2, 40)
    index = kernels.routing_index(p.q, *visits, p.pages.row)
    assert index.numel() == size
    close(kernels.attend(p.q, p.pages, *visits, p.scale, index=index)[0], out)
    rest = p.scale, p.dout, lse.float(), delta.float()
    for x, expected in zip(kernels.attend_backward(p.q, p.pages, *visits, *rest, index=index), grads):
        close(x, expected)
