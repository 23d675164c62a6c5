"""The shape of the language model, and what follows from it: parameters and FLOPs."""

import math
from dataclasses import dataclass
from typing import Literal

from .attention import AttentionConfig
from .rope import RopeScaling

RECOMPUTE = ("auto", "none", "attention_kept", "full")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases, no dropout.

    Raises:
        ValueError: a field is out of range or does not fit the others; the message names it, its value and the rule.
    """

    vocab_size: int = 256
    """Number of different tokens."""

    n_layers: int = 4
    """Transformer layers."""

    hidden_size: int = 256
    """Width of the residual stream."""

    n_heads: int = 4
    """Query heads."""

    n_kv_heads: int | None = None
    """Key/value heads; divides ``n_heads``. None: as many as query heads."""

    head_dim: int | None = None
    """Width of one head, even. None: ``hidden_size / n_heads``."""

    ffn_hidden_size: int | None = None
    """Width of the SwiGLU. None: 8/3 of ``hidden_size``, rounded up to a multiple of 64."""

    rope_base: float = 10000.0
    """Base of the rotary frequencies; larger for longer sequences."""

    rope_scaling: RopeScaling | None = None
    """A change of the rotary frequencies (Llama 3.1's, linear or YaRN's); none by default."""

    norm_eps: float = 1e-5
    """Epsilon of the RMSNorms."""

    init_std: float = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream get it divided by
    ``sqrt(2 * n_layers)``."""

    tie_embeddings: bool = False
    """Use the token embedding as output layer too."""

    qk_norm: bool = False
    """Normalize each head of queries and keys (RMSNorm with weights) before they are turned, as Qwen3 does."""

    qkv_bias: bool = False
    """Add a bias to queries, keys and values, as Qwen2 does."""

    recompute: Literal["auto", "none", "attention_kept", "full"] = "auto"
    """What the backward pass recomputes: ``none``; ``attention_kept`` all but attention, whose output, log-sum-exp and
    selection are kept; ``full`` whole layers, of which only the inputs are kept (exchanges between ranks are repeated
    too). ``auto``: as little in each layer as memory allows; a model without a trainer recomputes nothing. Norms are
    always recomputed."""

    def __post_init__(self):
        for name in ("vocab_size", "n_layers", "hidden_size", "n_heads"):
            _require_positive_int(name, getattr(self, name))
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        _require_positive_int("n_kv_heads", self.n_kv_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}; "
                f"use one of {_divisors(self.n_heads)}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.n_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by n_heads={self.n_heads}; "
                    f"use {-(-self.hidden_size // self.n_heads) * self.n_heads} or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.n_heads)
        _require_positive_int("head_dim", self.head_dim)
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding turns pairs, so use an even number")
        if self.ffn_hidden_size is None:
            object.__setattr__(self, "ffn_hidden_size", -(-8 * self.hidden_size // (3 * 64)) * 64)
        _require_positive_int("ffn_hidden_size", self.ffn_hidden_size)
        for name in ("rope_base", "norm_eps", "init_std"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name}={value!r} is not a positive number")
        for name in ("tie_embeddings", "qk_norm", "qkv_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a bool; use true or false")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute={self.recompute!r} is not understood; use one of {', '.join(RECOMPUTE)}")

    @property
    def softmax_scale(self) -> float | None:
        """What attention scores are multiplied by; None for ``head_dim ** -0.5``."""
        assert self.head_dim, "set by __post_init__"
        factor = 1.0 if self.rope_scaling is None else self.rope_scaling.score_factor
        return None if factor == 1 else factor * self.head_dim**-0.5

    @property
    def layer_matrices(self) -> int:
        """Number of weights of a layer that multiply: those of its matrices, without norms and biases."""
        assert self.head_dim and self.n_kv_heads and self.ffn_hidden_size, "set by __post_init__"
        attention = 2 * self.hidden_size * self.head_dim * (self.n_heads + self.n_kv_heads)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    def n_parameters(self, embeddings: bool = False) -> int:
        """Number of parameters; without ``embeddings`` the token embedding and the output layer do not count."""
        assert self.head_dim and self.n_kv_heads, "set by __post_init__"
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        norms += self.head_dim * (self.n_heads + 2 * self.n_kv_heads) * self.qkv_bias
        total = self.n_layers * (self.layer_matrices + norms) + self.hidden_size
        if embeddings:
            total += self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return total

    def n_parameters_with(self, attention: AttentionConfig) -> int:
        """Like :meth:`n_parameters`, with embeddings and with what MoBA layers have of their own: index branches and
        convolutions over keys."""
        assert self.n_kv_heads and self.head_dim
        of_index = attention.index_parameters(self.n_layers, self.n_kv_heads, self.hidden_size)
        of_keys = attention.key_conv_parameters(self.n_layers, self.n_kv_heads, self.head_dim)
        return self.n_parameters(embeddings=True) + of_index + of_keys

    def flops_per_token(self, seq_len: int, attention: AttentionConfig) -> float:
        """FLOPs that training on one token takes, forward and backward, averaged over documents of ``seq_len``.

        Products of matrices only: 6 per weight that multiplies (the output layer included, the embedding's look-up
        not), and 12 per attended key and unit of head width. Routing and recomputation are not counted.
        """
        assert self.head_dim, "set by __post_init__"
        weights = self.n_layers * self.layer_matrices + self.vocab_size * self.hidden_size
        full = len(attention.full_layer_numbers(self.n_layers))
        keys = full * (seq_len + 1) / 2
        keys += (self.n_layers - full) * moba_keys_per_query(seq_len, attention.block_size, attention.top_k)
        return 6 * weights + 12 * self.n_heads * self.head_dim * keys


def moba_keys_per_query(seq_len: int, block_size: int, top_k: int) -> float:
    """Mean number of keys that a query of a document of ``seq_len`` tokens attends to."""
    full_blocks, tail = divmod(seq_len, block_size)
    own = full_blocks * block_size * (block_size + 1) // 2 + tail * (tail + 1) // 2
    # Queries of block j attend to min(j, k - 1) other blocks.
    growing = min(full_blocks, top_k)
    others = block_size * (growing * (growing - 1) // 2 + (full_blocks - growing) * (top_k - 1))
    others += tail * min(full_blocks, top_k - 1)
    return (own + others * block_size) / seq_len


def _require_positive_int(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
