"""Counts and offsets beyond 31 bits: on shapes alone, and on a GPU with as much memory as that takes."""

import pytest
import torch

from moba_cp import kernels
from moba_cp.blocks import Pages
from moba_cp.kernels import common, hopper, tuned, work
from tests.helpers.kernel_inputs import DEVICE

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("n_kv, group", [(1, 16), (16, 1)])
@pytest.mark.parametrize("has_sums", [True, False], ids=["sums", "no sums"])
def test_tables_of_visits_stay_within_31_bits(n_kv, group, has_sums):
    """Where q is so large that the scratch has room for more; nothing is allocated."""
    n_rows, dim, n_slots = 12_500_000, 64, 64
    meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    q, k = meta(n_rows, n_kv * group, dim), meta(n_rows, n_kv, dim)
    row = meta(n_kv, n_rows // 512, dtype=torch.int64)
    pages = Pages(k, k, row, row.int(), row[0].int(), 512)
    chosen = meta(n_rows, n_kv * group, n_slots - 1, dtype=torch.int32)
    call = work.Call(q, pages, chosen, chosen[:, 0, 0], chosen[:, 0, 0], 1.0, slice(0, n_kv), None, None)
    mode = work.DQ_ATOMIC.value
    tile = tuned.dkdv_tile(dim, 512, torch.bfloat16, torch.device("cpu"))
    row_slices, kv_step, _ = work._backward_slices(call, mode, tile, has_sums, False)
    rows = max(some.stop - some.start for some in row_slices)
    assert row_slices[-1].stop == n_rows and 3 * rows * kv_step * group * n_slots < 2**31


@pytest.mark.parametrize(
    "n_rows, group, n_kv, whole",
    [
        (1 << 20, 1, 4, True),  # a rank's 4 of 16 heads of 1,048,576 tokens
        (1 << 20, 1, 1, True),
        (1 << 18, 4, 8, True),
        (1 << 21, 4, 8, True),
        (1 << 21, 1, 1, False),
        (1 << 19, 16, 2, False),
    ],
)
def test_rows_of_a_kv_head_are_cut_only_where_it_is_much(n_rows, group, n_kv, whole):
    """D = 128, blocks of 512, top-8; nothing is allocated."""
    meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    q, k = meta(n_rows, n_kv * group, 128), meta(n_rows, n_kv, 128)
    row = meta(n_kv, n_rows // 512, dtype=torch.int64)
    pages = Pages(k, k, row, row.int(), row[0].int(), 512)
    chosen = meta(n_rows, n_kv * group, 7, dtype=torch.int32)
    call = work.Call(q, pages, chosen, chosen[:, 0, 0], chosen[:, 0, 0], 1.0, slice(0, n_kv), None, None)
    assert (work.index_size(q, n_kv, n_rows // 512, 8) > 0) == whole
    tile = tuned.SPECIALIZED["dkdv", 128, "long"]
    for local in (True, False):
        row_slices, kv_step, direct = work._backward_slices(call, work.DQ_NONE.value, tile, local, True)
        assert (len(row_slices) == 1) == direct == whole
        # Parts of dQ and the tables of a slice.
        taken = (row_slices[0].stop - row_slices[0].start) * kv_step * group * 8 * (256 + work.VISIT_BYTES)
        assert taken <= work.whole_head_bytes(max(work.BACKWARD_SCRATCH, q.nbytes))
    # Scratch that was asked for is kept.
    few = work._backward_slices(call._replace(scratch_bytes=1 << 26), work.DQ_NONE.value, tile, True, True)[0]
    assert max(some.stop - some.start for some in few) * kv_step * group * 8 * 276 <= 9 << 23


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="bytes of a request is 2147483648, .* up to 2147483647; use larger blocks"):
        common.check_limit("the number of bytes of a request", 2**31, "use larger blocks")
    common.check_limit("the number of bytes of a request", 2**31 - 1, "use larger blocks")
    page = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    k = torch.zeros(1, 1, 16, device=DEVICE).expand(2**31, 1, 16)
    pages = Pages(k, k, page.long(), page, page[0], 16)
    with pytest.raises(ValueError, match="rows of a storage of K and V is 2147483648"):
        kernels.attend(k[:4], pages, page.expand(4, 1, 1), None, None, 1.0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("portable", [True, False], ids=["portable", "best"])
def test_blocks_longer_than_31_bits_of_elements(monkeypatch, portable):
    """K and V lie far apart, as columns of something wide: 6 GB that a few rows attend to."""
    if portable:
        monkeypatch.setattr(hopper, "runs_on", lambda device: False)
    block_size, dim, stride = 65_536, 64, 40_960
    assert (block_size - 128) * stride > 2**31
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=g)
    wide = torch.empty(block_size, 1, stride, dtype=torch.bfloat16, device="cuda")
    far = wide[..., :dim], wide[..., dim : 2 * dim]
    near = draw(block_size, 1, dim), draw(block_size, 1, dim)
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    q, dout = draw(300, 1, dim), draw(300, 1, dim)
    chosen = torch.zeros(300, 1, 1, dtype=torch.int32, device="cuda")
    page = torch.zeros(1, 1, dtype=torch.int32, device="cuda")

    def run(k, v):
        pages = Pages(k, v, page.long(), page, torch.full_like(page[0], block_size), block_size)
        out, lse = kernels.attend(q, pages, chosen, None, None, dim**-0.5)
        delta = kernels.row_sums(dout, out.bfloat16())
        rest = dim**-0.5, dout, lse, delta, True
        return out, lse, *kernels.attend_backward(q, pages, chosen, None, None, *rest)

    for ours, expected in zip(run(*far), run(*near), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
@needs_gpu
def test_more_than_31_bits_of_rows_and_heads():
    """Sums of rows, and single rows added; inputs are repeated rather than stored."""
    n_rows, n_heads, dim = 2**24 + 1, 128, 16
    a = torch.randn(1, 1, dim, device="cuda").expand(n_rows, n_heads, dim)
    sums = kernels.row_sums(a, a)
    assert sums.numel() > 2**31 and (sums == sums[0, 0]).all()
    torch.testing.assert_close(sums[0, 0], a[0, 0].square().sum())
    del sums
    out = torch.zeros(n_rows, n_heads, 1, device="cuda")
    index = torch.full((n_rows, n_heads, 1), -1, dtype=torch.int32, device="cuda")
    index[-1, -1] = 0
    kernels.add_rows(out, torch.full((1, 1), 3.0, device="cuda"), index)
    assert out[-1, -1, 0] == 3 and out.count_nonzero() == 1


@pytest.mark.gpu
@needs_gpu
def test_more_than_31_bits_of_chosen_blocks():
    """Every row of every head goes to one place by its third slot; the choice is repeated rather than stored."""
    n_rows, n_heads, n_slots = 2**20 + 1, 128, 16
    chosen = torch.arange(n_slots, dtype=torch.int32, device="cuda").expand(n_rows, n_heads, n_slots)
    chosen = chosen[:1].contiguous().expand(n_rows, n_heads, n_slots)
    place = torch.full((1, n_slots), -1, dtype=torch.int32, device="cuda")
    place[0, 2] = 0
    assert chosen.numel() > 2**31
    counts = kernels.count_choices(chosen, place, 1 << 16).sum(1)
    assert (counts[0] == n_rows * n_heads).all() and (counts[1, 0, 2] == n_rows * n_heads << 16)
    slots, ends = kernels.list_rows(chosen, place, 1)
    assert slots.dtype == torch.int64 and ends.tolist() == [n_rows * n_heads]
    expected = torch.arange(n_rows * n_heads, device="cuda") * n_slots + 2
    assert torch.equal(slots[: n_rows * n_heads], expected)
