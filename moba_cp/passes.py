"""Attention's forward and backward pass as two functions, for code that schedules its backward pass by itself.

Legend: L tokens of this rank, Hq query heads, Hkv key/value heads, D head dim, S = k - 1 selected blocks per row.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import (
    full_attention_backward_op,
    full_attention_op,
    moba_attention_backward_op,
    moba_attention_op,
)
from .config import MoBAConfig
from .cp import moba as moba_across_ranks
from .cp.context import CPContext
from .cp.full import attention as full_across_ranks
from .ops import backend


class Kept(NamedTuple):
    """What a backward pass needs of its forward pass beside q, k, v and the output. Who keeps it may move the tensors
    to the host and back."""

    tensors: list[Tensor | None]
    """lse [L, Hq] wide first; of full attention on one device [Hq, L]. Then, of MoBA, the selection [L, Hq, S] int32,
    the routing index, and across ranks what depends on the selection."""
    made: Any = None
    """What is no tensor."""

    def without_index(self) -> "Kept":
        """Less memory: MoBA's routing index is made again from the selection in a small part of the pass's time."""
        indices = [2] if self.made is None else [1 + place for place in self.made.indices]
        return Kept([None if i in indices else x for i, x in enumerate(self.tensors)], self.made)


@dataclass(frozen=True)
class AttentionPasses:
    """The attention of one layer to one sequence.

    On a rank of a group both passes are collective calls.
    """

    kind: str
    """``moba`` or ``full``"""
    config: MoBAConfig
    """Block size and top-k of ``moba``, and for both kinds whether gradients are deterministic."""
    scale: float
    """Factor of the scores."""
    context: CPContext
    """Documents of the sequence, and its share on this rank."""
    layer: str
    """The layer's name, in counters and messages."""

    @property
    def across_ranks(self) -> bool:
        """Whether there is something to exchange, or somebody who watches; otherwise no plan is needed."""
        return self.context.size > 1 or self.context.observer is not None

    @torch.no_grad()
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, chosen: Tensor | None = None
    ) -> tuple[Tensor, Kept]:
        """out [L, Hq, D] in q's dtype, and what :meth:`backward` needs; q [L, Hq, D], k and v [L, Hkv, D], contiguous.

        The results are those of :func:`moba_cp.moba_attention` and :func:`moba_cp.full_attention`, bit for bit.

        Args:
            needs_grad: whether there will be a backward pass, the same on all ranks.
            chosen: [L, G, S] int32, of ``moba``: blocks chosen elsewhere, ``block_indices`` of
                :func:`moba_cp.moba_attention`.
        """
        config, scale, context = self.config, self.scale, self.context
        # Said here: where a backward pass computes it again, other layers have been named since.
        context.comm.layer = self.layer
        if self.kind == "moba" and self.across_ranks:
            given = None
            if chosen is not None:
                geometry = context.geometry(config.block_size)
                given = backend(q).given_blocks(chosen, geometry.first, geometry.current_block)
            call = moba_across_ranks.enter(q, k, config, context, needs_grad, needs_grad, given)
            out, lse, _, kept, made = moba_across_ranks.forward_pass(q, k, v, config, scale, context, call, given)
            return out, Kept([lse, *kept], made)
        if self.kind == "moba":
            options = config.block_size, config.top_k, scale, config.deterministic
            out, *kept = moba_attention_op(q, k, v, context.cu_seqlens, *options, None, chosen, False, *config.gate)
            return out, Kept(kept)
        if self.across_ranks:
            out, lse, made = full_across_ranks.forward_pass(
                q, k, v, scale, context, "auto", "auto", config.deterministic
            )  # fmt: skip
            return out, Kept([lse], made)
        out, lse = full_attention_op(q, k, v, context.cu_seqlens, scale, "auto", config.deterministic)
        return out, Kept([lse])

    def lse(self, kept: Kept) -> Tensor:
        """[L, Hq] wide, the log-sum-exp of the scores of a pass that kept ``kept``."""
        lse = kept.tensors[0]
        return lse.t() if self.kind == "full" and not self.across_ranks else lse

    @torch.no_grad()
    def backward(
        self, kept: Kept, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in their inputs' dtype; dout [L, Hq, D], contiguous.

        Of MoBA the routing index may be missing (None): on one device it is then made again from the selection.
        """
        lse, *rest = kept.tensors
        if self.kind == "moba" and self.across_ranks:
            return moba_across_ranks.backward_pass(kept.made, q, k, v, out, lse, rest, dout)
        if self.kind == "moba":
            selection, index = rest
            index = selection.new_empty(0) if index is None else index
            options = self.config.block_size, self.scale, self.config.deterministic
            return moba_attention_backward_op(
                dout, q, k, v, out, lse, selection, index, self.context.cu_seqlens, *options
            )  # fmt: skip
        if self.across_ranks:
            return full_across_ranks.backward_pass(kept.made, q, k, v, out, lse, dout)
        options = self.context.cu_seqlens, self.scale, "auto", self.config.deterministic
        return full_attention_backward_op(dout, q, k, v, out, lse, *options)
