"""Context-parallel MoBA attention for training on very long sequences.

Legend: T tokens, Hq query heads, Hkv key/value heads, D head dim, B block size, k top-k, P ranks.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference
    from .attention import full_attention, moba_attention
    from .cache import KVCache
    from .config import MoBAConfig
    from .cp.calls import ExchangeError
    from .cp.context import CPContext
    from .cp.options import ExchangeOptions
    from .cp.recorder import SelectionRecorder

__version__ = "0.2.0"

__all__ = [
    "CPContext",
    "ExchangeError",
    "ExchangeOptions",
    "KVCache",
    "MoBAConfig",
    "SelectionRecorder",
    "full_attention",
    "moba_attention",
    "reference",
    "__version__",
]

# Public name -> its module. Imported at first use, so that `moba-cp --help` does not wait for PyTorch.
_MODULES = {
    "CPContext": "cp.context",
    "ExchangeError": "cp.calls",
    "ExchangeOptions": "cp.options",
    "KVCache": "cache",
    "MoBAConfig": "config",
    "SelectionRecorder": "cp.recorder",
    "full_attention": "attention",
    "moba_attention": "attention",
    "reference": "reference",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_MODULES[name]}", __name__)
    value = module if name == "reference" else getattr(module, name)
    globals()[name] = value  # so that this function runs once for each name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
