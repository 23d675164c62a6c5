"""torch's default dtype, which users may set, changes no result."""

import pytest
import torch

from moba_cp import MoBAConfig, full_attention, moba_attention, reference
from tests.cp.test_moba import across_ranks
from tests.helpers.cases import random_case, run
from tests.helpers.distributed import run_threads

WAYS = [
    ("zigzag", False, "auto"),
    ("contiguous", False, "query"),
    ("zigzag", False, "allgather"),
    ("zigzag", True, "auto"),
]


def _of_all_ways():
    case = random_case(3, multiple=4, dtype=torch.float32)
    results = run(moba_attention, case, MoBAConfig(case.block_size, case.top_k), cu_seqlens=case.cu_seqlens)
    results += run(full_attention, case, cu_seqlens=case.cu_seqlens)
    results += run(reference.moba_attention, case, case.block_size, case.top_k, cu_seqlens=case.cu_seqlens)
    for layout, full, exchange in WAYS:
        results += run_threads(2, lambda comm: across_ranks(comm, case, layout, full, exchange)[0])[0]
    return results


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_forward_and_backward_are_the_same(dtype):
    expected = _of_all_ways()
    torch.set_default_dtype(dtype)
    try:
        for actual, before in zip(_of_all_ways(), expected, strict=True):
            assert actual.dtype == before.dtype
            torch.testing.assert_close(actual, before, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
