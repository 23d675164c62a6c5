"""The training runs of each experiment. Experiments share runs: one with the same name is the same run.

Within a seed, runs of MoBA and full attention see the same documents in the same order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..model.attention import KEY_CONV_WIDTHS, AttentionConfig
from ..model.config import ModelConfig
from ..model.schedule import Phase
from ..train.config import TrainConfig
from .corpus import TRAINING, TUNING, TUNING_VALIDATION, VALIDATION
from .mass import block_sizes
from .scales import Scale, Size, corpus_prefix

# Ranges of positions that a document is divided into.
RANGES = 16
SWITCHED = 0.1
"""Share of the tokens that a run that switches trains with full attention, at its end."""
# MoBA with another convolution over keys than all other kinds have.
_CONVOLVED = {f"conv{width}": width for width in KEY_CONV_WIDTHS}
RESULTS = "tests.json"
"""In a run's folder: of the tests that it is put to when it is trained."""


@dataclass(frozen=True)
class Run:
    """A training run of its own in the folder that ``config`` names."""

    name: str
    config: TrainConfig
    length: int
    """Tokens of a document."""
    facts: dict
    """What a chart needs to know: ``size``, ``kind`` (``moba``, ``full`` and the like), ``seed``, and more."""
    parent: "Run | None" = None
    """The run whose weights it begins with."""
    tests: dict = field(default_factory=dict)
    """What it is put to when it is trained: ``retrieval`` from documents of these lengths, ``mass`` of the softmax in
    documents of this length."""
    finds_keys: bool = False
    """Its documents are made for retrieval, not of the text."""

    @property
    def n_parameters(self) -> int:
        """Without embeddings."""
        return self.config.model.n_parameters()

    @property
    def tokens(self) -> int:
        """Trained on, its parent's included."""
        data = self.config.data
        own = self.config.run.steps * data.seq_len * data.sequences_per_step
        return own + (0 if self.parent is None else self.parent.tokens)

    @property
    def lineage(self) -> "tuple[Run, ...]":
        """The runs that come before it, the first one first, and itself."""
        return (*(() if self.parent is None else self.parent.lineage), self)


@dataclass(frozen=True)
class Maker:
    """Makes runs of one scale into one folder.

    Args:
        base: the config that all of them have in common.
    """

    scale: Scale
    folder: Path
    base: TrainConfig

    def run(
        self, size: Size, length: int, kind: str, seed: int, block_size: int | None = None, top_k: int | None = None
    ) -> Run:
        """Training of ``kind`` ``moba``, ``full``, ``switch`` from one to the other, ``window``: as many blocks as
        MoBA, but the document's first and the last ones alone, or ``conv0``, ``conv3`` and ``conv5``: MoBA with keys
        convolved over so many tokens.

        Documents of the longer length may come after training on those of the shorter one, see :class:`.scales.Scale`:
        that begins with MoBA's model of the same blocks, if they are the scale's own or those of the switch, or with
        full attention's for all other blocks. That of the shorter one may begin with what all kinds share.
        """
        scale = self.scale
        block_size, top_k = block_size or scale.block_size, top_k or scale.top_k
        own_blocks = block_size in (scale.block_size, scale.switch_block_size) and top_k == scale.top_k
        parent, share, lr, name = None, 1.0, size.lr, f"{length}-{size.name}-{size.tokens / 1e6:.3g}M"
        if length == scale.long and scale.extension is not None:
            share, lr = scale.extension, size.lr / 2
            own = kind if kind in ("window", *_CONVOLVED) else "moba"
            before = own if own_blocks and kind != "full" else "full"
            parent = self.run(size, scale.length, before, seed, block_size if before != "full" else None)
            name += f"+{share * size.tokens / 1e6:.3g}M"
        elif length == scale.length and scale.shared_length is not None:
            share, lr = 1 - scale.shared_share, size.lr / 2
            parent = self._shared(size, scale.shared_length, kind, seed)
        switched = SWITCHED if parent is None else SWITCHED * (1 + share) / share
        config = replace(
            self._config(size, length, seed, size.steps_at(length, share), lr, (TRAINING, VALIDATION)),
            attention=self._attention(kind, block_size, top_k, round(1 - switched, 3)),
        )
        blocks = "" if kind == "full" else f"-b{block_size}k{top_k}"
        facts = {"size": size.name, "kind": kind, "seed": seed, "block_size": block_size, "top_k": top_k}
        made = self._named(f"{name}-{kind}{blocks}-s{seed}", config, length, facts, parent)
        weighed = kind == "full" and size == scale.granularity_size and length == scale.long
        return replace(made, tests={"mass": length} if weighed else {})

    def _shared(self, size: Size, length: int, kind: str, seed: int) -> Run:
        """Training on documents of at most ``top_k`` blocks, the same for all kinds whose keys are convolved alike."""
        share = self.scale.shared_share
        config = self._config(size, length, seed, size.steps_at(length, share), size.lr, (TRAINING, VALIDATION))
        attention = self._attention("full", 0, 0)
        if kind in _CONVOLVED:
            attention = replace(attention, key_conv=_CONVOLVED[kind])
        config = replace(config, attention=attention)
        facts = {"size": size.name, "kind": "shared", "seed": seed}
        name = f"{length}-{size.name}-{share * size.tokens / 1e6:.3g}M" + (f"-{kind}" if kind in _CONVOLVED else "")
        return self._named(f"{name}-s{seed}", config, length, facts)

    def tuned(self, parent: Run, size: Size, full_layers: int) -> Run:
        """``parent`` fine-tuned with so many last layers full, on data of which only a part has labels."""
        steps = max(2, round(size.steps_at(parent.length) * self.scale.tuning_share))
        seed = parent.facts["seed"]
        config = self._config(size, parent.length, seed, steps, size.lr / 4, (TUNING, TUNING_VALIDATION))
        last = f"last {full_layers}" if full_layers else "none"
        attention = replace(parent.config.attention, full_layers=last)
        config = replace(config, attention=attention)
        facts = parent.facts | {"full_layers": full_layers, "tuned": True}
        return self._named(f"{parent.name}-tuned{full_layers}", config, parent.length, facts, parent)

    def retrieving(self, kind: str, seed: int) -> Run:
        """Training to find keys again, after what all kinds share where the scale says so: ``kind`` as in :meth:`run`,
        or ``hybrid`` whose last layer is full."""
        scale, first = self.scale, None
        if scale.retrieval_first:
            alike = kind if kind in _CONVOLVED else "full"
            first = self._retrieving(alike, seed, scale.retrieval_first, scale.retrieval_share, None)
        lengths = scale.retrieval_lengths
        run = self._retrieving(kind, seed, lengths, 1.0 if first is None else 1 - scale.retrieval_share, first)
        # One length more than it is trained on.
        return replace(run, tests={"retrieval": (*lengths, 2 * lengths[-1])})

    def _retrieving(self, kind: str, seed: int, lengths: tuple[int, ...], share: float, parent: Run | None) -> Run:
        scale, size = self.scale, self.scale.retrieval_size
        block_size, top_k = scale.retrieval_block_size, scale.retrieval_top_k
        attention = self._attention("moba" if kind == "hybrid" else kind, block_size, top_k)
        if kind == "hybrid":
            attention = replace(attention, full_layers="last 1")
        steps = size.steps_at(1, share)
        config = self._config(size, lengths[-1], seed, steps, size.lr, (TRAINING, VALIDATION))
        paths = [str(retrieval_folder(self.folder, lengths) / split) for split in (TRAINING, VALIDATION)]
        data = replace(config.data, path=paths[0], validation_path=paths[1], packing="best_fit")
        # Keys are bytes, so that a prompt can be typed.
        model = replace(config.model, vocab_size=ModelConfig.vocab_size)
        config = replace(config, model=model, attention=attention, data=data)
        facts = {"size": size.name, "kind": kind, "seed": seed}
        name = f"retrieval-{size.name}-{size.tokens / 1e6:.3g}M-{kind}-s{seed}"
        if self.scale.retrieval_lengths != lengths:
            facts["kind"] = "shared"
            of_kind = f"-{kind}" if kind in _CONVOLVED else ""
            name = f"retrieval{lengths[-1]}-{size.name}-{share * size.tokens / 1e6:.3g}M{of_kind}-s{seed}"
        made = self._named(name, config, lengths[-1], facts, parent)
        return replace(made, finds_keys=True)

    def _attention(self, kind: str, block_size: int, top_k: int, switch_at: float = 0.0) -> AttentionConfig:
        base = self.base.attention
        if kind == "full":
            return replace(base, default="full", full_layers="none", schedule=())
        schedule = (Phase("moba", switch_at), Phase("full")) if kind == "switch" else ()
        special = {"sink": True, "min_recent": top_k - 2} if kind == "window" else {}
        if kind in _CONVOLVED:
            special = {"key_conv": _CONVOLVED[kind]}
        return replace(base, default="moba", block_size=block_size, top_k=top_k, schedule=schedule, **special)

    def _config(
        self, size: Size, length: int, seed: int, steps: int, lr: float, splits: tuple[str, str]
    ) -> TrainConfig:
        base, own = self.base, self.scale.own_data
        model = replace(
            base.model, n_layers=size.n_layers, n_heads=size.n_heads, n_kv_heads=size.n_heads,
            hidden_size=size.hidden_size, head_dim=None, ffn_hidden_size=None,
        )  # fmt: skip
        packed = length if own else min(max(base.data.seq_len, length), max(size.tokens_per_step, length))
        data = replace(base.data, seq_len=packed, sequences_per_step=max(1, size.tokens_per_step // packed))
        if not own:
            paths = [corpus_prefix(self.folder, length, split) for split in splits]
            data = replace(data, path=paths[0], validation_path=paths[1])
        optimizer = replace(base.optimizer, lr=lr, warmup_steps=max(1, steps // 10))
        run = replace(
            base.run, steps=steps, seed=seed, validate_every=steps, position_range=length // RANGES,
            checkpoint_every=max(1, steps // 4), keep_checkpoints=1,
        )  # fmt: skip
        return replace(base, model=model, data=data, optimizer=optimizer, run=run)

    def _named(self, name: str, config: TrainConfig, length: int, facts: dict, parent: Run | None = None) -> Run:
        start = None if parent is None else parent.config.run.directory
        run = replace(config.run, directory=str(self.folder / "runs" / name), start_from=start)
        return Run(name, replace(config, run=run), length, facts, parent)


def scaling_law(make: Maker) -> Iterator[Run]:
    """Five sizes of MoBA and of full attention, at the shorter length; the largest, which take longest, first."""
    for seed in range(make.scale.seeds):
        for size in reversed(make.scale.sizes):
            yield from (make.run(size, make.scale.length, kind, seed) for kind in ("full", "moba"))


def position_loss(make: Maker) -> Iterator[Run]:
    """Some of them at the longer length."""
    for seed in range(make.scale.seeds):
        for size in reversed(make.scale.long_sizes):
            yield from (make.run(size, make.scale.long, kind, seed) for kind in ("full", "moba"))


def granularity(make: Maker) -> Iterator[Run]:
    """Equal sparsity by few large blocks up to many small ones, and full attention."""
    scale = make.scale
    for seed in range(scale.seeds):
        yield make.run(scale.granularity_size, scale.long, "full", seed)
        for top_k, blocks in scale.granularity:
            yield make.run(scale.granularity_size, scale.long, "moba", seed, scale.long // blocks, top_k)


def block_size(make: Maker) -> Iterator[Run]:
    """Equally many keys for each query, by few large blocks up to many small ones, and full attention."""
    scale = make.scale
    for seed in range(scale.seeds):
        yield make.run(scale.granularity_size, scale.long, "full", seed)
        for size in reversed(block_sizes(scale.long)[::2]):
            yield make.run(scale.granularity_size, scale.long, "moba", seed, size, scale.long // 8 // size)


def training_hybrid(make: Maker) -> Iterator[Run]:
    """MoBA, full attention, and MoBA for 90 % of the tokens followed by full attention."""
    scale = make.scale
    for seed in range(scale.seeds):
        for kind in ("full", "moba", "switch"):
            yield make.run(scale.switch_size, scale.long, kind, seed, scale.switch_block_size)


def layerwise_hybrid(make: Maker) -> Iterator[Run]:
    """A model pretrained with MoBA, fine-tuned with some last layers full, none, and all."""
    scale = make.scale
    for seed in range(scale.seeds):
        parent = make.run(scale.deep_size, scale.long, "moba", seed)
        for last in (*scale.last_layers, 0, scale.deep_size.n_layers):
            yield make.tuned(parent, scale.deep_size, last)


def retrieval(make: Maker) -> Iterator[Run]:
    """Finding keys again with MoBA, full attention, and MoBA with a full last layer."""
    for seed in range(make.scale.seeds):
        yield from (make.retrieving(kind, seed) for kind in ("full", "moba", "hybrid"))


def sliding_window(make: Maker) -> Iterator[Run]:
    """MoBA, and a window of as many blocks with a sink."""
    yield from _on_both_tasks(make, ("full", "moba", "window"))


def key_conv(make: Maker) -> Iterator[Run]:
    """MoBA with convolutions over keys of all widths, one of which all kinds have."""
    others = (kind for kind, width in _CONVOLVED.items() if width != make.base.attention.key_conv)
    yield from _on_both_tasks(make, ("full", "moba", *others))


def _on_both_tasks(make: Maker, kinds: tuple[str, ...]) -> Iterator[Run]:
    """On text, at the shorter length by a model of middle size, and where keys are to be found again."""
    size = make.scale.sizes[len(make.scale.sizes) // 2]
    for seed in range(make.scale.seeds):
        yield from (make.run(size, make.scale.length, kind, seed) for kind in kinds)
        yield from (make.retrieving(kind, seed) for kind in kinds)


def retrieval_folder(folder: Path, lengths: tuple[int, ...]) -> Path:
    """Where the documents of these lengths to retrieve from are."""
    return folder / "corpus" / "retrieval" / "-".join(map(str, lengths))


GRIDS = {
    "retrieval": retrieval,
    "scaling-law": scaling_law,
    "position-loss": position_loss,
    "granularity": granularity,
    "layerwise-hybrid": layerwise_hybrid,
    "training-hybrid": training_hybrid,
    "sliding-window": sliding_window,
    "key-conv": key_conv,
    "block-size": block_size,
}
"""The experiments, in the order in which they are begun."""
