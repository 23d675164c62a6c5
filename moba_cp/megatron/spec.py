"""Layer specs that put MoBA into Megatron's models.

--spec moba_cp.megatron.spec moba_layer_spec      in Megatron-LM's trainer
with_moba(spec, AttentionConfig(...))             in any code that builds its own specs
"""

import copy

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..cp.options import ExchangeOptions
from ..model.attention import AttentionConfig
from .batch import MoBAPackedSeqParams
from .core_attention import MoBACoreAttention
from .layer import MoBATransformerLayer, final_norm


def core_attention_spec(attention: AttentionConfig, exchange: ExchangeOptions | None = None) -> ModuleSpec:
    """The spec to put at ``self_attention.submodules.core_attention`` of a layer spec."""
    return ModuleSpec(module=MoBACoreAttention, params={"attention": attention, "exchange": exchange})


def with_moba(
    layer_spec: ModuleSpec, attention: AttentionConfig, exchange: ExchangeOptions | None = None
) -> ModuleSpec:
    """A copy of ``layer_spec``, any spec of a transformer layer with self-attention, whose core attention is MoBA's."""
    layer_spec = copy.deepcopy(layer_spec)
    layer_spec.submodules.self_attention.submodules.core_attention = core_attention_spec(attention, exchange)
    return layer_spec


def context_layer_spec(attention: AttentionConfig, recompute: str = "none") -> ModuleSpec:
    """The layer of :class:`moba_cp.megatron.MoBAGPTModel`: Megatron's local layer with RMSNorm, on batches that carry
    a context.

    Args:
        attention: of the whole model.
        recompute: ``none`` or ``full``, see :class:`moba_cp.megatron.ModelConfig`.
    """
    spec = with_moba(get_gpt_layer_local_spec(normalization="RMSNorm"), attention)
    spec.module = ContextTransformerLayer
    spec.params = {**spec.params, "recompute": recompute == "full"}
    return spec


class ContextTransformerLayer(TransformerLayer):
    """A transformer layer that takes its rotary angles from the batch's context, and can recompute its activations.

    FSDP2's mixed precision would cast angles passed as an argument to bf16, which is too coarse for long positions.
    Megatron's own recompute saves and restores CUDA's random state, which a CPU does not have; without dropout it is
    not needed.

    Args:
        recompute: keep only the layer's input for the backward pass.
        All others: as Megatron's TransformerLayer.
    """

    def __init__(self, *args, recompute: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.recompute = recompute

    def forward(self, hidden_states: torch.Tensor, packed_seq_params: MoBAPackedSeqParams, **kwargs):
        """hidden_states [L, b, hidden] -> (the same shape, None)."""
        kwargs.update(packed_seq_params=packed_seq_params, rotary_pos_emb=packed_seq_params.rotary_angles)
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, **kwargs)
        # With early stop, recomputation ends by an exception once the last saved tensor exists. The traceback keeps
        # the frames alive, and with them all activations of the layer, until the step ends (PyTorch 2.11).
        with set_checkpoint_early_stop(False):
            return checkpoint(super().forward, hidden_states, use_reentrant=False, preserve_rng_state=False, **kwargs)


def layer_spec(attention: AttentionConfig | None = None, exchange: ExchangeOptions | None = None) -> ModuleSpec:
    """A spec for every layer of a GPTModel: MoBA as core attention, everything else as Megatron would build it.

    For a trainer whose parser does not know MoBA's flags: put ``my_spec = layer_spec(AttentionConfig(...))`` into a
    module of yours and pass ``--spec my_module my_spec``.

    Args:
        attention: None takes it from the flags of :func:`moba_cp.megatron.add_moba_args`, when the model is built;
            the exchange too.
        exchange: between context-parallel ranks.
    """
    return ModuleSpec(module=MoBATransformerLayer, params={"attention": attention, "exchange": exchange})


def block_spec(
    config: TransformerConfig,
    vp_stage: int | None = None,
    attention: AttentionConfig | None = None,
    exchange: ExchangeOptions | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the norm after the last: :func:`layer_spec` for code that calls its specs.

    Needed for sequence parallelism without TransformerEngine: the final norm of a layer spec does not support it.

    Args:
        config: of the model, or Megatron-LM's GPTModelConfig around it.
        vp_stage: virtual pipeline stage.
        attention, exchange: as in :func:`layer_spec`.
    """
    config = getattr(config, "transformer", config)
    params = {"attention": attention, "exchange": exchange, "whole_block": True}
    spec = ModuleSpec(module=MoBATransformerLayer, params=params)
    return TransformerBlockSubmodules([spec] * get_num_layers_to_build(config, vp_stage), final_norm(config))


# For ``--spec moba_cp.megatron.spec moba_layer_spec``: not called, so that its configuration is found when the
# model is built.
moba_layer_spec = layer_spec()


def moba_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """For ``--spec moba_cp.megatron.spec moba_block_spec``; see :func:`block_spec`."""
    return block_spec(config, vp_stage)
