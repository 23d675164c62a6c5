"""MoBA inside transformers: ``attn_implementation="moba"`` for models of Llama's shape.

Importing this package registers the attention and its mask. :mod:`.options` says what a model's config tells a layer,
:mod:`.documents` turns masks and position ids into boundaries, :mod:`.attention` is what transformers calls,
:mod:`.cache` what ``generate`` keeps, with convolved keys by :mod:`.key_conv`, :mod:`.graph` makes one CUDA graph of a
token's pass, :mod:`.parallel` spreads a sequence over ranks, and :mod:`.answer` answers prompts.
"""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "moba_cp.hf needs transformers 4.57 or newer; install with: pip install 'transformers >= 4.57'",
        name="transformers",
    )

from .attention import register
from .cache import MoBACache
from .graph import decoding_graph
from .options import use_moba
from .parallel import ContextParallel

register()

__all__ = ["ContextParallel", "MoBACache", "decoding_graph", "use_moba"]
