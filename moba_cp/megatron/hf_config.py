"""What a Hugging Face checkpoint's config.json says of its model: read once, checked, and in Megatron's terms."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..model.config import ModelConfig
from ..model.rope import RopeScaling, rope_frequencies

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Fields that change what the model computes, and the values at which they change nothing.
_NEUTRAL = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    "no_rope_layers": (None,),
    "quantization_config": (None,),
}
_REQUIRED = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class HFModel:
    """A checkpoint's model, as far as it is not said by the shapes of its weights."""

    model_type: str
    """``llama``, ``mistral``, ``qwen2`` or ``qwen3``."""
    vocab_size: int
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    norm_eps: float
    tie_embeddings: bool
    rope_base: float
    rope_scaling: RopeScaling | None
    """Of Llama 3.1."""
    rope_divisor: float
    """What linear scaling divides all frequencies by; 1 without."""

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys go through a norm."""
        return self.model_type == "qwen3"

    def frequencies(self) -> Tensor:
        """[head_dim / 2] float64: radians per token of the rotary embedding."""
        return rope_frequencies(self.head_dim, self.rope_base, self.rope_scaling) / self.rope_divisor


def read_config(path: str | Path) -> dict:
    """``config.json`` of a checkpoint's folder.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    file = Path(path) / "config.json"
    try:
        hf = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"path={str(path)!r} holds no config.json, which says what the weights are for") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{file} holds a {type(hf).__name__}, not the fields of a model")
    return hf


def describe(hf: dict, where: str) -> HFModel:
    """The model that the fields of a config.json describe.

    Args:
        hf: the fields.
        where: what a message calls them, such as ``llama/config.json``.

    Raises:
        ValueError: something that is not served, or a field is missing.
    """

    def refuse(name: str, value, rule: str):
        raise ValueError(f"{name}={value!r} in {where} is not served: {rule}")

    kind = hf.get("model_type")
    if kind not in MODEL_TYPES:
        refuse("model_type", kind, f"use one of {', '.join(MODEL_TYPES)}")
    for name, values in _NEUTRAL.items():
        if name in hf and hf[name] not in values:
            refuse(name, hf[name], f"it must be {values[0]!r}")
    _check_windows(hf, kind, refuse)
    missing = [name for name in _REQUIRED if name not in hf]
    if missing:
        raise ValueError(f"{where} has no {missing[0]}; it is not the config.json of a whole model")
    base, scaling, divisor = _rope(hf, where, refuse)
    n_heads = hf["num_attention_heads"]
    # Where a field is missing, what transformers takes.
    head_dim = hf.get("head_dim") or (128 if kind == "qwen3" and "head_dim" not in hf else hf["hidden_size"] // n_heads)
    return HFModel(
        model_type=kind,
        vocab_size=hf["vocab_size"],
        n_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        head_dim=head_dim,
        ffn_hidden_size=hf["intermediate_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        rope_base=base,
        rope_scaling=scaling,
        rope_divisor=divisor,
    )


def _check_windows(hf: dict, kind: str, refuse) -> None:
    rule = "attention is over all earlier tokens, or MoBA; set it to null to train with that instead"
    # Qwen's window is there, but off, unless use_sliding_window says otherwise. Mistral's is on where nothing is said.
    if kind in ("qwen2", "qwen3"):
        if hf.get("use_sliding_window"):
            refuse("use_sliding_window", hf["use_sliding_window"], rule.replace("null", "false"))
    elif (window := hf.get("sliding_window", 4096 if kind == "mistral" else None)) is not None:
        refuse("sliding_window", window, rule)
    layer_types = hf.get("layer_types") or []
    others = sorted({str(x) for x in layer_types if x != "full_attention"})
    if others:
        refuse("layer_types", others, "every layer must be 'full_attention'")


def _rope(hf: dict, where: str, refuse) -> tuple[float, RopeScaling | None, float]:
    """Base, Llama 3.1's scaling and the divisor of linear scaling."""
    # Files of transformers 4 have rope_scaling and rope_theta, later ones rope_parameters.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    base = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        refuse("partial_rotary_factor", rope["partial_rotary_factor"], "it must be 1.0")
    if "mrope_section" in rope:
        refuse("mrope_section", rope["mrope_section"], "positions have one dimension")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    try:
        if rope_type == "default":
            return base, None, 1.0
        if rope_type == "linear":
            return base, None, float(rope["factor"])
        if rope_type == "llama3":
            original = rope.get("original_max_position_embeddings") or hf["max_position_embeddings"]
            names = ("factor", "low_freq_factor", "high_freq_factor")
            return base, RopeScaling(*(rope[name] for name in names), original), 1.0
    except KeyError as error:
        raise ValueError(f"{where} has no {error.args[0]}, which rope_type={rope_type!r} needs") from None
    refuse("rope_type", rope_type, "use 'default', 'linear' or 'llama3'")


def model_config_of(path: str | Path, **changes) -> ModelConfig:
    """The shape of a checkpoint's model, for :func:`moba_cp.megatron.build_model`.

    Args:
        path: folder with ``config.json``.
        changes: other fields of the ModelConfig, such as ``recompute="full"``.

    Raises:
        ValueError: a model that ModelConfig cannot describe; one of Megatron's own may still take its weights.
    """
    where = f"{path}/config.json"
    hf = describe(read_config(path), where)
    if hf.qkv_bias or hf.qk_norm:
        raise ValueError(
            f"model_type={hf.model_type!r} in {where} has parts that ModelConfig has not; use 'llama' or 'mistral', or "
            "a GPTModel of Megatron's own (Qwen: add_qkv_bias or qk_layernorm) and load_hf"
        )
    if hf.rope_divisor != 1:
        raise ValueError(
            f"rope_type='linear' in {where} is not served by build_model; use a GPTModel of Megatron's own with "
            f"seq_len_interpolation_factor={hf.rope_divisor:g} and load_hf"
        )
    fields = {
        "vocab_size": hf.vocab_size,
        "n_layers": hf.n_layers,
        "hidden_size": hf.hidden_size,
        "n_heads": hf.n_heads,
        "n_kv_heads": hf.n_kv_heads,
        "head_dim": hf.head_dim,
        "ffn_hidden_size": hf.ffn_hidden_size,
        "rope_base": hf.rope_base,
        "rope_scaling": hf.rope_scaling,
        "norm_eps": hf.norm_eps,
        "tie_embeddings": hf.tie_embeddings,
    }
    return ModelConfig(**{**fields, **changes})
