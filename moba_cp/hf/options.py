"""What a model's config says of MoBA: ``config.moba``, a dict that is saved in config.json with the rest.

    {"block_size": 512, "top_k": 8, "full_layers": "last 1", "decoding": "moba", "deterministic": false}

Only the first two must be there; ``shared_by_group``, ``score``, ``min_recent`` and ``sink`` of
:class:`moba_cp.MoBAConfig` may be. ``moba-cp export`` writes it.
"""

from dataclasses import dataclass

from ..config import Gate, MoBAConfig, Score, Sharing
from ..model.attention import AttentionConfig
from ..model.schedule import Kind

NAME = "moba"
_DECODING = ("moba", "full")
# Fields of configs, and what a model that sets them does beyond causal attention. Where a field is absent, None, 0 or
# False, the model does without.
_NOT_SERVED = {
    "attn_logit_softcapping": "soft caps on attention scores",
    "attention_chunk_size": "attention within chunks",
    "is_encoder_decoder": "attention to an encoder",
    "use_bidirectional_attention": "attention in both directions",
}


@dataclass(frozen=True)
class LayerOptions:
    """Attention of one layer."""

    kind: Kind
    """Of rows of a prompt or of training."""
    decoding: Kind
    """Of few rows behind which there are more keys."""
    moba: MoBAConfig


def use_moba(
    model,
    block_size: int,
    top_k: int,
    full_layers: str | list[int] = "none",
    decoding: Kind = "moba",
    deterministic: bool = False,
    shared_by_group: Sharing = "none",
    score: Score = "mean",
    min_recent: int = 0,
    sink: bool = False,
):
    """Let a transformers model attend with MoBA from now on.

    Writes ``model.config.moba`` and sets ``attn_implementation="moba"``; a model saved after that carries it along and
    is loaded with ``from_pretrained(..., attn_implementation="moba")`` where ``moba_cp.hf`` is imported.

    Args:
        model: a causal language model whose layers go through transformers' attention interface: Llama, Mistral, Qwen2,
            Qwen3 and others of that shape; also inside of PEFT's wrappers.
        block_size: tokens per block, a multiple of 16.
        top_k: blocks that each query and head attends to, its current block included.
        full_layers: layers with full attention: ``none``, ``last N`` or a list of layer numbers counted from 1.
        decoding: ``moba`` or ``full`` attention for tokens that are generated one by one, in all layers.
        deterministic: bit-identical gradients from run to run, at some cost in speed.
        shared_by_group, score, min_recent, sink: how blocks are chosen, see :class:`moba_cp.MoBAConfig`.

    Returns:
        ``model``.

    Raises:
        ValueError: an option is out of range, or the model does something that MoBA does not: the message names it.
    """
    config = model.config.get_text_config()
    options = {
        "block_size": block_size,
        "top_k": top_k,
        "full_layers": full_layers if isinstance(full_layers, str) else list(full_layers),
        "decoding": decoding,
        "deterministic": deterministic,
        **Gate(shared_by_group, score, min_recent, sink).changed(),
    }
    read_options(options, config.num_hidden_layers)
    check_model(config)
    config.moba = options
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{type(inner).__name__} does not take another attention: its layers do not go through transformers' "
            "attention interface; use a model of Llama's shape"
        )
    for module in inner.modules():
        if hasattr(module, "layer_idx"):
            module._moba_text = repr(options)
    return model


def check_model(config) -> None:
    """Raise ValueError for a config of a model that does what MoBA does not."""
    name = type(config).__name__
    for field, what in _NOT_SERVED.items():
        if getattr(config, field, None):
            raise ValueError(f"{name}.{field}={getattr(config, field)!r}: MoBA does not serve {what}")
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        raise ValueError(
            f"{name}.layer_types has {', '.join(kinds)}: MoBA serves full_attention alone, no sliding windows or "
            "chunks; where all layers may attend to all earlier tokens, set layer_types and sliding_window accordingly"
        )
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"{name}.sliding_window={config.sliding_window}: MoBA does not serve sliding windows; set it to None if "
            "layers may attend to all earlier tokens"
        )
    if getattr(config, "attention_dropout", 0):
        raise ValueError(
            f"{name}.attention_dropout={config.attention_dropout}: MoBA does not serve dropout of attention; use 0"
        )


def read_options(options, n_layers: int) -> list[LayerOptions]:
    """``config.moba`` for every layer.

    Raises:
        ValueError: there is none, or it has other keys or values.
    """
    if not isinstance(options, dict):
        raise ValueError(
            f"config.moba={options!r}, but attn_implementation='moba' needs a block size and top-k; call "
            "moba_cp.hf.use_moba(model, block_size=512, top_k=8)"
        )
    known = {"block_size", "top_k", "full_layers", "decoding", "deterministic", *Gate._fields}
    if not {"block_size", "top_k"} <= set(options) <= known:
        raise ValueError(
            f"config.moba has the keys {', '.join(map(str, options))}; use block_size and top_k, and of "
            f"{', '.join(sorted(known - {'block_size', 'top_k'}))} what you need"
        )
    decoding = options.get("decoding", "moba")
    if decoding not in _DECODING:
        raise ValueError(f"decoding={decoding!r} is not a kind of attention; use one of {', '.join(_DECODING)}")
    attention = AttentionConfig(
        block_size=options["block_size"],
        top_k=options["top_k"],
        full_layers=options.get("full_layers", "none"),
        deterministic=options.get("deterministic", False),
        **{name: options[name] for name in Gate._fields if name in options},
    )
    kinds = [attention.kind(number, n_layers) for number in range(1, n_layers + 1)]
    return [LayerOptions(kind, "full" if decoding == "full" else kind, attention.moba) for kind in kinds]
