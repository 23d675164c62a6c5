"""How large the experiments are: ``tiny`` for tests, ``small`` for a GPU or a few, ``paper`` as published."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..model.config import ModelConfig
from ..train.config import TrainConfig
from ..train.yaml_config import load


@dataclass(frozen=True)
class Size:
    """A model and how it is trained, at either length."""

    n_layers: int
    n_heads: int
    hidden_size: int
    tokens: int
    """To train on."""
    tokens_per_step: int
    lr: float

    @property
    def name(self) -> str:
        """Layers x width."""
        return f"{self.n_layers}x{self.hidden_size}"

    @property
    def n_parameters(self) -> int:
        """Without embeddings."""
        return ModelConfig(n_layers=self.n_layers, n_heads=self.n_heads, hidden_size=self.hidden_size).n_parameters()

    @property
    def steps(self) -> int:
        """At the shorter length; a step has at least one document."""
        return self.steps_at(1)

    def steps_at(self, length: int, share: float = 1.0) -> int:
        """Steps with documents of ``length`` tokens, for a share of all tokens."""
        return max(1, round(share * self.tokens / max(self.tokens_per_step, length)))


@dataclass(frozen=True)
class Scale:
    """The sizes of all experiments. Lengths are in tokens."""

    name: str
    sizes: tuple[Size, ...]
    """Of the scaling laws, the smallest first."""
    length: int
    """Of a document for the scaling law."""
    long: int
    """Of a document for everything else of text."""
    long_sizes: tuple[Size, ...]
    """Of the scaling laws by position."""
    block_size: int
    top_k: int
    granularity_size: Size
    granularity: tuple[tuple[int, int], ...]
    """(blocks attended to, blocks in all) of a document of ``long``."""
    switch_size: Size
    switch_block_size: int
    deep_size: Size
    """For the layer-wise hybrid."""
    last_layers: tuple[int, ...]
    """How many last layers attend fully."""
    tuning_share: float
    """Tokens of fine-tuning, as a share of those of training."""
    seeds: int
    retrieval_size: Size
    retrieval_lengths: tuple[int, ...]
    """Of documents to train on and to be tested with, each twice the one before."""
    retrieval_block_size: int
    retrieval_top_k: int
    own_data: bool
    """The documents are the user's, packed by the trainer; else they are made of installed sources, whole."""
    held_out: int = 0
    """Documents of ``long`` of a validation."""
    text_bytes: int | None = None
    """Of sources to take; None for all."""
    extension: float | None = None
    """Runs at ``long`` begin with the weights of those at ``length`` and train on so many more tokens, as a share of
    theirs; None: they train at ``long`` from the beginning."""
    vocabulary: int | None = None
    """Tokens of the vocabulary that is made of the text; None: bytes."""
    shared_length: int | None = None
    """MoBA and full attention of one size and seed begin with the weights of one run on documents of so many tokens, at
    most ``top_k`` blocks, which both attend to whole; None: each begins anew."""
    shared_share: float = 0.0
    """Share of a size's tokens that this run trains on."""
    retrieval_first: tuple[int, ...] = ()
    """Lengths of documents, of at most ``retrieval_top_k`` blocks, in which one run for MoBA and full attention learns
    to find keys, before each goes on with ``retrieval_lengths``; none: each begins anew."""
    retrieval_share: float = 0.5
    """Share of the tokens of ``retrieval_size`` that this run trains on."""

    @cached_property
    def base(self) -> TrainConfig:
        """What all runs have in common."""
        return load(TrainConfig, f"experiments/{self.name}")


def _small_size(n: int, hidden: int, tokens_per_step: int, steps: int) -> Size:
    """``n`` layers of width ``hidden`` with heads of 64; the learning rate falls with the width."""
    return Size(n, hidden // 64, hidden, steps * tokens_per_step, tokens_per_step, round(0.4 / hidden, 6))


def _small() -> Scale:
    k = 1024
    # What a step of these costs is the host's time, more than the tokens': the number of steps is what is short.
    sizes = (
        _small_size(2, 128, 16 * k, 1200), _small_size(3, 128, 16 * k, 1300), _small_size(3, 192, 32 * k, 1200),
        _small_size(4, 256, 32 * k, 1500), _small_size(6, 320, 64 * k, 1000),
    )  # fmt: skip
    return Scale(
        name="small",
        sizes=sizes,
        length=8 * k,
        long=32 * k,
        long_sizes=(sizes[0], *sizes[3:]),
        block_size=512,
        top_k=3,
        granularity_size=sizes[3],
        granularity=((2, 8), (4, 16), (8, 32), (16, 64), (32, 128)),
        switch_size=sizes[3],
        # As many of the keys as in the paper.
        switch_block_size=2048,
        # The deepest of those that are there.
        deep_size=sizes[4],
        last_layers=(1, 2, 3),
        tuning_share=0.1,
        seeds=3,
        retrieval_size=replace(_small_size(3, 192, 16 * k, 2000), lr=3e-3),
        retrieval_lengths=(512, 1 * k, 2 * k, 4 * k),
        retrieval_block_size=16,
        retrieval_top_k=32,
        own_data=False,
        held_out=48,
        extension=0.2,
        vocabulary=4096,
        # Two blocks: MoBA and full attention are one function.
        shared_length=1 * k,
        shared_share=0.6,
        retrieval_first=(64, 128, 256),
        retrieval_share=0.4,
    )


def _tiny() -> Scale:
    def size(n_layers: int, hidden: int, steps: int) -> Size:
        return Size(n_layers, hidden // 16, hidden, 512 * steps, 512, 3e-3)

    sizes = (size(1, 16, 4), size(1, 32, 6), size(2, 32, 8))
    return Scale(
        name="tiny",
        sizes=sizes,
        length=256,
        long=512,
        long_sizes=sizes[::2],
        block_size=32,
        top_k=3,
        granularity_size=sizes[1],
        granularity=((2, 4), (4, 8), (8, 16)),
        switch_size=sizes[1],
        switch_block_size=32,
        deep_size=size(4, 16, 5),
        last_layers=(1, 3),
        tuning_share=0.4,
        seeds=1,
        retrieval_size=size(2, 32, 8),
        retrieval_lengths=(256, 512),
        retrieval_block_size=32,
        retrieval_top_k=3,
        own_data=False,
        held_out=4,
        text_bytes=1_500_000,
        extension=0.5,
    )


def _paper() -> Scale:
    # Layers = heads, of 128; tokens as published. The paper says neither batch size nor learning rate.
    sizes = tuple(
        Size(n, n, 128 * n, round(billions * 1e9), 2**22, lr)
        for n, billions, lr in (
            (14, 10.8, 3e-4),
            (16, 15.3, 3e-4),
            (18, 20.6, 2.5e-4),
            (20, 27.4, 2e-4),
            (22, 36.9, 2e-4),
        )
    )
    return Scale(
        name="paper",
        sizes=sizes,
        length=8192,
        long=32768,
        long_sizes=sizes,
        block_size=512,
        top_k=3,
        granularity_size=sizes[3],
        granularity=((2, 8), (4, 16), (8, 32), (16, 64), (32, 128)),
        switch_size=Size(20, 20, 2560, 30_000_000_000, 2**22, 2e-4),
        switch_block_size=2048,
        deep_size=sizes[3],
        last_layers=(1, 3, 5, 10),
        tuning_share=0.1,
        seeds=1,
        retrieval_size=sizes[0],
        retrieval_lengths=(4096, 8192, 16384, 32768),
        retrieval_block_size=512,
        retrieval_top_k=3,
        own_data=True,
    )


_SCALES: dict[str, Callable[[], Scale]] = {"tiny": _tiny, "small": _small, "paper": _paper}
SCALES = tuple(_SCALES)


def scale_called(name: str) -> Scale:
    """The scale of that name, one of :data:`SCALES`."""
    return _SCALES[name]()


def corpus_prefix(folder: Path, length: int, split: str) -> str:
    """Where the documents of ``length`` of a split are."""
    return str(folder / "corpus" / str(length) / split)
