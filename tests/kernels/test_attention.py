"""Forward and backward on one storage, against the plain PyTorch path in float64."""

from dataclasses import replace

import pytest
import torch

from moba_cp import eager, kernels
from moba_cp.kernels import tuned
from moba_cp.kernels.merge import merge_visits
from tests.helpers.kernel_inputs import DEVICE, Problem, close, exact, poisoned, strided

# lengths, (Hq, Hkv), D, B, k. In float32 a tile holds 32 keys: B = 16 and 32 are short blocks, the others long ones.
PROBLEMS = [
    ([100], (2, 1), 32, 16, 3),
    ([30, 0, 130, 20], (4, 2), 40, 64, 3),
    ([77], (2, 2), 64, 32, 1),
    ([150, 40], (3, 1), 16, 48, 3),
    ([33], (1, 1), 24, 16, 20),
]


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
    p = Problem([40, 30], (3, 3), 32, 32, 3)
    out, lse, delta, grads = exact(p)
    # Room for one head: heads are cut. Room for a part of one: rows are cut too.
    for scratch in (1 << 15, 1 << 14):
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
    tile = tuned.dkdv_tile(16, 16, torch.float32, p.q.device)
    monkeypatch.setattr(tuned, "dkdv_tile", lambda *_: tile._replace(task_rows=rows))
    _, lse, delta, grads = exact(p)
    n_lists, n_visits = p.pages.row.numel(), p.q.shape[0] * 2 * 3
    assert (n_lists <= n_visits // rows) == (rows == 32)
    with poisoned():
        rest = p.scale, p.dout, lse.float(), delta.float(), deterministic
        actual = kernels.attend_backward(p.q, p.pages, *p.visits, *rest, local_dtype=torch.float32)
    assert not grads[1][160:170].any()
    for x, expected in zip(actual, grads):
        close(x, expected)


def test_the_default_dtype_changes_nothing():
    """Sums have a dtype of their own: at once, where rows are cut, and where results are rounded afterwards."""
    p = Problem([60], (1, 1), 16, 48, 3)
    _, lse, delta, _ = exact(p)
    args = p.scale, p.dout, lse.float(), delta.float()

    def run():
        results = list(kernels.attend(p.q, p.pages, *p.visits, p.scale))
        for scratch in (None, 1 << 13):
            results += kernels.attend_backward(
                p.q, p.pages, *p.visits, *args, True, local_dtype=torch.float32, scratch_bytes=scratch
            )
        out = torch.zeros_like(p.q), *(torch.zeros_like(x, dtype=torch.float16) for x in (p.k, p.v))
        results += kernels.attend_backward(
            p.q, p.pages, *p.visits, *args, True, scratch_bytes=1 << 13, out=out, overwrite_dkv=True
        )
        return results

    expected = run()
    for dtype in (torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            for actual, before in zip(run(), expected, strict=True):
                assert actual.dtype == before.dtype and torch.equal(actual, before), dtype
        finally:
            torch.set_default_dtype(torch.float32)


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
    parts, parts_lse = torch.stack(outs, 2)[:, :, :, None], torch.stack(lses, 2)[..., None]
    merge_visits(parts, parts_lse, out, lse)
    expected, expected_lse = eager.attention.merge([x.double() for x in outs], [x.double() for x in lses])
    close(lse, expected_lse)
    close(out, expected)
    assert all(
        torch.equal(x, y)
        for x, y in zip([*parts[:, :, :, 0].unbind(2), *parts_lse[..., 0].unbind(2)], kept, strict=True)
    )


def test_head_dim_too_large_is_named():
    p = Problem([20], (1, 1), 264, 16, 2)
    with pytest.raises(ValueError, match="head_dim=264 is above 256"):
        kernels.attend(p.q, p.pages, *p.visits, p.scale)
