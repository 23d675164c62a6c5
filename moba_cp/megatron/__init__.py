"""MoBA inside Megatron-core: core attention, hybrids by layer, rotary embedding, layer specs and a model builder.

The configurations import without megatron-core; everything else loads on first use.
"""

import importlib
import warnings

from ..model import AttentionConfig, ModelConfig, RopeScaling
from .arguments import add_moba_args

# Optional accelerators that nothing here uses; megatron-core reports each of them at import.
warnings.filterwarnings(
    "ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed", category=UserWarning
)

_LAZY = {
    "MoBACoreAttention": "core_attention",
    "MoBAPackedSeqParams": "core_attention",
    "ContextRotaryEmbedding": "rope",
    "core_attention_spec": "spec",
    "layer_spec": "spec",
    "block_spec": "spec",
    "with_moba": "spec",
    "MoBAGPTModel": "model",
    "build_model": "model",
    "load_hf": "hf",
    "hf_config_of": "hf_config",
    "model_config_of": "hf_config",
    "save_hf": "hf",
}

__all__ = ["AttentionConfig", "ModelConfig", "RopeScaling", "add_moba_args", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
