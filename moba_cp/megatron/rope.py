"""Rotary position embedding by a token's position in its document, for any layout.

Legend: L tokens of this rank, D head dim, R width of the part of a head that turns.
"""

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..cp.layout import Layout
from ..model.rope import RopeScaling, rope_frequencies
from .batch import MoBAPackedSeqParams, batch_context, group_size

DEFAULT_BASE = 10000.0
# Megatron holds its frequencies in float32, and computes them there.
_TOLERANCE = 1e-5


class ContextRotaryEmbedding(nn.Module):
    """Rotary angles from a batch's context; in place of Megatron's ``RotaryEmbedding``, which knows zigzag alone and
    needs CUDA.

    Assigned to ``GPTModel.rotary_pos_emb`` it serves batches with and without :class:`MoBAPackedSeqParams`, and turns
    what the replaced embedding would have turned, by the same frequencies: ``rotary_percent``, ``rotary_base``,
    ``rope_scaling``, ``seq_len_interpolation_factor`` and ``rotary_interleaved`` of the model hold unless ``base`` or
    ``scaling`` is given here. Holds no parameters and no buffers.

    Args:
        dim: D, or R; even.
        base: base of the frequencies. None: the model's, or 10,000 in no model.
        group: context-parallel process group. None: the model's, or one rank in no model.
        layout: how the tokens of batches without a context are spread over the ranks.
        scaling: Llama 3.1's scaling of the frequencies. None: the model's, or none.

    Raises:
        ValueError: at the assignment, if the model asks for angles that this module does not give.
    """

    def __init__(
        self,
        dim: int,
        base: float | None = None,
        group=None,
        layout: Layout = "zigzag",
        scaling: RopeScaling | None = None,
    ):
        super().__init__()
        self.dim, self.base, self.group, self.layout, self.scaling = dim, base, group, layout, scaling
        self.interleaved = False
        self._set_frequencies(rope_frequencies(dim, DEFAULT_BASE if base is None else base, scaling))

    def _set_frequencies(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies
        """[R / 2] float64 on the CPU, radians per token."""
        self._frequencies_on = {}

    def follow(self, model: nn.Module) -> None:
        """Turn as the rotary embedding that this one replaces in ``model``; PyTorch calls it at the assignment.

        Args:
            model: Megatron's GPTModel; its ``rotary_pos_emb`` is still the old one.
        """
        kind = model.position_embedding_type
        if kind != "rope":
            raise ValueError(
                f"position_embedding_type={kind!r}: ContextRotaryEmbedding gives the angles of 'rope' alone; build the "
                "model with that, or leave its position embedding as it is"
            )
        self.interleaved = model.config.rotary_interleaved
        group = getattr(getattr(model, "pg_collection", None), "cp", None)
        self.group = group if self.group is None else self.group
        if group_size(self.group) != model.config.context_parallel_size:
            raise ValueError(
                f"group has {group_size(self.group)} ranks but the model context_parallel_size="
                f"{model.config.context_parallel_size}; leave group out to take the model's"
            )
        old = model._modules.get("rotary_pos_emb")
        if old is None:
            return
        theirs = frequencies_of(old)
        dims = {2 * len(theirs), model.config.kv_channels}
        given = self.base is not None or self.scaling is not None
        if self.dim not in dims or (given and self.dim != 2 * len(theirs)):
            raise ValueError(
                f"dim={self.dim} but the model turns {2 * len(theirs)} of kv_channels={model.config.kv_channels}; use "
                f"dim={2 * len(theirs)}"
            )
        if not given:
            # Megatron's are rounded to float32; where the model says what they were computed from, use that.
            exact = rope_frequencies(2 * len(theirs), getattr(model, "rotary_base", DEFAULT_BASE))
            exact /= getattr(old, "seq_len_interpolation_factor", None) or 1.0
            self._set_frequencies(exact if same_frequencies(exact, theirs) else theirs)
        elif _scaled(model, old) and not same_frequencies(self.frequencies, theirs):
            raise ValueError(
                f"base={self.base!r}, scaling={self.scaling!r} are not what the model was built with (rope_scaling or "
                "seq_len_interpolation_factor); leave both out to take the model's frequencies"
            )

    def forward(self, positions: Tensor, offset: int = 0, packed_seq: bool = False, cp_group=None) -> Tensor:
        """Angles [L, 1, 1, R] float32 of ``positions`` [L], as Megatron's ``apply_rotary_pos_emb`` takes them.

        ``packed_seq`` and ``cp_group`` are what GPTModel passes; the positions already account for both.
        """
        angles = self.angles(positions + offset)
        # A pair is two neighbours, or one element of each half.
        angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat((angles, angles), dim=-1)
        return angles[:, None, None, :]

    def angles(self, positions: Tensor) -> Tensor:
        """Angles [L, R / 2] float32 of ``positions`` [L], by which each pair turns."""
        device = positions.device
        if device not in self._frequencies_on:
            self._frequencies_on[device] = self.frequencies.to(device)
        angles = torch.empty(len(positions), len(self.frequencies), dtype=torch.float32, device=device)
        # At position 10^6 a float32 angle is off by 0.03; in float64 it is reduced to one turn first, some at a time.
        for some, out in zip(positions.split(2**18), angles.split(2**18), strict=True):
            out.copy_(torch.outer(some.double(), self._frequencies_on[device]) % (2 * torch.pi))
        return angles

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


def frequencies_of(rotary: nn.Module) -> Tensor:
    """[R / 2] float64 on the CPU: radians per token of Megatron's rotary embedding, or of ours.

    Raises:
        ValueError: a kind whose angles are not a position times a frequency.
    """
    if isinstance(rotary, ContextRotaryEmbedding):
        return rotary.frequencies
    if type(rotary) is not RotaryEmbedding:
        raise ValueError(f"rotary_pos_emb is a {type(rotary).__name__}, which is not served; use Megatron's 'rope'")
    return rotary.inv_freq.double().cpu() / (rotary.seq_len_interpolation_factor or 1.0)


def same_frequencies(one: Tensor, two: Tensor) -> bool:
    """Whether two models turn alike, as far as float32 can tell."""
    return one.shape == two.shape and torch.allclose(one, two, rtol=_TOLERANCE, atol=0.0)


def _scaled(model: nn.Module, old: nn.Module) -> bool:
    interpolated = getattr(old, "seq_len_interpolation_factor", None) is not None
    return interpolated or getattr(model, "rotary_scaling", False)


def _follow(owner: nn.Module, name: str, module: nn.Module) -> None:
    if isinstance(module, ContextRotaryEmbedding) and hasattr(owner, "position_embedding_type"):
        if name == "rotary_pos_emb":
            module.follow(owner)


# An assignment tells the module nothing of the model, and GPTModel passes neither its base nor its scaling on: without
# this the angles would silently be others than the model was built for.
register_module_module_registration_hook(_follow)
