"""Context-parallel MoBA attention for training on very long sequences.

Legend: T tokens, Hq query heads, Hkv key/value heads, D head dim, B block size, k top-k, P ranks.
"""

from . import reference
from .attention import full_attention, moba_attention
from .config import MoBAConfig
from .cp.context import CPContext

__version__ = "0.1.0"

__all__ = ["CPContext", "MoBAConfig", "full_attention", "moba_attention", "reference", "__version__"]
