"""Layer specs that put MoBA into Megatron's models.

--spec moba_cp.megatron.spec moba_layer_spec      in Megatron-LM's trainer
with_moba(spec, AttentionConfig(...))             in any code that builds its own specs
"""

import copy

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..cp.compiling import outside_graphs
from ..cp.options import ExchangeOptions
from ..model.attention import AttentionConfig
from ..model.layer import LayerMemory, LayerRun, LayerWeights, layer_forward
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


def context_layer_spec(attention: AttentionConfig, memory: LayerMemory, qk_norm: bool = False) -> ModuleSpec:
    """The layer of :class:`moba_cp.megatron.MoBAGPTModel`: Megatron's local layer with RMSNorm, on batches that carry
    a context.

    Args:
        attention: of the whole model.
        memory: what the layers keep for the backward pass.
        qk_norm: whether each head of queries and keys is normalized.
    """
    spec = with_moba(get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm"), attention)
    spec.module = ContextTransformerLayer
    spec.params = {**spec.params, "memory": memory}
    return spec


class ContextTransformerLayer(TransformerLayer):
    """A transformer layer on batches that carry a context: Megatron's modules and parameters, and a schedule of our own
    (:mod:`moba_cp.model.layer`), which decides what waits for the backward pass, and where.

    It takes its rotary angles from the batch: FSDP2's mixed precision would cast angles passed as an argument to bf16,
    which is too coarse for long positions. Where a module was replaced or has a hook, such as an adapter's, where the
    core attention is another one, and under autocast, Megatron's own forward runs; ``memory`` then says whether it is
    checkpointed.

    Args:
        memory: what is kept for the backward pass; may be set at any time.
        All others: as Megatron's TransformerLayer.
    """

    def __init__(self, *args, memory: LayerMemory, **kwargs):
        super().__init__(*args, **kwargs)
        self.memory = memory

    def forward(self, hidden_states: torch.Tensor, packed_seq_params: MoBAPackedSeqParams, **kwargs):
        """hidden_states [L, b, hidden] -> (the same shape, None)."""
        if self._has_own_schedule(hidden_states):
            return self._scheduled(hidden_states, packed_seq_params), None
        kwargs.update(packed_seq_params=packed_seq_params, rotary_pos_emb=packed_seq_params.rotary_angles)
        if self.memory.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, **kwargs)
        # With early stop, recomputation ends by an exception once the last saved tensor exists. The traceback keeps
        # the frames alive, and with them all activations of the layer, until the step ends (PyTorch 2.11).
        with set_checkpoint_early_stop(False):
            return checkpoint(super().forward, hidden_states, use_reentrant=False, preserve_rng_state=False, **kwargs)

    @outside_graphs
    def _scheduled(self, hidden: torch.Tensor, params: MoBAPackedSeqParams) -> torch.Tensor:
        attention, mlp, context = self.self_attention, self.mlp, params.context
        core = attention.core_attention
        cos, sin = params.turns
        run = LayerRun(
            attention=core.passes(context),
            cos=cos,
            sin=sin,
            n_kv=attention.num_query_groups_per_partition,
            eps=self.config.layernorm_epsilon,
            memory=self.memory,
            offloader=params.offloader,
            index=core.branch(context),
        )
        weights = LayerWeights(
            input_norm=self.input_layernorm.weight,
            qkv=attention.linear_qkv.weight,
            qkv_bias=attention.linear_qkv.bias,
            q_norm=getattr(attention.q_layernorm, "weight", None),
            k_norm=getattr(attention.k_layernorm, "weight", None),
            proj=attention.linear_proj.weight,
            ffn_norm=self.pre_mlp_layernorm.weight,
            fc1=mlp.linear_fc1.weight,
            fc2=mlp.linear_fc2.weight,
            key_conv=None if core.key_conv is None else core.key_conv.weight,
            scorer=None if core.index is None else core.index.weight,
        )
        if hidden.shape[1] == 1:
            out, loss = layer_forward(hidden.contiguous(), run, weights)
            params.take_index_loss(loss)
            return out
        sequences, losses = zip(*(layer_forward(x.contiguous(), run, weights) for x in hidden.unbind(1)))
        for loss in losses:
            params.take_index_loss(loss)
        return torch.stack(sequences, 1)

    def _has_own_schedule(self, hidden: torch.Tensor) -> bool:
        """Whether all modules are as they were built, so that their weights say all that they do."""
        attention, mlp = self.self_attention, self.mlp
        kinds = {
            self.input_layernorm: nn.RMSNorm,
            attention: SelfAttention,
            attention.linear_qkv: ColumnParallelLinear,
            attention.core_attention: MoBACoreAttention,
            attention.linear_proj: RowParallelLinear,
            self.pre_mlp_layernorm: nn.RMSNorm,
            mlp: MLP,
            mlp.linear_fc1: ColumnParallelLinear,
            mlp.linear_fc2: RowParallelLinear,
        }
        if any(type(module) is not kind or _is_hooked(module) for module, kind in kinds.items()):
            return False
        return hidden.dtype == mlp.linear_fc1.weight.dtype and not torch.is_autocast_enabled(hidden.device.type)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


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
