"""The core attention of a Megatron transformer layer: MoBA, or full attention in the layers named so.

Legend: L tokens of one sequence on this rank, b sequences, h query heads and g key/value heads of this
tensor-parallel rank, D head dim.
"""

from dataclasses import replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ..attention import full_attention, moba_attention
from ..cp.context import CPContext
from ..cp.key_conv import convolve_keys
from ..cp.options import ExchangeOptions
from ..index.branch import IndexBranch
from ..model.attention import AttentionConfig
from ..passes import AttentionPasses
from .batch import MoBAPackedSeqParams, batch_context, check_group, group_size
from .index import IndexInput, IndexWeights, attend_by_index

__all__ = ["MoBACoreAttention", "MoBAPackedSeqParams"]


class MoBACoreAttention(MegatronModule):
    """Built by Megatron's attention layer from the spec of :func:`moba_cp.megatron.core_attention_spec`.

    Args:
        config: of the model; ``context_parallel_size`` and the context-parallel group must agree. With
            ``deterministic_mode`` attention is deterministic too.
        layer_number: counted from 1 through the whole model; decides between MoBA and full attention.
        attn_mask_type: causal.
        attention_type: ``self``.
        attention: of all layers; a parameter of the spec.
        exchange: how batches without a context of their own exchange blocks and rows; a parameter of the spec.
        attention_dropout: None or 0.
        softmax_scale: ``D ** -0.5`` by default.
        cp_comm_type: None or ``p2p``, Megatron's default; it has no effect, MoBA has an exchange of its own.
        pg_collection: process groups, of which ``cp`` is used; Megatron's global ones by default.

    Raises:
        ValueError: the model asks for something that MoBA does not do; the message has name, value, rule and fix.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention: AttentionConfig,
        exchange: ExchangeOptions | None = None,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse_unsupported(config, attn_mask_type, attention_type, dropout, cp_comm_type)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.group = pg_collection.cp
        if group_size(self.group) != config.context_parallel_size:
            raise ValueError(
                f"context_parallel_size={config.context_parallel_size} but the context-parallel group has "
                f"{group_size(self.group)} ranks; make them equal"
            )
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.exchange = exchange or ExchangeOptions()
        self.index: IndexWeights | None = None
        self.index_input: IndexInput | None = None
        """What the index branch reads in the next forward pass; set by a layer of Megatron's own schedule."""
        if attention.has_index(layer_number, config.num_layers):
            attention.index.check_head_dim(config.kv_channels)
            self.index = IndexWeights(attention.index, config)
        self.key_conv = None
        if attention.key_conv:
            self.key_conv = KeyConvWeights(attention.key_conv, config)
        self.set_attention(attention)

    def set_attention(self, attention: AttentionConfig) -> None:
        """Attend by another configuration from the next forward pass on; no weight depends on it."""
        self.kind = attention.kind(self.layer_number, self.config.num_layers)
        # deterministic_mode is Megatron's, for the whole model.
        deterministic = attention.deterministic or self.config.deterministic_mode
        self.moba = replace(attention.moba, deterministic=deterministic)
        self.layout = attention.layout

    def branch(self, context: CPContext) -> IndexBranch | None:
        """This layer's index branch on one sequence, for a layer that schedules its backward pass by itself; None
        without one."""
        if self.index is None:
            return None
        return IndexBranch(self.index.options, self.moba, context, self._name, self.config.num_query_groups)

    @property
    def _name(self) -> str:
        return f"layer {self.layer_number}"

    def extra_repr(self) -> str:
        detail = f"block_size={self.moba.block_size}, top_k={self.moba.top_k}" if self.kind == "moba" else "exact"
        if self.kind == "moba":
            detail += "".join(f", {name}={value}" for name, value in self.moba.gate.changed().items())
        return f"layer {self.layer_number}: {self.kind}, {detail}, ranks={group_size(self.group)}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Causal attention of each sequence of the batch.

        Args:
            query: [L, b, h, D]; [L, h, D] if ``packed_seq_params`` is thd.
            key, value: [L, b, g, D]; [L, g, D] if thd.
            attention_mask, attention_bias: None.
            attn_mask_type: causal or None.
            packed_seq_params: see :func:`moba_cp.megatron.batch.batch_context`.

        Returns:
            [L, b, h * D]; [L, h * D] if thd.
        """
        self._refuse_call(query, key, attention_mask, attn_mask_type, attention_bias)
        context = batch_context(packed_seq_params, query.shape[0], self.group, self.layout, query.device, self.exchange)
        key = self.convolved(key, context)
        if self.index is not None:
            given, self.index_input = self.index_input, None
            return attend_by_index(self.index, given, self.passes(context), self.branch(context), query, key, value)
        if query.dim() == 3:
            return self._attend(query, key, value, context).flatten(1)
        sequences = zip(query.unbind(1), key.unbind(1), value.unbind(1))
        return torch.stack([self._attend(q, k, v, context) for q, k, v in sequences], dim=1).flatten(2)

    def passes(self, context: CPContext) -> AttentionPasses:
        """This layer's attention to one sequence, for a layer that schedules its backward pass by itself.

        Raises:
            ValueError: the context is of another group than the layer.
        """
        check_group(context, self.group)
        scale = self.config.kv_channels**-0.5 if self.softmax_scale is None else self.softmax_scale
        return AttentionPasses(self.kind, self.moba, scale, context, self._name)

    def convolved(self, key: Tensor, context: CPContext) -> Tensor:
        """The keys that queries see: convolved where this layer has a convolution.

        Args:
            key: [L, b, g, D] or [L, g, D], turned by the rotary embedding.
        """
        if self.key_conv is None:
            return key
        weight, context.comm.layer = self.key_conv.weight, self._name
        if key.dim() == 3:
            return convolve_keys(key, weight, context)
        return torch.stack([convolve_keys(k, weight, context) for k in key.unbind(1)], dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context) -> Tensor:
        context.comm.layer = self._name
        across = self.passes(context).across_ranks
        where = {"cp": context} if across else {"cu_seqlens": context.cu_seqlens}
        if self.kind == "full":
            deterministic = self.moba.deterministic
            return full_attention(q, k, v, softmax_scale=self.softmax_scale, deterministic=deterministic, **where)
        return moba_attention(q, k, v, self.moba, softmax_scale=self.softmax_scale, **where)

    def _refuse_call(self, query, key, attention_mask, attn_mask_type, attention_bias) -> None:
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but attention here is causal by itself; pass "
                "None (--no-create-attention-mask-in-dataloader), and documents as packed_seq_params"
            )
        if attention_bias is not None:
            raise ValueError("attention_bias is not None; MoBA adds no bias to its scores, so pass None")
        if attn_mask_type not in (None, AttnMaskType.causal):
            raise ValueError(f"attn_mask_type={attn_mask_type.name} is not served; use AttnMaskType.causal")
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"{query.shape[0]} queries but {key.shape[0]} keys: decoding with a key/value cache is not served"
            )


class KeyConvWeights(nn.Module):
    """The parameters of a layer's convolution over keys; all zeros, it changes nothing.

    Args:
        width: of the convolution.
        config: of the model, not split by tensor parallelism.
    """

    def __init__(self, width: int, config: TransformerConfig):
        super().__init__()
        if config.tensor_model_parallel_size > 1:
            raise ValueError(
                f"attention.key_conv with tensor_model_parallel_size={config.tensor_model_parallel_size}: convolutions "
                "over keys are not split over tensor-parallel ranks; use 1, or leave attention.key_conv out"
            )
        shape = config.num_query_groups * config.kv_channels // 2, width
        self.weight = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
        """[g D / 2, width]: one for both channels that the rotary embedding turns together; each key's own first."""

    def extra_repr(self) -> str:
        return f"width={self.weight.shape[1]}"


_KERNELS = "the kernels are MoBA's own"
_SIZES_ON_HOST = "the exchange reads sizes on the host"
_ONE_GROUP = "the context-parallel group is the same for every batch"
# Fields of TransformerConfig by which Megatron's own core attention does something that this one does not: the value at
# which it does nothing, and the reason. The softcapping is that of configurations derived from Megatron's.
_REFUSED = {
    "softmax_type": ("vanilla", "attention sinks and off-by-one softmax are not served"),
    "window_size": (None, "MoBA attends to selected blocks, not to a sliding window"),
    "attn_logit_softcapping": (None, "scores are not capped"),
    "apply_query_key_layer_scaling": (False, "scores are scaled by softmax_scale alone"),
    "qk_clip": (False, "the largest score of a head is not recorded"),
    "log_max_attention_logit": (False, "the largest score of a head is not recorded"),
    "fp8_dot_product_attention": (False, "attention runs in the dtype of its inputs"),
    "fp8_multi_head_attention": (False, "attention runs in the dtype of its inputs"),
    "use_kitchen_attention": (False, _KERNELS),
    "flash_attention_version": (None, _KERNELS),
    "batch_invariant_mode": (False, "the kernels' shapes follow the batch's"),
    "flash_decode": (False, "decoding with a key/value cache is not served"),
    "experimental_attention_variant": (None, "the attention is MoBA"),
    "linear_attention_freq": (None, "layers of linear attention are not served"),
    "hybrid_context_parallel": (False, _ONE_GROUP),
    "dynamic_context_parallel": (False, _ONE_GROUP),
    "hierarchical_context_parallel_sizes": (None, "the exchange is MoBA's own"),
    "enable_cuda_graph": (False, _SIZES_ON_HOST),
    "external_cuda_graph": (False, _SIZES_ON_HOST),
    "cuda_graph_impl": ("none", _SIZES_ON_HOST),
}


def _refuse_unsupported(config, attn_mask_type, attention_type, dropout, cp_comm_type) -> None:
    def refuse(name: str, value, rule: str):
        raise ValueError(f"{name}={value!r}: {rule}")

    if attention_type != "self":
        refuse("attention_type", attention_type, "MoBA selects among a sequence's own blocks; use it in self-attention")
    if attn_mask_type != AttnMaskType.causal:
        refuse("attn_mask_type", attn_mask_type.name, "MoBA is causal; use AttnMaskType.causal")
    if dropout != 0:
        refuse("attention_dropout", dropout, "MoBA has no dropout on its scores; set it to 0")
    if cp_comm_type not in (None, "p2p"):
        refuse("cp_comm_type", cp_comm_type, "the exchange is MoBA's own; leave it at 'p2p', Megatron's default")
    if config.num_attention_heads % config.num_query_groups:
        refuse(
            "num_query_groups",
            config.num_query_groups,
            f"it must divide num_attention_heads={config.num_attention_heads}",
        )
    if config.multi_latent_attention:
        refuse("multi_latent_attention", True, "values narrower than keys are not served; use grouped-query attention")
    for name, (neutral, rule) in _REFUSED.items():
        # Other versions of megatron-core lack some of these.
        value = getattr(config, name, neutral)
        if value != neutral:
            refuse(name, value, f"{rule}; set it to {neutral!r}")
    backend = getattr(config.attention_backend, "name", config.attention_backend)
    if backend != "auto":
        refuse("attention_backend", backend, "the kernels are MoBA's own; leave it at 'auto'")
