"""The token-wise parts of a layer against autograd on their formulas, in float64."""

import pytest
import torch
import torch.nn.functional as F

from moba_cp import eager

N, H, G, R, D, EPS = 9, 12, 2, 3, 8, 1e-5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(out, inputs, dout):
    return torch.autograd.grad(out, inputs, dout)


def test_rms_norm():
    x, weight, dy, residual = random(N, H).requires_grad_(), random(H, seed=1).requires_grad_(), random(N, H, seed=2), 1
    residual = random(N, H, seed=3)
    out = F.rms_norm(x, (H,), weight, EPS)
    torch.testing.assert_close(eager.rms_norm(x, weight, EPS), out)
    dx, dweight = gradients(out, (x, weight), dy)
    got = torch.empty_like(x)
    with torch.no_grad():
        again, got_weight = eager.rms_norm_backward(dy, x, weight, EPS, residual, got)
        torch.testing.assert_close((again, got_weight, got), (out, dweight, dx + residual))
        eager.rms_norm_backward(dy, x, weight, EPS, None, residual)
    torch.testing.assert_close(residual, got)


def test_swiglu():
    gate_up, dout = random(N, 2 * H).requires_grad_(), random(N, H, seed=1)
    gate, up = gate_up.chunk(2, -1)
    out = F.silu(gate) * up
    torch.testing.assert_close(eager.swiglu(gate_up), out)
    torch.testing.assert_close(eager.swiglu_backward(gate_up, dout), (out, *gradients(out, gate_up, dout)))


@pytest.mark.parametrize("normed", [False, True])
def test_split_rotate(normed):
    mixed, angles = random(N, G, R + 2, D).requires_grad_(), random(N, D // 2, seed=1)
    norms = [random(D, seed=seed).requires_grad_() for seed in (2, 3)] if normed else [None, None]
    heads = [mixed[:, :, :R].flatten(1, 2), mixed[:, :, R], mixed[:, :, R + 1]]
    if normed:
        heads[:2] = [F.rms_norm(x, (D,), weight, EPS) for x, weight in zip(heads, norms)]
    # Each pair as a complex number, times a number of length one.
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    for i in (0, 1):
        turned = torch.complex(*heads[i].chunk(2, -1)) * turn
        heads[i] = torch.cat((turned.real, turned.imag), -1)
    got = [torch.empty_like(x) for x in heads]
    douts = [random(*x.shape, seed=4 + i) for i, x in enumerate(heads)]
    inputs = [mixed, *norms] if normed else [mixed]
    expected = torch.autograd.grad(heads, inputs, douts)
    with torch.no_grad():
        eager.split_rotate(mixed, angles.cos(), angles.sin(), *norms, EPS, *got)
        torch.testing.assert_close(got, heads)
        grads = eager.split_rotate_backward(*douts, angles.cos(), angles.sin(), *norms, EPS, mixed if normed else None)
    torch.testing.assert_close(grads[: len(inputs)], expected)
