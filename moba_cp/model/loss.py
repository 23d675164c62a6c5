"""Cross-entropy of a language model that never holds all logits at once.

Legend: T tokens, H hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from ..transforms import cast_inputs, once_differentiable, without_autocast

IGNORED_LABEL = -100
# Logits held at a time: 256 MiB in float32.
MAX_LOGITS = 2**26


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes logits slice by slice, in forward and again in backward; keeps only lse [T] in between."""

    @staticmethod
    @without_autocast
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, slice_len: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        lse = hidden.new_empty(labels.shape, dtype=wide)
        loss = hidden.new_empty(labels.shape, dtype=wide)
        valid = labels != IGNORED_LABEL
        target = torch.where(valid, labels, 0)
        for start in range(0, labels.numel(), slice_len):
            rows = slice(start, start + slice_len)
            logits = (hidden[rows] @ weight.T).to(wide)
            torch.logsumexp(logits, -1, out=lse[rows])
            torch.sub(lse[rows], logits.gather(1, target[rows, None])[:, 0], out=loss[rows])
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
            grad = (hidden[rows] @ weight.T).to(lse.dtype).sub_(lse[rows, None]).exp_()
            grad.scatter_add_(1, target[rows, None], grad.new_full((grad.shape[0], 1), -1.0))
            grad = grad.mul_(scale[rows, None]).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, slice_len: int | None = None) -> Tensor:
    """Loss of each token, in nats.

    Args:
        hidden: [T, H], last hidden states.
        weight: [V, H] of the output layer, same dtype. Both are cast where autocast is on, float64 excepted.
        labels: [T] int64 in [0, V), or -100 for tokens without a label.
        slice_len: tokens whose logits are held at a time; by default as many as fit into 256 MiB.

    Returns:
        [T] float32 (float64 for float64 inputs), 0 where the label is -100.
    """
    hidden, weight = cast_inputs(hidden, weight)
    slice_len = slice_len or max(1, MAX_LOGITS // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, labels, slice_len)
