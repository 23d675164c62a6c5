"""Which layers attend with MoBA and which with full attention, and when.

Layers are counted from 1, as Megatron counts them, through the whole model whatever the pipeline stage.
"""

import re
from dataclasses import dataclass, replace

from ..config import MoBAConfig, Score, Sharing
from ..cp.layout import LAYOUTS, Layout
from ..index.config import IndexConfig
from .schedule import KINDS, Kind, Phase, check_schedule, phase_at

KEY_CONV_WEIGHT = ".key_conv.weight"
"""How the name of a convolution's parameter ends."""
KEY_CONV_WIDTHS = 0, 3, 5


@dataclass(frozen=True)
class AttentionConfig:
    """Attention of a whole model.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the rule.
    """

    default: Kind = "moba"
    """Kind of every layer that ``full_layers`` does not name: ``moba`` or ``full``."""

    full_layers: str | tuple[int, ...] = "none"
    """Layers with full attention: ``none``, ``last N``, or a list of layer numbers counted from 1."""

    schedule: tuple[Phase, ...] = ()
    """Hybrid by time: phases in place of ``default``, such as MoBA for 90 % of the steps and then full attention:
    ``[{until: 0.9, kind: moba}, {kind: full}]``. Empty for one kind throughout."""

    block_size: int = 512
    """Tokens per key/value block of MoBA layers; a multiple of 16."""

    top_k: int = 3
    """Blocks each query of a MoBA layer attends to, its current block included; 1 to 64."""

    deterministic: bool = False
    """Bit-identical results from run to run on a fixed number of ranks, at some cost in the backward pass."""

    index: IndexConfig | None = None
    """A trained scorer that chooses the blocks of each KV head's group in MoBA layers, in place of mean keys: null for
    none. It learns from what attention gives the blocks, and gives nothing but its choice. Begin with full attention:
    ``schedule: [{until: 0.2, kind: full}, {kind: moba}]`` lets it learn before it chooses."""

    layout: Layout = "zigzag"
    """How batches that come without a :class:`moba_cp.CPContext` are spread over the ranks: ``zigzag`` (Megatron's own)
    or ``contiguous``; ``zigzag_per_document`` where the batch carries ``cu_seqlens``."""

    shared_by_group: Sharing = "none"
    """Whether the query heads of a KV head attend to the same blocks: ``none``, each chooses for itself; ``sum`` or
    ``max``, they share those with the highest sum, or maximum, of their scores."""

    score: Score = "mean"
    """A block's score: ``mean``, by its mean key; ``max``, by the best of its keys, which is half the products of full
    attention's forward pass."""

    min_recent: int = 0
    """So many blocks before a query's own are always taken, within ``top_k``."""

    sink: bool = False
    """The document's first block is always taken, within ``top_k``."""

    key_conv: int = 0
    """Width of a causal convolution over each layer's keys, 3 or 5, within documents, after the rotary embedding and
    before blocks are chosen: each key gets a trained part of those just before it. Layers with full attention have it
    too. 0 for none."""

    def __post_init__(self):
        if self.default not in KINDS:
            raise ValueError(f"default={self.default!r} is not a kind of attention; use one of {', '.join(KINDS)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is not a layout; use one of {', '.join(LAYOUTS)}")
        if isinstance(self.full_layers, list):
            object.__setattr__(self, "full_layers", tuple(self.full_layers))
        _check_full_layers(self.full_layers)
        if isinstance(self.schedule, list):
            object.__setattr__(self, "schedule", tuple(self.schedule))
        check_schedule(self.schedule)
        if self.schedule and self.default != "moba":
            raise ValueError(f"default={self.default!r} beside a schedule, which says the kind; leave default out")
        _ = self.moba
        if isinstance(self.key_conv, bool) or self.key_conv not in KEY_CONV_WIDTHS:
            raise ValueError(f"key_conv={self.key_conv!r} is not 0, 3 or 5; 0 is for no convolution over keys")
        if self.index is not None and self.top_k == 1:
            raise ValueError("top_k=1 leaves an index branch no block to choose; use top_k=2 or more, or no index")
        for name in ("shared_by_group", "score"):
            if self.index is not None and name in self.moba.gate.changed():
                raise ValueError(
                    f"{name}={getattr(self, name)!r} beside an index, which scores blocks for a whole group by itself; "
                    f"leave {name} out"
                )

    def at(self, step: int, steps: int) -> "AttentionConfig":
        """The configuration of ``step`` out of ``steps``, counted from 1; without a schedule always this one.

        Raises:
            ValueError: a phase of the schedule has no step at all.
        """
        if not self.schedule:
            return self
        return replace(self, default=phase_at(self.schedule, step, steps).kind, schedule=())

    @property
    def moba(self) -> MoBAConfig:
        """The options of each MoBA layer."""
        return MoBAConfig(
            block_size=self.block_size,
            top_k=self.top_k,
            deterministic=self.deterministic,
            shared_by_group=self.shared_by_group,
            score=self.score,
            min_recent=self.min_recent,
            sink=self.sink,
        )

    def full_layer_numbers(self, n_layers: int) -> frozenset[int]:
        """The layers with full attention in a model of ``n_layers`` layers.

        Raises:
            ValueError: ``full_layers`` names a layer that the model does not have.
        """
        if self.default == "full":
            return frozenset(range(1, n_layers + 1))
        if self.full_layers == "none":
            return frozenset()
        if isinstance(self.full_layers, str):
            last = int(self.full_layers.split()[1])
            if last > n_layers:
                raise ValueError(
                    f"full_layers={self.full_layers!r} asks for {last} of {n_layers} layers; "
                    f"use 'last {n_layers}' or fewer"
                )
            return frozenset(range(n_layers - last + 1, n_layers + 1))
        if max(self.full_layers, default=1) > n_layers:
            raise ValueError(
                f"full_layers={list(self.full_layers)} names layer {max(self.full_layers)}, but the model has "
                f"{n_layers} layers; use numbers from 1 to {n_layers}"
            )
        return frozenset(self.full_layers)

    def has_index(self, layer_number: int, n_layers: int) -> bool:
        """Whether a layer, counted from 1, has an index branch: it is or can become a MoBA layer."""
        if self.index is None:
            return False
        return layer_number not in replace(self, default="moba", schedule=()).full_layer_numbers(n_layers)

    def key_conv_parameters(self, n_layers: int, n_kv: int, head_dim: int) -> int:
        """Number of parameters of all convolutions over keys."""
        return n_layers * self.key_conv * n_kv * head_dim // 2

    def index_parameters(self, n_layers: int, n_kv: int, hidden_size: int) -> int:
        """Number of parameters of all index branches."""
        if self.index is None:
            return 0
        n = sum(self.has_index(layer, n_layers) for layer in range(1, n_layers + 1))
        return n * self.index.width(n_kv) * hidden_size

    def kind(self, layer_number: int, n_layers: int) -> Kind:
        """``moba`` or ``full`` for a layer, counted from 1."""
        return "full" if layer_number in self.full_layer_numbers(n_layers) else "moba"


def _check_full_layers(value) -> None:
    if isinstance(value, str):
        if value == "none" or re.fullmatch(r"last [1-9]\d*", value):
            return
    elif isinstance(value, tuple):
        integers = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 1 for layer in value)
        if integers and len(set(value)) == len(value):
            return
    raise ValueError(
        f"full_layers={list(value) if isinstance(value, tuple) else value!r} is not understood; use 'none', 'last N' "
        "(such as 'last 3'), or a list of distinct layer numbers counted from 1 (such as [1, 4])"
    )
