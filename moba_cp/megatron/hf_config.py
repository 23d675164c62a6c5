"""The shape of a Hugging Face checkpoint's model."""

import json
from pathlib import Path

from .config import ModelConfig

# What a ModelConfig means, in the words of a checkpoint's config.json.
_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}


def model_config_of(path: str | Path, **changes) -> ModelConfig:
    """The shape of a checkpoint's model, for :func:`moba_cp.megatron.build_model`.

    Args:
        path: folder with ``config.json``.
        changes: other fields of the ModelConfig, such as ``recompute="full"``.

    Raises:
        ValueError: a model that ModelConfig cannot describe; one of Megatron's own may still take its weights.
    """
    hf = json.loads((Path(path) / "config.json").read_text())
    kind = hf.get("model_type")
    if kind not in ("llama", "mistral"):
        raise ValueError(
            f"model_type={kind!r} has parts that ModelConfig has not; use 'llama' or 'mistral', or a GPTModel of "
            "Megatron's own (Qwen: add_qkv_bias or qk_layernorm) and load_hf"
        )
    for name, value in _REQUIRED.items():
        if hf.get(name, value) != value:
            raise ValueError(f"{name}={hf[name]!r} in {path}/config.json is not served; it must be {value!r}")
    if hf.get("sliding_window") is not None:
        raise ValueError(
            f"sliding_window={hf['sliding_window']!r} in {path}/config.json is not served; remove it to train with "
            "MoBA instead"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"rope_type={rope_type!r} in {path}/config.json is not served; it must be 'default'")
    fields = {
        "vocab_size": hf["vocab_size"],
        "n_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "n_heads": hf["num_attention_heads"],
        "n_kv_heads": hf.get("num_key_value_heads"),
        "head_dim": hf.get("head_dim"),
        "ffn_hidden_size": hf["intermediate_size"],
        "rope_base": float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        "norm_eps": hf["rms_norm_eps"],
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }
    return ModelConfig(**{**fields, **changes})
