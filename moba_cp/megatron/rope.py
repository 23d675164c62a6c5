"""Rotary position embedding by a token's position in its document, for any layout.

Legend: L tokens of this rank, D head dim.
"""

import torch
from torch import Tensor, nn

from .batch import MoBAPackedSeqParams, batch_context


class ContextRotaryEmbedding(nn.Module):
    """Rotary angles from a batch's context; in place of Megatron's ``RotaryEmbedding``, which knows zigzag alone and
    needs CUDA.

    Assigned to ``GPTModel.rotary_pos_emb`` it serves batches with and without :class:`MoBAPackedSeqParams`.
    Holds no parameters and no buffers.

    Args:
        dim: D, or the part of it that turns; even.
        base: base of the frequencies.
        group: context-parallel process group; None is one rank.
        layout: how batches without a context lie on the ranks.
    """

    def __init__(self, dim: int, base: float = 10000.0, group=None, layout: str = "zigzag"):
        super().__init__()
        self.dim, self.base, self.group, self.layout = dim, base, group, layout

    def forward(self, positions: Tensor, offset: int = 0, packed_seq: bool = False, cp_group=None) -> Tensor:
        """Angles [L, 1, 1, dim] float32 of ``positions`` [L], as Megatron's ``apply_rotary_pos_emb`` takes them.

        ``packed_seq`` and ``cp_group`` are what GPTModel passes; the positions already account for both.
        """
        # At position 10^6 a float32 angle is off by 0.03; in float64 it is reduced to one turn first.
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device) / self.dim
        angles = torch.outer((positions + offset).double(), self.base**-exponent) % (2 * torch.pi)
        return torch.cat((angles, angles), dim=-1).float()[:, None, None, :]

    def get_rotary_seq_len(
        self, inference_context, transformer, transformer_input, transformer_config, packed_seq_params=None, **_
    ) -> Tensor:
        """Positions [L] int64 of the tokens of this rank; GPTModel hands them to :meth:`forward`."""
        hidden = transformer_input
        if transformer is not None and transformer.input_tensor is not None:
            hidden = transformer.input_tensor
        if packed_seq_params is not None and not isinstance(packed_seq_params, MoBAPackedSeqParams):
            # Megatron cuts the angles of packed documents itself, from those of the longest.
            longest = max(packed_seq_params.max_seqlen_q, packed_seq_params.max_seqlen_kv)
            return torch.arange(longest, device=hidden.device)
        n_tokens = hidden.shape[0]
        if transformer_config.sequence_parallel:
            n_tokens *= transformer_config.tensor_model_parallel_size
        context = batch_context(packed_seq_params, n_tokens, self.group, self.layout, hidden.device)
        return context.document_positions
