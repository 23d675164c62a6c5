"""Convolutions over keys (``attention.key_conv``) in models of transformers that answer prompts.

Not transformers' own: such a model is made by :func:`add_key_conv` for a run's weights, and is not saved. Its attention
takes keys from a :class:`moba_cp.hf.MoBACache` alone, which convolves them as they come.

Legend: b sequences, n tokens of each that come at once, g key heads, d head dim, w width.
"""

import torch
from torch import Tensor, nn

from ..cache import KVCache
from ..cp.key_conv import convolve_next_keys


def add_key_conv(model, width: int) -> None:
    """Give each layer of a model of Llama's shape the parameter ``self_attn.key_conv`` [g d / 2, width], all zeros."""
    for layer in model.model.layers:
        keys = layer.self_attn.k_proj.weight
        layer.self_attn.key_conv = nn.Parameter(keys.new_zeros(keys.shape[0] // 2, width))


def key_conv_weights(model) -> dict[int, Tensor]:
    """Weights [g d / 2, w] by the layer's number from 0; none for models without, and for configs."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return {module.layer_idx: module.key_conv for module in modules if hasattr(module, "key_conv")}


class RecentKeys:
    """The last keys of a layer before they were convolved, which the next ones get a part of.

    Args:
        weight: [g d / 2, w], see :func:`moba_cp.cp.key_conv.convolve_keys`.
    """

    def __init__(self, weight: Tensor):
        self._weight = weight
        self.storage: Tensor | None = None
        """[b, w, g, d]; the key of position ``p`` in row ``p % w``, zeros before the first."""

    @torch.no_grad()
    def convolved(self, k: Tensor, tokens: KVCache) -> Tensor:
        """What is appended to ``tokens`` for the keys k [b, n, g, d].

        Within a :class:`moba_cp.steps.Step` nothing depends on what the host knows, and what a step writes is not what
        it reads: it may run more than once.
        """
        n, width = k.shape[1], self._weight.shape[1]
        if self.storage is None:
            self.storage = k.new_zeros(k.shape[0], width, *k.shape[2:])
        if tokens.step is not None:
            begin = tokens.step.position
        else:
            begin = torch.full((1,), tokens.length, dtype=torch.int64, device=k.device)
        earlier = torch.arange(1 - width, 0, dtype=torch.int64, device=k.device)
        before = self.storage.index_select(1, (begin + earlier) % width)
        last = torch.arange(max(0, n - width), n, dtype=torch.int64, device=k.device)
        self.storage.index_copy_(1, (begin + last) % width, k[:, max(0, n - width) :].to(self.storage.dtype))
        return convolve_next_keys(k, before, self._weight)

    def select(self, sequences: Tensor) -> None:
        """Go on with some sequences: [b'] int64."""
        if self.storage is not None:
            self.storage = self.storage.index_select(0, sequences.to(self.storage.device))
