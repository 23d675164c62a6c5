"""The section ``data`` of a training config."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CorpusConfig:
    """One of several corpora that are mixed."""

    path: str
    """As data.path."""

    weight: float | None = None
    """Share of the sequences that come from here, beside the weights of the others; null: by its tokens, which all
    corpora must then leave to that."""

    pattern: str | None = None
    """As data.pattern."""

    mask: str | None = None
    """Prefix of a loss mask: PREFIX.bin and .idx with one uint8 for each token, 1 where it is learned. null: that of
    ``moba-cp data build`` beside the tokens, where there is one."""

    def __post_init__(self):
        if not self.path.strip():
            raise ValueError("path='' is empty; name a folder, a file or a PREFIX")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight={self.weight} is not above 0; leave the corpus out instead")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and how it is cut into sequences."""

    path: str | None = None
    """A folder of text (with its subfolders) or a file, whose bytes are the tokens; or PREFIX of PREFIX.bin and
    PREFIX.idx, tokens as ``moba-cp data build`` and Megatron-LM make them. null: the standard library of the running
    Python."""

    pattern: str | None = None
    """Which files of a folder, as a shell pattern for the name; null for all (of the standard library: ``*.py``).
    Names that start with a dot, and the folders of training runs, are left out."""

    corpora: tuple[CorpusConfig, ...] = ()
    """Several corpora in place of ``path``, mixed by weight: ``[{path: A, weight: 0.7}, {path: B, weight: 0.3}]``."""

    validation_path: str | None = None
    """Validate on this, as ``path``; null: hold out ``validation_share`` of what is trained on."""

    not_text: Literal["skip", "refuse", "take"] = "skip"
    """Files that are no text (compressed, images, UTF-16, others with zero bytes) or cannot be read (links without a
    target, pipes, no permission). skip: leave them out and say how many; refuse: end with an error; take: train on
    their bytes, and leave out only what cannot be read."""

    seq_len: int = 4096
    """Tokens per sequence, over all ranks that share it."""

    sequences_per_step: int = 1
    """Sequences per optimizer step, over all data ranks; divided among them and accumulated on each."""

    gradient_accumulation: int | None = None
    """Sequences that each data rank goes through before the optimizer's step, one after another; in place of
    ``sequences_per_step``, which is then this times the data ranks. null: go by ``sequences_per_step``."""

    packing: Literal["stream", "best_fit"] = "stream"
    """How documents are put into sequences. stream: one behind another, cut where a sequence ends, so that nothing is
    wasted. best_fit: whole, each where it leaves the least room, and the rest of a sequence padded; only documents
    longer than a sequence are cut."""

    overlap: int = 0
    """Tokens that a piece of a document longer than a sequence repeats of the piece before, to be seen and not learned
    again; for best_fit."""

    attend_across: bool = False
    """Attend across the documents of a sequence, and count positions through it; else each document sees itself
    alone."""

    pad_to_multiple: bool = False
    """Pad each sequence at its end to the length that the layout needs, where seq_len does not fit by itself."""

    validation_share: float = 0.02
    """Share of the files, or of the tokenized documents, that is held out for validation (0 to 0.5); 0 for no
    validation."""

    validation_sequences: int = 8
    """Sequences of held-out text in one validation; more files than they hold are sampled."""

    def __post_init__(self):
        for name in ("path", "pattern", "validation_path"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='' is empty; give one, or null for the default")
        for name, least in (("seq_len", 2), ("sequences_per_step", 1), ("validation_sequences", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}; use {least} or more")
        if not 0 <= self.validation_share <= 0.5:
            raise ValueError(f"validation_share={self.validation_share} is not between 0 and 0.5; 0.02 is usual")
        if self.gradient_accumulation is not None and self.gradient_accumulation < 1:
            raise ValueError(f"gradient_accumulation={self.gradient_accumulation} is below 1; use 1 or more")
        if self.corpora and (self.path is not None or self.pattern is not None):
            name = "path" if self.path is not None else "pattern"
            raise ValueError(f"{name}={getattr(self, name)!r} beside corpora; name everything in corpora")
        if len({corpus.weight is None for corpus in self.corpora}) > 1:
            raise ValueError("corpora: some have a weight and some have none; give all of them one, or none")
        if self.overlap and self.packing != "best_fit":
            raise ValueError(
                f"overlap={self.overlap} with packing={self.packing!r}; use packing: best_fit, or overlap: 0"
            )
        if not 0 <= self.overlap < self.seq_len:
            raise ValueError(f"overlap={self.overlap} is not between 0 and seq_len={self.seq_len}")
