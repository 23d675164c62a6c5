"""The token-wise parts against autograd on their formulas, in float64, and on a GPU compiled against plain."""

import pytest
import torch
import torch.nn.functional as F

from moba_cp.model import tokenwise

N, H, G, R, D, EPS = 9, 12, 2, 3, 8, 1e-5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random(*shape, seed=0, device="cpu", dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device, dtype)


def gradients(out, inputs, dout):
    return torch.autograd.grad(out, inputs, dout)


def test_rms_norm():
    x, weight, dy, residual = random(N, H).requires_grad_(), random(H, seed=1).requires_grad_(), random(N, H, seed=2), 1
    residual = random(N, H, seed=3)
    out = F.rms_norm(x, (H,), weight, EPS)
    torch.testing.assert_close(tokenwise.rms_norm(x, weight, EPS), out)
    dx, dweight = gradients(out, (x, weight), dy)
    got = torch.empty_like(x)
    with torch.no_grad():
        again, got_weight = tokenwise.rms_norm_backward(dy, x, weight, EPS, residual, got)
        torch.testing.assert_close((again, got_weight, got), (out, dweight, dx + residual))
        tokenwise.rms_norm_backward(dy, x, weight, EPS, None, residual)
    torch.testing.assert_close(residual, got)


def test_swiglu():
    gate_up, dout = random(N, 2 * H).requires_grad_(), random(N, H, seed=1)
    gate, up = gate_up.chunk(2, -1)
    out = F.silu(gate) * up
    torch.testing.assert_close(tokenwise.swiglu(gate_up), out)
    torch.testing.assert_close(tokenwise.swiglu_backward(gate_up, dout), (out, *gradients(out, gate_up, dout)))


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
        tokenwise.split_rotate(mixed, angles.cos(), angles.sin(), *norms, EPS, *got)
        torch.testing.assert_close(got, heads)
        grads = tokenwise.split_rotate_backward(
            *douts, angles.cos(), angles.sin(), *norms, EPS, mixed if normed else None
        )
    torch.testing.assert_close(grads[: len(inputs)], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [4096, 777])
def test_compiled_equals_plain_within_rounding(n_tokens):
    """bfloat16 on a GPU, compiled, against the same functions in float64."""
    hidden, dim = 512, 128
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    x, dy, residual = (random(n_tokens, hidden, seed=i, **bf16) for i in range(3))
    weight = random(hidden, seed=4, **bf16)
    gate_up, dout = random(n_tokens, 2 * hidden, seed=5, **bf16), random(n_tokens, hidden, seed=6, **bf16)
    mixed = random(n_tokens, 2, 4, dim, seed=7, **bf16)
    dq, dk, dv = random(n_tokens, 4, dim, **bf16), random(n_tokens, 2, dim, **bf16), random(n_tokens, 2, dim, **bf16)
    angles = random(n_tokens, dim // 2, seed=8, device="cuda", dtype=torch.float32)
    cos, sin, norms = angles.cos(), angles.sin(), [random(dim, seed=i, **bf16) for i in (9, 10)]
    dx = torch.empty_like(x)

    def all_of(cast):
        out_dx, q, k, v = (cast(y) for y in (dx, dq.new_empty(dq.shape), dk.new_empty(dk.shape), dv.clone()))
        results = [tokenwise.rms_norm(cast(x), cast(weight), EPS)]
        results += tokenwise.rms_norm_backward(cast(dy), cast(x), cast(weight), EPS, cast(residual), out_dx)
        results += [out_dx, tokenwise.swiglu(cast(gate_up)), *tokenwise.swiglu_backward(cast(gate_up), cast(dout))]
        tokenwise.split_rotate(cast(mixed), cast(cos), cast(sin), *map(cast, norms), EPS, q, k, v)
        results += [q, k, v]
        results += tokenwise.split_rotate_backward(
            cast(dq), cast(dk), cast(dv), cast(cos), cast(sin), *map(cast, norms), EPS, cast(mixed)
        )
        return results

    compiled, exact = all_of(lambda y: y), all_of(lambda y: y.double().cpu())
    for got, want in zip(compiled, exact, strict=True):
        scale = want.abs().max()
        assert (got.cpu().double() - want).abs().max() < 2**-7 * scale
        # One rounding: half a unit in the last place is 2^-9 of a value.
        assert (got.cpu().double() - want).abs().mean() < 2**-9 * want.abs().mean()
