"""One sequence of a transformers model over several ranks.

Legend: b sequences of S tokens, T = b * S tokens of all, filled up to what the ranks can share; P ranks, L = T / P
tokens of one rank.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..cp.context import CPContext
from ..cp.layout import Layout
from .documents import batch_ends

IGNORED = -100


class ContextParallel(nn.Module):
    """A causal language model that attends with MoBA, each rank with its share of the tokens.

    All ranks of the group are given the same batch. Labels are shifted before tokens are shared, the loss is that of
    the whole batch, and rows of a batch, padding and packed documents are documents of one sequence, so that only its
    length, never its number of rows, decides how it is shared.

    Args:
        model: as :func:`moba_cp.hf.use_moba` leaves it, with the same weights on all ranks; also inside of PEFT's or
            FSDP2's wrappers.
        group: the ranks that share a sequence: a process group, a one-dimensional DeviceMesh such as ``mesh["cp"]``, or
            None for one rank.
        layout: ``zigzag`` or ``contiguous``; see :class:`moba_cp.CPContext`.
        gradients: what is done with gradients of weights over the ranks of ``group`` afterwards: ``mean`` (DDP and
            FSDP) or ``sum``. Either gives those of the whole batch.

    Raises:
        ValueError: the model does not attend with MoBA, or an argument is not understood.
    """

    def __init__(self, model: nn.Module, group, layout: Layout = "zigzag", gradients: Literal["mean", "sum"] = "mean"):
        super().__init__()
        config = model.config.get_text_config()
        if config._attn_implementation != "moba":
            raise ValueError(
                f"the model attends with {config._attn_implementation}, which sees this rank's tokens alone; call "
                "moba_cp.hf.use_moba(model, block_size=512, top_k=8) first"
            )
        if gradients not in ("mean", "sum"):
            raise ValueError(f"gradients={gradients!r} is not understood; use 'mean' (DDP, FSDP) or 'sum'")
        self.model, self.config = model, model.config
        self._group, self._layout, self._gradients = group, layout, gradients

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **kwargs,
    ):
        """What the model returns for this rank's tokens; ``loss`` is that of the whole batch, on all ranks.

        Args:
            input_ids: [b, S] int64, the same on all ranks.
            labels: [b, S] int64, not shifted, -100 for none.
            attention_mask: [b, S], 0 where a token is padding, on the left or on the right.
            position_ids: [b, S] int64, which begin again with each packed document.
            num_items_in_batch: what the sum of losses is divided by, of all batches whose gradients add up; by default
                the labels of this batch.
            cu_seq_lens_q, cu_seq_lens_k: [n_docs + 1], boundaries of packed documents in a batch of one, equal to one
                another, as transformers' collators give; then ``position_ids`` are positions alone.
            kwargs: for the model.

        Returns:
            As the model; ``logits`` [1, L, vocabulary] are of the tokens that ``context.positions`` names in the
            flattened batch; ``context``, a :class:`moba_cp.CPContext`, is among them.

        Raises:
            ValueError: shapes or boundaries do not fit one another, or the model is given a cache.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} but input_ids {tuple(input_ids.shape)}; they must be equal: "
                "labels are shifted here"
            )
        if cu_seq_lens_k is not None and (cu_seq_lens_q is None or not torch.equal(cu_seq_lens_q, cu_seq_lens_k)):
            raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q; pass the same boundaries in both")
        context = self.context(input_ids, attention_mask, position_ids, cu_seq_lens_q)
        positions = context.document_positions
        if position_ids is not None:
            positions = self._share(position_ids.expand_as(input_ids), 0, context)
        inputs = {
            "input_ids": self._share(input_ids, 0, context)[None],
            "position_ids": positions[None],
            # A mask of four dimensions is handed on as it is; attention is told of documents by the context.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
            "use_cache": False,
        }
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            if num_items_in_batch is None:
                num_items_in_batch = (shifted != IGNORED).sum()
            shifted = self._share(shifted, IGNORED, context)[None]
            inputs |= {"labels": shifted, "shift_labels": shifted, "num_items_in_batch": num_items_in_batch}
        out = self.model(**inputs, moba_context=context, **kwargs)
        if labels is not None:
            out.loss = self._whole(out.loss, context)
        out["context"] = context
        return out

    def context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
    ) -> CPContext:
        """How a batch is spread over the ranks; arguments as of :meth:`forward`."""
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; pass [sequences, tokens], at least one each"
            )
        ends = batch_ends(input_ids.shape, attention_mask, position_ids, input_ids.device, cu_seq_lens_q).tolist()
        size = self._group.size() if self._group is not None else 1
        unit = size if self._layout == "contiguous" else 2 * size
        filled = -(-ends[-1] // unit) * unit
        ends = [*ends, filled] if filled > ends[-1] else ends
        return CPContext(self._group, self._layout, filled, ends, device=input_ids.device)

    def _share(self, x: Tensor, filling: int, context: CPContext) -> Tensor:
        """This rank's tokens [L] of x [b, S]."""
        return context.shard(F.pad(x.flatten(), (0, context.seq_len - x.numel()), value=filling))

    def _whole(self, loss: Tensor, context: CPContext) -> Tensor:
        """The sum of all ranks' losses; a gradient flows to this rank's part alone."""
        total = loss.detach().clone()
        if context.size > 1:
            dist.all_reduce(total, group=context.comm.group)
        if self._gradients == "mean":
            loss = loss * context.size
        return loss + (total - loss.detach())
