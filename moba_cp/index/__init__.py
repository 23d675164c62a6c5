"""The index branch: a small trainable scorer beside a layer's attention that chooses the blocks of each KV group."""

from .config import IndexConfig

__all__ = ["IndexConfig"]
