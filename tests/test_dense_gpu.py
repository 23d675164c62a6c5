"""The fused kernels on a GPU against float64, by the rule of tests: as good as the same maths in plain PyTorch."""

import importlib.util

import numpy as np
import pytest
import torch

from moba_cp import dense, full_attention
from tests.helpers.cases import Case, run, run_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("out", "dq", "dk", "dv", "lse")
FACTORS = (2, 3, 3, 3, 2)


def plain_low_precision(q, k, v, cu_seqlens, return_lse=True):
    """Full attention with every product in the dtype of the inputs, differentiable by autograd."""
    group = q.shape[1] // k.shape[1]
    position = torch.arange(q.shape[0], device=q.device)
    document = torch.searchsorted(cu_seqlens.to(q.device).long(), position, right=True)
    seen = (document[:, None] == document) & (position <= position[:, None])
    score = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
    score = score.masked_fill(~seen, -torch.inf)
    out = torch.einsum("hnm,mhd->nhd", score.softmax(-1), v.repeat_interleave(group, 1))
    return out, score.float().logsumexp(-1).T


def case_on_gpu(lengths, heads, dim, seed=0) -> Case:
    torch.manual_seed(seed)
    n, (n_q, n_kv) = sum(lengths), heads
    q, k, v, dout = (torch.randn(n, h, dim, dtype=torch.float64, device="cuda") for h in (n_q, n_kv, n_kv, n_q))
    return Case(q, k, v, dout, torch.tensor([0, *lengths]).cumsum(0).int(), 16, 1)


def worst(results, exact) -> list[float]:
    return [(a.double() - e).abs().max().item() for a, e in zip(results, exact)]


@pytest.mark.parametrize(
    "dim, dtype",
    [(64, torch.bfloat16), (128, torch.bfloat16), (200, torch.bfloat16), (128, torch.float16)],
    ids=["64 bf16", "128 bf16", "200 bf16", "128 fp16"],
)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("lengths", [[1000], [512, 0, 1, 300, 211], [64] * 9], ids=["one", "packed", "short"])
def test_backends_are_as_good_as_plain_torch(lengths, heads, dim, dtype):
    case = case_on_gpu(lengths, heads, dim)
    low = case.to(dtype)
    # What the kernels see, in float64: the rounding of the inputs is not theirs.
    exact = run_reference(low.to(torch.float64), full=True)
    plain = worst(run(plain_low_precision, low, low.cu_seqlens), exact)
    tried = []
    for name, backend in dense.BACKENDS.items():
        if backend.refusal(low.q, False) is not None or (name == "cudnn" and min(lengths) < 64):
            continue
        tried.append(name)
        ours = worst(run(full_attention, low, cu_seqlens=low.cu_seqlens, backend=name), exact)
        for what, error, allowed, factor in zip(NAMES, ours, plain, FACTORS):
            assert error <= factor * allowed + 1e-5, f"{name} {what}: {error} against {allowed}"
    assert {"flash", "plain"} <= set(tried)
    assert "cudnn" in tried or dim > 128 or min(lengths) < 64 or torch.cuda.get_device_capability() < (9, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_flash_attn_4_serves_where_it_is_installed(dim, dtype):
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        pytest.skip("flash-attn-4 is not installed")
    q = torch.empty(256, 4, dim, device="cuda", dtype=dtype)
    assert dense.BACKENDS["fa4"].refusal(q, False) is None


def test_the_choice_of_kernels():
    q = torch.randn(256, 4, 128, device="cuda", dtype=torch.bfloat16)
    choose = lambda x, bounds, **options: (
        dense.choose_backend(x, dense.build_ranges([(0, 256)], [(0, 256)], np.array(bounds)), **options).name
    )
    best = "fa4" if dense.BACKENDS["fa4"].refusal(q, False) is None else None
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    assert choose(q, [0, 256]) == (best or ("cudnn" if hopper else "flash"))
    assert choose(q, [0, 100, 256]) == (best or "flash"), "cuDNN would plan anew for every batch"
    assert choose(q, [0, 256], deterministic=True) == "flash"
    assert choose(q.float(), [0, 256]) == "plain"
    assert choose(q[..., :36], [0, 256]) == "plain"


def test_deterministic_gradients_are_the_same_bits():
    case = case_on_gpu([2048], (8, 2), 128).to(torch.bfloat16)
    before = torch.are_deterministic_algorithms_enabled()
    first, second = (run(full_attention, case, cu_seqlens=case.cu_seqlens, deterministic=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.are_deterministic_algorithms_enabled() == before


def test_gradients_of_strided_inputs():
    # Slices of one tensor, as a fused projection gives them: PyTorch's cache of cuDNN plans looks at strides.
    torch.manual_seed(0)
    for heads in (4, 8):
        mixed = torch.randn(512, 3 * heads, 128, device="cuda", dtype=torch.bfloat16)
        q, k, v = (x.detach() for x in mixed.split(heads, 1))
        dout = torch.randn(heads, 512, 128, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
        case = Case(q, k, v, dout, torch.tensor([0, 512], dtype=torch.int32), 16, 1)
        low = worst(run(plain_low_precision, case, case.cu_seqlens), run_reference(case.to(torch.float64), full=True))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        assert not leaves[0].is_contiguous()
        out, lse = full_attention(*leaves, return_lse=True)
        out.backward(dout)
        ours = worst([out, *(x.grad for x in leaves), lse], run_reference(case.to(torch.float64), full=True))
        for what, error, allowed, factor in zip(NAMES, ours, low, FACTORS):
            assert error <= factor * allowed + 1e-5, f"{heads} heads {what}: {error} against {allowed}"
