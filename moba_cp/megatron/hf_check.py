"""Whether a model of Megatron's computes what a checkpoint's weights were trained for, where shapes do not tell."""

import math

import torch.nn.functional as F
from torch import nn

from .hf_config import HFModel
from .rope import frequencies_of, same_frequencies

# Fields of TransformerConfig that change what the model computes, and the values that served checkpoints need.
_NEEDED = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "rotary_interleaved": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "window_size": None,
    "softmax_type": "vanilla",
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "use_mup": False,
}


def check_same_model(model: nn.Module, hf: HFModel, where: str, same_rotary: bool = True) -> None:
    """Raise ValueError, with both names and values, unless ``model`` is the one that ``hf`` describes.

    Args:
        model: Megatron's GPTModel, or ours.
        hf: from the config.json that messages call ``where``.
        same_rotary: the rotary embedding has to be that of ``hf`` too.
    """
    config = model.config
    for theirs, value, name, mine in (
        ("num_hidden_layers", hf.n_layers, "num_layers", config.num_layers),
        ("hidden_size", hf.hidden_size, "hidden_size", config.hidden_size),
        ("num_attention_heads", hf.n_heads, "num_attention_heads", config.num_attention_heads),
        ("num_key_value_heads", hf.n_kv_heads, "num_query_groups", config.num_query_groups),
        ("head_dim", hf.head_dim, "kv_channels", config.kv_channels),
        ("intermediate_size", hf.ffn_hidden_size, "ffn_hidden_size", config.ffn_hidden_size),
        ("rms_norm_eps", hf.norm_eps, "layernorm_epsilon", config.layernorm_epsilon),
    ):
        if value != mine:
            raise ValueError(f"{theirs}={value} in {where} but the model has {name}={mine}; build it with the same")
    needed = {**_NEEDED, "qk_layernorm": hf.qk_norm, "add_qkv_bias": hf.qkv_bias, "add_bias_linear": False}
    for name, value in needed.items():
        # Other versions of megatron-core lack some of these.
        mine = getattr(config, name, value)
        if mine != value:
            raise ValueError(
                f"the model has {name}={mine!r}, but model_type={hf.model_type!r} in {where} needs {value!r}"
            )
    if config.activation_func is not F.silu:
        name = getattr(config.activation_func, "__name__", config.activation_func)
        raise ValueError(
            f"the model has activation_func={name}, but hidden_act in {where} is silu; build it with F.silu"
        )
    scale = getattr(config, "softmax_scale", None) or hf.head_dim**-0.5
    if same_rotary and not math.isclose(scale, hf.softmax_scale, rel_tol=1e-6):
        rule = (
            "head_dim ** -0.5; leave it at None" if hf.softmax_scale == hf.head_dim**-0.5 else f"{hf.softmax_scale:g}"
        )
        raise ValueError(f"the model has softmax_scale={config.softmax_scale}, but {where} needs {rule}")
    if any(getattr(config, "no_rope_freq", None) or []):
        raise ValueError(f"the model has no_rope_freq={config.no_rope_freq}, but in {where} every layer turns; drop it")
    if model.share_embeddings_and_output_weights and not hf.tie_embeddings:
        raise ValueError(
            f"tie_word_embeddings=False in {where} but the model has share_embeddings_and_output_weights=True; "
            "build it without"
        )
    if same_rotary:
        _check_rotary(model, hf, where)


def _check_rotary(model: nn.Module, hf: HFModel, where: str) -> None:
    rotary = getattr(model, "rotary", None) or getattr(model, "rotary_pos_emb", None)
    if rotary is None:
        raise ValueError(
            f"the model has position_embedding_type={model.position_embedding_type!r}, but {where} needs 'rope'"
        )
    mine, theirs = frequencies_of(rotary), hf.frequencies()
    if not same_frequencies(mine, theirs):
        what = f"rope_theta={hf.rope_base:g}"
        if hf.rope_scaling is not None:
            what += f" and rope_scaling={hf.rope_scaling}"
        raise ValueError(
            f"the model's rotary frequencies are not those of {what} in {where}; build it with the same rotary_base, "
            "rope_scaling and rotary_percent (model_config_of)"
        )
