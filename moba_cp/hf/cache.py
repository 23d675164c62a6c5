"""What ``generate`` keeps between tokens: keys and values in the kernels' layout, with block means beside them."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..cache import KVCache
from .key_conv import RecentKeys, key_conv_weights
from .options import read_options


class MoBALayer(DynamicLayer):
    """One layer of a :class:`MoBACache`; ``keys`` and ``values`` are views [b, h, L, d]."""

    is_sliding = False
    is_compileable = False

    def __init__(self, block_size: int, capacity: int, key_conv: Tensor | None = None):
        super().__init__()
        self._options, self._key_conv = (block_size, capacity), key_conv
        self._begin()

    def _begin(self) -> None:
        self.tokens = KVCache(*self._options)
        self.recent = None if self._key_conv is None else RecentKeys(self._key_conv)
        """The keys of ``tokens`` are convolved by it."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing: storage is made when the first tokens come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append key_states, value_states [b, h, n, d]; returns those of all tokens, without a copy."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        k, v = key_states.transpose(1, 2), value_states.transpose(1, 2)
        self.tokens.append(k if self.recent is None else self.recent.convolved(k, self.tokens), v)
        self.look()
        # The attention function finds the means by it.
        self.keys.moba_layer = self
        return self.keys, self.values

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        """Keys and their offset for ``query_length`` tokens to come, which transformers 4.57 gives as positions [n]."""
        n_rows = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.tokens.length + n_rows, 0

    def get_seq_length(self, *args) -> int:
        """L."""
        return self.tokens.length

    def reset(self) -> None:
        """Forget all tokens."""
        self._begin()
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, count: int) -> None:
        """Forget the last ``-count`` tokens; as transformers 4.57 calls it, a positive ``count`` is what remains."""
        length = self.tokens.length
        left = max(0, length + count) if count <= 0 else min(count, length)
        if self.recent is not None and left < length:
            raise ValueError(
                f"crop to {left} of {length} tokens: the model's keys are convolved, and of those before the last few "
                "only the results are there; reset the cache and begin again"
            )
        self.tokens.crop(left)
        self.look()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with the sequences ``beam_idx``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, which are numbers or a mask."""
        if self.tokens.length:
            sequences = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            self.tokens.select(sequences)
            if self.recent is not None:
                self.recent.select(sequences)
            self.look()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.tokens.length:
            batch = self.keys.shape[0]
            self.batch_select_indices(torch.arange(batch, device=self.device).repeat_interleave(repeats))

    def offload(self) -> None:
        """Refused: attention would have to wait for all keys, of which it needs few."""
        raise ValueError("MoBACache stays on its device; use transformers' OffloadedCache for full attention")

    def look(self) -> None:
        """Let ``keys`` and ``values`` be those of all tokens that are there."""
        self.keys, self.values = (x.transpose(1, 2) for x in (self.tokens.k, self.tokens.v))


class MoBACache(Cache):
    """A cache for ``generate`` and for forward passes of a model that attends with MoBA.

    Args:
        model: a model, or its config, with ``config.moba``.
        capacity: tokens that will come, prompt and answer together; with fewer, storage grows by copies.

    Raises:
        ValueError: the config has no ``moba``.
    """

    def __init__(self, model, capacity: int = 0):
        config = getattr(model, "config", model).get_text_config()
        options = read_options(getattr(config, "moba", None), config.num_hidden_layers)
        weights = key_conv_weights(model)
        super().__init__(
            layers=[MoBALayer(layer.moba.block_size, capacity, weights.get(i)) for i, layer in enumerate(options)]
        )

    @property
    def nbytes(self) -> int:
        """Memory of all layers, room included."""
        return sum(layer.tokens.nbytes for layer in self.layers)
