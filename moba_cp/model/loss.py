"""Cross-entropy of a language model that never holds all logits at once.

Legend: T tokens, H hidden size, V vocabulary.
"""

import functools
from typing import Literal

import torch
from torch import Tensor

from ..dtypes import WIDE
from ..transforms import cast_inputs, once_differentiable, without_autocast

IGNORED_LABEL = -100
# Logits held at a time: 1 GiB in 16 bits. Fewer make more slices, each of which reads and writes the weight's gradient.
MAX_LOGITS = 2**29


def fused(function):
    """Decorator: on a GPU ``function`` is compiled; elsewhere, while something else is traced, and where runs are to be
    bit-identical, it runs as it is: the compiler times kernels that sum in other orders, and takes the fastest."""
    compiled = []

    @functools.wraps(function)
    def call(*args):
        if not args[0].is_cuda or torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
            return function(*args)
        if not compiled:
            # Made here: the compiler takes seconds to import.
            compiled.append(torch.compile(function))
        return compiled[0](*args)

    return call


@fused
def _log_sum_exp(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row of logits [n, V], and its difference to the target's logit; both [n] wide."""
    wide = logits.to(WIDE[logits.dtype])
    lse = wide.logsumexp(-1)
    return lse, lse - wide.gather(1, target[:, None])[:, 0]


@fused
def _to_gradient(logits: Tensor, lse: Tensor, target: Tensor, scale: Tensor) -> None:
    """Overwrite logits [n, V] with the gradient of ``scale`` [n] times the loss."""
    wide = (logits.to(lse.dtype) - lse[:, None]).exp()
    hit = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    logits.copy_((wide - hit.to(wide.dtype)) * scale[:, None])


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes logits slice by slice, in forward and again in backward; keeps only lse [T] in between."""

    @staticmethod
    @without_autocast
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, slice_len: int) -> Tensor:
        lse, loss = (hidden.new_empty(labels.shape, dtype=WIDE[hidden.dtype]) for _ in range(2))
        valid = labels != IGNORED_LABEL
        target = torch.where(valid, labels, 0)
        for rows in _slices(labels, slice_len):
            lse[rows], loss[rows] = _log_sum_exp(hidden[rows] @ weight.T, target[rows])
        ctx.save_for_backward(hidden, weight, target, valid, lse)
        ctx.slice_len = slice_len
        return torch.where(valid, loss, 0)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_loss: Tensor):
        hidden, weight, target, valid, lse = ctx.saved_tensors
        grads = _Gradients(hidden, weight)
        scale = torch.where(valid, grad_loss, 0).to(lse.dtype)
        for rows in _slices(target, ctx.slice_len):
            grads.add(rows, hidden[rows] @ weight.T, lse[rows], target[rows], scale[rows])
        return grads.hidden, grads.weight.to(weight.dtype), None, None


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """The sum over all labels: its gradient is known but for a factor while a slice's logits are there, so they are
    computed once."""

    @staticmethod
    @without_autocast
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, slice_len: int, needs_grad: bool) -> Tensor:
        wide = WIDE[hidden.dtype]
        total = hidden.new_zeros((), dtype=wide)
        valid = labels != IGNORED_LABEL
        target, scale = torch.where(valid, labels, 0), valid.to(wide)
        grads = _Gradients(hidden, weight) if needs_grad else None
        for rows in _slices(labels, slice_len):
            logits = hidden[rows] @ weight.T
            lse, loss = _log_sum_exp(logits, target[rows])
            total += torch.where(valid[rows], loss, 0).sum()
            if grads is not None:
                grads.add(rows, logits, lse, target[rows], scale[rows])
        if grads is not None:
            ctx.save_for_backward(grads.hidden, grads.weight)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_loss: Tensor):
        hidden, weight = ctx.saved_tensors
        return hidden * grad_loss, (weight * grad_loss).to(ctx.dtype), None, None, None


def _slices(labels: Tensor, slice_len: int) -> list[slice]:
    return [slice(start, start + slice_len) for start in range(0, labels.numel(), slice_len)]


class _Gradients:
    """Gradients of hidden [T, H] in its dtype and of the output layer's weight [V, H] wide, slice by slice."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self._inputs = hidden, weight
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.zeros_like(weight, dtype=WIDE[weight.dtype])

    def add(self, rows: slice, logits: Tensor, lse: Tensor, target: Tensor, scale: Tensor) -> None:
        """One slice, whose logits [n, V] are overwritten; ``scale`` [n] multiplies each token's loss."""
        hidden, weight = self._inputs
        _to_gradient(logits, lse, target, scale)
        torch.mm(logits, weight, out=self.hidden[rows])
        self.weight += logits.T @ hidden[rows]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    slice_len: int | None = None,
    reduction: Literal["none", "sum"] = "none",
) -> Tensor:
    """Loss of each token, in nats, or their sum.

    Args:
        hidden: [T, H], last hidden states.
        weight: [V, H] of the output layer, same dtype. Both are cast where autocast is on, float64 excepted.
        labels: [T] int64 in [0, V), or -100 for tokens without a label.
        slice_len: tokens whose logits are held at a time; by default as many as fit into 1 GiB in 16 bits.
        reduction: ``sum`` computes logits once, where ``none`` computes them again for the gradient.

    Returns:
        [T] float32 (float64 for float64 inputs), 0 where the label is -100; of their sum [].
    """
    hidden, weight = cast_inputs(hidden, weight)
    slice_len = slice_len or max(1, MAX_LOGITS // weight.shape[0])
    if reduction == "none":
        return _LinearCrossEntropy.apply(hidden, weight, labels, slice_len)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _SummedLinearCrossEntropy.apply(hidden, weight, labels, slice_len, needs_grad)
