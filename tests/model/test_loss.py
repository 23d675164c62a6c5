"""The sliced cross-entropy against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moba_cp.model import loss as loss_module
from moba_cp.model.loss import linear_cross_entropy

T, H, V = 37, 24, 53


def _inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    labels[[0, 5, T - 1]] = -100
    grad = torch.randn(T, generator=generator, dtype=torch.float64)
    return hidden, weight, labels, grad


@pytest.mark.parametrize("slice_len", [1, 8, 36, 37, 1000, None])
def test_equals_cross_entropy_of_all_logits(slice_len):
    hidden, weight, labels, grad = _inputs(torch.float64)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=-100)
    grads = torch.autograd.grad(expected, (hidden, weight), grad)

    loss = linear_cross_entropy(hidden, weight, labels, slice_len)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight), grad), grads, rtol=0, atol=1e-12)
    assert loss[labels == -100].eq(0).all()


@pytest.mark.parametrize("slice_len", [8, None])
def test_the_sum_computes_logits_once(slice_len, monkeypatch):
    hidden, weight, labels, _ = _inputs(torch.float64)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=-100)
    grads = torch.autograd.grad(0.3 * expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, slice_len, "sum")
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    monkeypatch.setattr(loss_module, "_to_gradient", None)
    for _ in range(2):
        got = torch.autograd.grad(0.3 * loss, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(got, grads, rtol=0, atol=1e-12)
    # Where no gradient is wanted none is computed.
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, slice_len, "sum"), expected)


def test_bf16_is_as_close_as_plain_pytorch():
    exact = [x.detach().double().requires_grad_() for x in _inputs(torch.bfloat16)[:2]]
    hidden, weight, labels, grad = _inputs(torch.bfloat16)

    def errors(loss, inputs):
        grads = torch.autograd.grad(loss, inputs, grad.to(loss.dtype))
        return [(x.double() - y).abs().max().item() for x, y in zip((loss, *grads), reference)]

    loss = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none")
    reference = [loss.detach(), *torch.autograd.grad(loss, exact, grad)]
    plain = errors(F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none"), (hidden, weight))
    ours_loss = linear_cross_entropy(hidden, weight, labels, 8)
    assert ours_loss.dtype == torch.float32
    for ours, theirs, factor in zip(errors(ours_loss, (hidden, weight)), plain, (2, 3, 3)):
        assert ours <= factor * theirs + 1e-5


def test_logits_never_stand_whole():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, weight, labels, grad = _inputs(torch.float32)
    with Watch():
        linear_cross_entropy(hidden, weight, labels, 4).backward(grad.float())
    assert largest == max(4 * V, T * H, V * H) < T * V
