"""A language model as numbers: its shape, its attention by layer and by step, its rotary frequencies and its loss.

Nothing here knows of Megatron, or of any other library of models.
"""

from .attention import AttentionConfig
from .config import ModelConfig
from .rope import RopeScaling
from .schedule import Phase

__all__ = ["AttentionConfig", "ModelConfig", "Phase", "RopeScaling"]
