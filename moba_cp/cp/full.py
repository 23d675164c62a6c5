"""Exact full attention across ranks, for the full layers of hybrids.

K and V of one KV head at a time are all-gathered, so that a rank never holds more than one head of the whole sequence.

Legend: T tokens of the sequence, L local tokens, P ranks, Hq query heads, Hkv key/value heads, G = Hq // Hkv,
D head dim. Wide means float32, or float64 for float64 inputs.
"""

import torch
from torch import Tensor

from .. import dense
from ..attention import row_sums
from .comm import Communicator
from .context import CPContext


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, cp: CPContext):
    """Causal attention of local queries to the whole sequence; a collective call.

    Args:
        q: [L, Hq, D]; k, v: [L, Hkv, D], this rank's share.

    Returns:
        out [L, Hq, D] in q's dtype, lse [L, Hq] wide and without gradient.
    """
    return _FullAcrossRanks.apply(q, k, v, scale, cp)


class _FullAcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale: float, cp: CPContext):
        order = torch.cat(cp.rank_positions()).to(q.device)
        first, last, group = cp.document_starts, cp.positions, q.shape[1] // k.shape[1]
        outs, lses = [], []
        for head in range(k.shape[1]):
            k_all, v_all = _gather_head(k, v, head, order, cp.comm)
            q_head = q[:, head * group : (head + 1) * group]
            out, lse = dense.range_attention(q_head, k_all, v_all, first, last, scale)
            outs.append(out.to(q.dtype))
            lses.append(lse)
        out, lse = torch.cat(outs, 1), torch.cat(lses, 1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.cp, ctx.scale = cp, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _dlse):
        q, k, v, out, lse = ctx.saved_tensors
        cp, comm = ctx.cp, ctx.cp.comm
        order = torch.cat(cp.rank_positions()).to(q.device)
        delta = row_sums(dout, out)
        group = q.shape[1] // k.shape[1]
        dqs, dks, dvs = [], [], []
        for head in range(k.shape[1]):
            k_all, v_all = _gather_head(k, v, head, order, comm)
            heads = slice(head * group, (head + 1) * group)
            dq, dk_all, dv_all = dense.range_attention_backward(
                q[:, heads], k_all, v_all, cp.document_starts, cp.positions, ctx.scale,
                dout[:, heads], lse[:, heads], delta[:, heads],
            )  # fmt: skip
            # Back to the rank of each token, and there summed in rank order.
            counts = [cp.local_len] * comm.size
            grads = comm.all_to_all(torch.cat([dk_all, dv_all], 1)[order], counts, counts, "full_gradients")()
            dk, dv = grads.view(comm.size, cp.local_len, 2, -1).sum(0).unbind(1)
            dqs.append(dq)
            dks.append(dk)
            dvs.append(dv)
        return (
            torch.cat(dqs, 1).to(q.dtype),
            torch.stack(dks, 1).to(k.dtype),
            torch.stack(dvs, 1).to(v.dtype),
            None,
            None,
        )


def _gather_head(k: Tensor, v: Tensor, head: int, order: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """One KV head of the whole sequence in global order: [T, 1, D] each; ``order`` [T] are the ranks' positions."""
    gathered = comm.all_gather(torch.stack([k[:, head], v[:, head]], 1), "full_kv").flatten(0, 1)
    whole = torch.empty_like(gathered)
    whole[order] = gathered
    return whole[:, :1], whole[:, 1:]
