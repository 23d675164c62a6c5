"""The language model: Megatron-core's GPTModel over batches that carry a context.

Legend: L tokens of one sequence on this rank, b sequences, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..cp.context import CPContext
from ..model.attention import AttentionConfig
from ..model.config import ModelConfig
from ..model.layer import LayerMemory
from ..model.loss import linear_cross_entropy
from ..model.offload import Offloader
from .batch import MoBAPackedSeqParams, batch_context, group_size
from .core_attention import MoBACoreAttention
from .init import init_weights
from .parallel import process_groups
from .rope import ContextRotaryEmbedding
from .spec import context_layer_spec


class MoBAGPTModel(GPTModel):
    """Built by :func:`build_model`. Parameters have Megatron's names, layers are ``model.decoder.layers``.

    For FSDP2: ``fully_shard`` each of those and the model itself. Built on the ``meta`` device, follow by
    ``model.to_empty(device=...)`` and ``model.init_weights(seed)``.
    """

    def __init__(self, model: ModelConfig, attention: AttentionConfig, config: TransformerConfig, cp_group):
        super().__init__(
            config,
            context_layer_spec(
                attention, LayerMemory("none" if model.recompute == "auto" else model.recompute), model.qk_norm
            ),
            vocab_size=model.vocab_size,
            max_sequence_length=0,
            position_embedding_type="none",
            share_embeddings_and_output_weights=model.tie_embeddings,
            pg_collection=process_groups(cp_group),
        )
        self.model_config = model
        self.layout = attention.layout
        self.rotary = ContextRotaryEmbedding(model.head_dim, model.rope_base, scaling=model.rope_scaling)
        self._offloader: Offloader | None = None
        self.index_loss: Tensor | None = None
        """[] of the last batch, summed over this rank's rows, the mean over its layers with index branches: how far
        these are from what attention gives the blocks, in nats; None where they did not learn."""

    def init_weights(self, seed: int = 0) -> None:
        """Draw the initial weights; they depend on ``seed`` alone, whatever the ranks, sharding and device."""
        init_weights(self, seed, self.model_config.init_std, self.model_config.n_layers)

    def set_attention(self, attention: AttentionConfig) -> None:
        """Use another configuration from the next forward pass on, such as full attention late in training."""
        self.layout = attention.layout
        for module in self.modules():
            if isinstance(module, MoBACoreAttention):
                module.set_attention(attention)

    def set_memory(self, memory: Sequence[LayerMemory]) -> None:
        """What each layer keeps for the backward pass, and where, from the next forward pass on; no result depends on
        it."""
        for layer, of_layer in zip(self.decoder.layers, memory, strict=True):
            layer.memory = of_layer

    def offloader(self, device: torch.device) -> Offloader:
        """What the layers keep is held by it, on ``device`` or in host memory."""
        if self._offloader is None or self._offloader.host.device != device:
            self._offloader = Offloader(device)
        return self._offloader

    def __call__(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        context: CPContext | None = None,
        reduction: Literal["none", "sum"] = "none",
    ) -> Tensor:
        # FSDP2's hooks would rebuild a CPContext, so wrap it before they run; see MoBAPackedSeqParams.
        return super().__call__(tokens, labels, None if context is None else MoBAPackedSeqParams(context), reduction)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None,
        params: MoBAPackedSeqParams | None,
        reduction: Literal["none", "sum"] = "none",
    ) -> Tensor:
        """Loss of each token, or logits: ``model(tokens, labels=None, context=None, reduction="none")``.

        Args:
            tokens: [L] or [b, L] int64, this rank's share of each sequence.
            labels: like tokens, the token that follows; -100 where there is none. Shift before sharding.
            context: layout and documents of the sequences; by default one document per sequence, in the layout of the
                attention configuration. (:meth:`forward` itself gets it as ``params``.)
            reduction: ``sum`` for the sum of the losses, which computes logits once where ``none`` does twice. Index
                branches learn with ``sum`` alone: its gradient is also that of their losses, summed over rows, which
                its value leaves out (:attr:`index_loss`).

        Returns:
            loss, shaped like tokens, float32 (float64 in a float64 model), 0 where the label is -100; without labels
            the logits [..., V] in the model's dtype. With ``sum`` [], the sum of the losses.

        Raises:
            ValueError: shapes do not fit one another or the context.
        """
        context = None if params is None else params.context
        _check_batch(tokens, labels, context)
        batch = tokens.reshape(-1, tokens.shape[-1])
        if context is None:
            context = batch_context(None, batch.shape[1], self.cp_group, self.layout, tokens.device)
        positions = context.document_positions.to(tokens.device)
        angles = lambda: self.rotary.angles(positions)
        params = MoBAPackedSeqParams(context, angles, self.offloader(tokens.device))
        hidden = self.embedding(input_ids=batch, position_ids=None)
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=params)
        hidden = hidden.transpose(0, 1).reshape(tokens.numel(), -1)
        shared = self.share_embeddings_and_output_weights
        weight = self.embedding.word_embeddings.weight if shared else self.output_layer.weight
        if labels is None:
            return F.linear(hidden, weight).view(*tokens.shape, -1)
        loss = linear_cross_entropy(hidden, weight, labels.reshape(-1), reduction=reduction)
        self.index_loss = None
        if params.index_losses:
            of_layers = torch.stack(params.index_losses).sum()
            n_layers = sum(1 for layer in self.decoder.layers if layer.self_attention.core_attention.index is not None)
            self.index_loss = of_layers.detach() / n_layers
            if reduction == "sum":
                # The loss as it is, with the gradient of both.
                loss = loss + (of_layers - of_layers.detach()).to(loss.dtype)
        return loss.view(tokens.shape) if reduction == "none" else loss


def build_model(
    model: ModelConfig,
    attention: AttentionConfig,
    cp_group: dist.ProcessGroup | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> MoBAGPTModel:
    """A model with initial weights.

    Args:
        model: its shape.
        attention: MoBA and full layers.
        cp_group: context-parallel group; None is one rank. Torch.distributed is started for one process where it has
            not been.
        dtype: of all parameters. For FSDP2's mixed precision build in float32.
        device: where the parameters go; on ``meta`` they have no values yet, see :class:`MoBAGPTModel`.
        seed: of the initial weights.

    Raises:
        ValueError: the configurations do not fit one another.
    """
    attention.full_layer_numbers(model.n_layers)
    with torch.device("meta"):
        config = _transformer_config(model, group_size(cp_group), dtype)
        # Megatron's embedding then sums gradients in a fixed order.
        config.deterministic_mode = attention.deterministic
        built = MoBAGPTModel(model, attention, config, cp_group)
    # Megatron makes its norms in float32, whatever params_dtype.
    built.to(dtype)
    if torch.device(device).type != "meta":
        built.to_empty(device=device)
        built.init_weights(seed)
    return built


def _transformer_config(model: ModelConfig, cp_size: int, dtype: torch.dtype) -> TransformerConfig:
    with warnings.catch_warnings():
        # Megatron's own default triggers this warning of it.
        warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
        return _build_transformer_config(model, cp_size, dtype)


def _build_transformer_config(model: ModelConfig, cp_size: int, dtype: torch.dtype) -> TransformerConfig:
    return TransformerConfig(
        num_layers=model.n_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.n_heads,
        num_query_groups=model.n_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        softmax_scale=model.softmax_scale,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        context_parallel_size=cp_size,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # Parameters are made on the meta device and filled by init_weights.
        use_cpu_initialization=True,
        perform_initialization=False,
        # Fusions that need Apex or TransformerEngine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _check_batch(tokens: Tensor, labels: Tensor | None, context: CPContext | None) -> None:
    if tokens.dim() not in (1, 2) or tokens.numel() == 0:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; pass [tokens] or [sequences, tokens], not empty")
    if labels is not None and labels.shape != tokens.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} but tokens has {tuple(tokens.shape)}; make them equal"
        )
    if context is not None and tokens.shape[-1] != context.local_len:
        raise ValueError(
            f"tokens has {tokens.shape[-1]} tokens a sequence but rank {context.rank} of {context.size} holds "
            f"{context.local_len} of seq_len={context.seq_len}; pass the local share, context.shard(tokens, dim=-1)"
        )
