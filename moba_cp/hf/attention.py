"""The function that transformers calls in every layer.

Legend: b sequences, n rows and L >= n keys of each, h heads, d head dim.
"""

from functools import lru_cache

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..attention import full_attention, moba_attention
from ..cache import FEW_ROWS
from .documents import moba_mask, padding_of
from .options import NAME, LayerOptions, check_model, read_options

# Arguments by which models ask for something else; None, 0 and False are not asking.
_NOT_SERVED = {
    "sliding_window": "sliding windows",
    "softcap": "soft caps on attention scores",
    "s_aux": "attention sinks",
    "position_bias": "biases of attention scores",
    "head_mask": "masks of heads",
    "output_attentions": "returning attention weights, which nobody computes",
    "dropout": "dropout of attention",
}


def register() -> None:
    """Make ``attn_implementation="moba"`` known to transformers."""
    AttentionInterface.register(NAME, moba_forward)
    AttentionMaskInterface.register(NAME, moba_mask)


def moba_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    moba_context=None,
    **kwargs,
) -> tuple[Tensor, None]:
    """MoBA or full attention of one layer.

    Args:
        query: [b, h, n, d].
        key, value: [b, hkv, L, d].
        attention_mask: of :func:`.documents.moba_mask`.
        scaling: factor of the scores.
        cu_seq_lens_q, cu_seq_lens_k: boundaries of packed documents in a batch of one, as transformers' collators give.
        moba_context: a :class:`moba_cp.CPContext` whose share of a sequence this is.

    Returns:
        out [b, n, h, d], and None for the weights.

    Raises:
        ValueError: something is asked for that MoBA does not do.
    """
    _check_served(module, attention_mask, kwargs, moba_context)
    options = _layer_options(module, getattr(module, "_moba_text", None))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    n_rows, n_keys = q.shape[1], k.shape[1]
    kind = options.decoding if n_rows <= FEW_ROWS and n_keys > n_rows else options.kind
    layer = None if torch.compiler.is_compiling() else getattr(key, "moba_layer", None)
    convolved = layer is not None and layer.recent is not None and attention_mask is None
    if hasattr(module, "key_conv") and not convolved:
        raise ValueError(
            "the model's keys are convolved, which is done in a MoBACache for sequences without padding; pass "
            "past_key_values=MoBACache(model)"
        )
    if moba_context is not None and layer is not None:
        raise ValueError(
            "moba_context beside a MoBACache, which holds whole sequences on one rank; leave past_key_values out"
        )
    if moba_context is not None and cu_seq_lens_q is not None:
        raise ValueError(
            "cu_seq_lens_q beside moba_context, whose documents count; give it to moba_cp.hf.ContextParallel instead"
        )
    if layer is not None:
        if cu_seq_lens_q is not None:
            raise ValueError(
                "cu_seq_lens_q with a MoBACache, which holds one document of each sequence; leave past_key_values out "
                "for packed documents (use_cache=False)"
            )
        padding = None if attention_mask is None else _padding(attention_mask, n_keys)
        if kind == "moba":
            return layer.tokens.moba_attention(q, options.moba, scaling, padding), None
        return layer.tokens.full_attention(q, scaling, padding), None
    how = {}
    if moba_context is not None:
        how["cp"] = moba_context
    elif cu_seq_lens_q is not None:
        if q.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q with {q.shape[0]} sequences; packed documents come as one sequence")
        how["cu_seqlens"] = cu_seq_lens_q
        how["cu_seqlens_k"] = None if n_rows == n_keys else cu_seq_lens_k
    elif attention_mask is not None:
        how["cu_seqlens"] = attention_mask[0]
        how["cu_seqlens_k"] = None if n_rows == n_keys else attention_mask[1]
    shape = q.shape
    if how:
        q, k, v = (x[0] if x.shape[0] == 1 else x.flatten(0, 1) for x in (q, k, v))
    if kind == "moba":
        out = moba_attention(q, k, v, options.moba, softmax_scale=scaling, **how)
    else:
        out = full_attention(q, k, v, softmax_scale=scaling, deterministic=options.moba.deterministic, **how)
    return out.view(shape), None


@torch.compiler.assume_constant_result
def _layer_options(module: torch.nn.Module, _text: str | None) -> LayerOptions:
    """What the module's config says of its layer; read again only when it changes. A compiled graph holds the result
    until ``_text`` is another, which :func:`.options.use_moba` writes."""
    config = module.config
    known = module.__dict__.get("_moba_options")
    if known is None or known[0] != (config.moba if hasattr(config, "moba") else None):
        options = getattr(config, "moba", None)
        layers = read_options(options, config.num_hidden_layers)
        check_model(config)
        # Not an attribute of the module: those are parameters, buffers and modules to FSDP and torch.compile.
        module.__dict__["_moba_options"] = known = dict(options), layers[module.layer_idx]
    return known[1]


def _check_served(module, attention_mask, kwargs, moba_context) -> None:
    for name, what in _NOT_SERVED.items():
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            raise ValueError(f"{name} is {list(value.shape)}: attn_implementation='moba' does not serve {what}")
        if value:
            raise ValueError(f"{name}={value!r}: attn_implementation='moba' does not serve {what}")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(
            f"{type(module).__name__} attends in both directions or to an encoder; attn_implementation='moba' serves "
            "causal self-attention"
        )
    if attention_mask is not None and attention_mask.dim() != 2 and moba_context is None:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; attn_implementation='moba' takes no dense mask: "
            "pass [sequences, tokens] of ones and zeros, or position_ids that begin again with each document"
        )


@lru_cache(maxsize=2)
def _padding(ends: Tensor, n_keys: int) -> Tensor:
    """The layers of a model are given the same mask, one after the other."""
    return padding_of(ends, n_keys)
