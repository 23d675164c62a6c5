"""What a Hugging Face checkpoint's config.json says of its model: read once, checked, and in Megatron's terms."""

import json
import math
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
        return rope_frequencies(self.head_dim, self.rope_base, self.rope_scaling)

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 * (1.0 if self.rope_scaling is None else self.rope_scaling.score_factor)


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
    base, scaling = _rope(hf, where, refuse)
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


def _rope(hf: dict, where: str, refuse) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding."""
    # Files of transformers 4 have rope_scaling and rope_theta, later ones rope_parameters.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    base = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        refuse("partial_rotary_factor", rope["partial_rotary_factor"], "it must be 1.0")
    if "mrope_section" in rope:
        refuse("mrope_section", rope["mrope_section"], "positions have one dimension")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    original = rope.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
    try:
        if rope_type == "default":
            return base, None
        if rope_type == "linear":
            return base, RopeScaling(float(rope["factor"]), kind="linear")
        if rope_type == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            return base, RopeScaling(*(rope[name] for name in names), original)
        if rope_type == "yarn":
            return base, _yarn(rope, original, refuse)
    except KeyError as error:
        raise ValueError(f"{where} has no {error.args[0]}, which rope_type={rope_type!r} needs") from None
    refuse("rope_type", rope_type, "use 'default', 'linear', 'llama3' or 'yarn'")


def _yarn(rope: dict, original: int, refuse) -> RopeScaling:
    if rope.get("truncate") not in (None, True):
        refuse("truncate", rope["truncate"], "it must be true")
    factor = float(rope["factor"])
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        one, all_dim = (0.1 * rope[name] * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
        attention = one / all_dim
    return RopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        kind="yarn",
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=attention,
    )


def model_config_of(path: str | Path, **changes) -> ModelConfig:
    """The shape of a checkpoint's model, for :func:`moba_cp.megatron.build_model`.

    Args:
        path: folder with ``config.json``.
        changes: other fields of the ModelConfig, such as ``recompute="full"``.

    Raises:
        ValueError: a model that is not served.
    """
    where = f"{path}/config.json"
    hf = describe(read_config(path), where)
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
        "qk_norm": hf.qk_norm,
        "qkv_bias": hf.qkv_bias,
    }
    return ModelConfig(**{**fields, **changes})


def hf_config_of(model: ModelConfig, seq_len: int, dtype: str = "float32", **tokens: int | None) -> dict:
    """The ``config.json`` of a model, for :func:`moba_cp.megatron.save_hf`: Qwen3's with norms of queries and keys,
    Qwen2's with biases, else Llama's.

    Args:
        model: its shape.
        seq_len: tokens of the longest sequences it was trained on.
        dtype: of the weights that are written beside it.
        tokens: ``bos_token_id``, ``eos_token_id`` and the like; None where there is none.

    Raises:
        ValueError: no type of model in transformers has these parts together.
    """
    if model.qk_norm and model.qkv_bias:
        raise ValueError("model.qk_norm with model.qkv_bias: neither Qwen2 nor Qwen3 has both; it cannot be exported")
    kind = "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias else "llama"
    if kind == "qwen2" and model.head_dim * model.n_heads != model.hidden_size:
        raise ValueError(
            f"model.head_dim={model.head_dim}: Qwen2, whose biases it has, knows hidden_size / n_heads = "
            f"{model.hidden_size / model.n_heads:g} alone; it cannot be exported"
        )
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    rope = {"rope_theta": model.rope_base, "rope_type": "default", **_rope_fields(model.rope_scaling)}
    hf = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        # transformers 5 reads rope_parameters, earlier versions the other two.
        "rope_parameters": rope,
        "rope_theta": model.rope_base,
        "rope_scaling": None if model.rope_scaling is None else rope,
        "dtype": dtype,
        "torch_dtype": dtype,
        **tokens,
    }
    return hf | ({"attention_bias": False, "mlp_bias": False} if kind == "llama" else {"use_sliding_window": False})


def _rope_fields(scaling: RopeScaling | None) -> dict:
    if scaling is None:
        return {}
    fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return fields
    fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        return fields | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return fields | {"attention_factor": math.sqrt(scaling.score_factor)}
