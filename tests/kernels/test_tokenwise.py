"""Norms, SwiGLU and rotation, with their gradients, against plain PyTorch in float64."""

import pytest
import torch

from moba_cp import eager, kernels
from tests.helpers.kernel_inputs import DEVICE, poisoned

EPS = 1e-5
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float32]


def random(*shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def check(ours, inputs, outputs, dtype):
    """``ours(backend, *inputs, *outputs)`` of the kernels, against plain PyTorch on the same values in float64."""
    with poisoned():
        made = [torch.full_like(x, torch.nan) if x.isnan().all() else x.clone() for x in outputs]
        got = [*(ours(kernels, *inputs, *made) or ()), *made]
    wide = lambda x: x.double() if isinstance(x, torch.Tensor) else x
    exact = [x.double() for x in outputs]
    expected = [*(ours(eager, *map(wide, inputs), *exact) or ()), *exact]
    # 16-bit results are rounded once. What is computed in float32 is off by some roundings, a sum over tokens by more.
    narrow, wide = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    for x, y in zip(got, expected, strict=True):
        if y is None:
            assert x is None
            continue
        unit = 64 * wide if x.dim() == 1 else max(narrow, 16 * wide)
        error = (x.double() - y).abs()
        assert error.max() < 4 * unit * y.abs().max() and error.mean() < unit * y.abs().mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, hidden", [(37, 48), (5, 1030), (2100, 16)])
def test_rms_norm(n, hidden, dtype):
    x, dy, residual = (random(n, hidden, seed=seed, dtype=dtype) for seed in range(3))
    weight = random(hidden, seed=3, dtype=dtype)
    check(lambda ops, x, w: (ops.rms_norm(x, w, EPS),), [x, weight], [], dtype)
    written = torch.full_like(x, torch.nan)
    backward = lambda ops, dy, x, w, residual, dx: ops.rms_norm_backward(dy, x, w, EPS, residual, dx)
    check(backward, [dy, x, weight, residual], [written], dtype)
    # The other way's gradient may lie where this one is written.
    check(backward, [dy, x, weight, None], [residual], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, width", [(37, 48), (3, 1100)])
def test_swiglu(n, width, dtype):
    gate_up, dout = random(n, 2 * width, seed=0, dtype=dtype), random(n, width, seed=1, dtype=dtype)
    check(lambda ops, x: (ops.swiglu(x),), [gate_up], [], dtype)
    check(lambda ops, x, dout: ops.swiglu_backward(x, dout), [gate_up, dout], [], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("n, n_kv, group, dim", [(37, 2, 3, 20), (70, 1, 1, 128), (4200, 1, 2, 16)])
def test_split_rotate(n, n_kv, group, dim, normed, dtype):
    mixed = random(n, n_kv, group + 2, dim, seed=0, dtype=dtype)
    angles = random(n, dim // 2, seed=1, dtype=torch.float32)
    norms = [random(dim, seed=seed, dtype=dtype) for seed in (2, 3)] if normed else [None, None]
    heads = [n_kv * group, n_kv, n_kv]
    written = [torch.full((n, count, dim), torch.nan, dtype=dtype, device=DEVICE) for count in heads]
    rotate = lambda ops, mixed, cos, sin, qn, kn, q, k, v: ops.split_rotate(mixed, cos, sin, qn, kn, EPS, q, k, v)
    check(rotate, [mixed, angles.cos(), angles.sin(), *norms], written, dtype)
    grads = [random(n, count, dim, seed=4 + i, dtype=dtype) for i, count in enumerate(heads)]
    back = lambda ops, dq, dk, dv, cos, sin, qn, kn, mixed: ops.split_rotate_backward(
        dq, dk, dv, cos, sin, qn, kn, EPS, mixed
    )
    check(back, [*grads, angles.cos(), angles.sin(), *norms, mixed if normed else None], [], dtype)


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(n):
    x = torch.randn(n, 32, device=DEVICE)
    assert kernels.rms_norm(x, x.new_ones(32), EPS).shape == (n, 32)
    assert [y.shape for y in kernels.rms_norm_backward(x, x, x.new_ones(32), EPS, None, x.clone())] == [(n, 32), (32,)]
    assert kernels.swiglu(x).shape == (n, 16)
    assert [y.shape for y in kernels.swiglu_backward(x, x[:, :16])] == [(n, 16), (n, 32)]
    heads = torch.randn(n, 2, 4, device=DEVICE)
    assert kernels.split_rotate_backward(heads, heads, heads, x, x, None, None, EPS, None)[0].shape == (n, 2, 3, 4)
