"""Cross-entropy of a language model that never holds all logits at once.

Legend: T tokens, H hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from ..dtypes import WIDE
from ..transforms import cast_inputs, once_differentiable, without_autocast
from .tokenwise import fused

IGNORED_LABEL = -100
# Logits held at a time: 1 GiB in 16 bits. Fewer make more slices, each of which reads and writes the weight's gradient.
MAX_LOGITS = 2**29


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
        wide = WIDE[hidden.dtype]
        lse = hidden.new_empty(labels.shape, dtype=wide)
        loss = hidden.new_empty(labels.shape, dtype=wide)
        valid = labels != IGNORED_LABEL
        target = torch.where(valid, labels, 0)
        for start in range(0, labels.numel(), slice_len):
            rows = slice(start, start + slice_len)
            lse[rows], loss[rows] = _log_sum_exp(hidden[rows] @ weight.T, target[rows])
        ctx.save_for_backward(hidden, weight, target, valid, lse)
        ctx.slice_len = slice_len
        return torch.where(valid, loss, 0)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_loss: Tensor):
        hidden, weight, target, valid, lse = ctx.saved_tensors
        scale = torch.where(valid, grad_loss, 0).to(lse.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype)
        for start in range(0, target.numel(), ctx.slice_len):
            rows = slice(start, start + ctx.slice_len)
            grad = hidden[rows] @ weight.T
            _to_gradient(grad, lse[rows], target[rows], scale[rows])
            torch.mm(grad, weight, out=grad_hidden[rows])
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, slice_len: int | None = None) -> Tensor:
    """Loss of each token, in nats.

    Args:
        hidden: [T, H], last hidden states.
        weight: [V, H] of the output layer, same dtype. Both are cast where autocast is on, float64 excepted.
        labels: [T] int64 in [0, V), or -100 for tokens without a label.
        slice_len: tokens whose logits are held at a time; by default as many as fit into 1 GiB in 16 bits.

    Returns:
        [T] float32 (float64 for float64 inputs), 0 where the label is -100.
    """
    hidden, weight = cast_inputs(hidden, weight)
    slice_len = slice_len or max(1, MAX_LOGITS // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, labels, slice_len)
