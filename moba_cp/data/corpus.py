"""What a run trains on and validates on: text or tokens, one corpus or several.

Documents have ``lengths`` [n] int64 in tokens, ``read(document, start, stop)`` -> [stop - start] tokens, and
``read_mask`` -> [stop - start] uint8, or None where everything is learned.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from .config import CorpusConfig, DataConfig
from .indexed import MASK, IndexedDocuments, prefix_of
from .text import VOCABULARY, Document, open_corpus

# Bytes at the beginning and the end of a file of tokens that its fingerprint covers.
_SAMPLED = 2**20


class Documents(Protocol):
    """Documents that can be packed."""

    lengths: np.ndarray
    """[n] int64, tokens of each."""
    paths: tuple[Path, ...]
    """Files that hold them."""

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``[start, stop)`` of a document."""

    def read_mask(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """For each of these tokens, whether it is learned; None: all are."""


class TextDocuments:
    """Files whose bytes are the tokens."""

    def __init__(self, documents: tuple[Document, ...]):
        self.documents = documents
        self.lengths = np.array([document.length for document in documents], dtype=np.int64)
        self.paths = tuple(document.path for document in documents)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.documents[document].read(start, stop)

    def read_mask(self, document: int, start: int, stop: int) -> None:
        return None


class TokenDocuments:
    """Some of the documents of a PREFIX, or parts of them.

    Args:
        files: all of them.
        starts: [n] int64, the first token of each in the file.
        lengths: [n] int64.
        mask: whose tokens say, for each token of ``files``, whether it is learned.
    """

    def __init__(
        self, files: IndexedDocuments, starts: np.ndarray, lengths: np.ndarray, mask: IndexedDocuments | None = None
    ):
        self.files, self.starts, self.lengths, self.mask = files, starts, lengths, mask
        self.paths = (*files.paths, *(mask.paths if mask is not None else ()))

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        first = int(self.starts[document])
        return self.files.tokens[first + start : first + stop]

    def read_mask(self, document: int, start: int, stop: int) -> np.ndarray | None:
        first = int(self.starts[document])
        return None if self.mask is None else self.mask.tokens[first + start : first + stop]


@dataclass(frozen=True)
class Part:
    """One corpus."""

    source: str
    training: Documents
    validation: Documents
    fingerprint: str
    vocab_size: int | None
    """Of its tokens; None where the files do not say."""
    unit: str
    """``bytes`` or ``tokens``: what a token is."""
    bytes_per_token: float | None = None
    """Of its text; None where the files do not say."""
    remarks: tuple[str, ...] = ()
    """What should be said of it before the run."""

    @property
    def n_training(self) -> int:
        """Tokens to train on."""
        return int(self.training.lengths.sum())

    @property
    def n_validation(self) -> int:
        """Tokens for validation."""
        return int(self.validation.lengths.sum())

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer of ``moba-cp data build``; None for bytes and for other files."""
        return _tokenizer_of(self.training)


@dataclass(frozen=True)
class Corpora:
    """All that a run reads."""

    parts: tuple[Part, ...]
    weights: tuple[float, ...]
    """Share of the sequences of each part; they add up to 1."""
    validation: tuple[Part, ...]
    """Whose documents for validation are used."""

    @property
    def paths(self) -> list[Path]:
        """All files that are read, each once."""
        every = (
            path
            for part in (*self.parts, *self.validation)
            for some in (part.training, part.validation)
            for path in some.paths
        )
        return list(dict.fromkeys(every))

    @property
    def source(self) -> str:
        return ", ".join(part.source for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Changes with the data and with the weights."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        text = "\n".join(f"{part.fingerprint} {weight!r}" for part, weight in zip(self.parts, self.weights))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def unit(self) -> str:
        return self.parts[0].unit

    @property
    def n_training(self) -> int:
        """Tokens to train on."""
        return sum(part.n_training for part in self.parts)


def open_corpora(config: DataConfig, run_folder: Path | None = None) -> Corpora:
    """Open everything that ``config`` names.

    Args:
        config: what to read.
        run_folder: the folder of the run that is to read it. What it holds is never data.

    Raises:
        ValueError: something is not there, cannot be read, does not fit, or is less than one sequence.
    """
    named = config.corpora or (CorpusConfig(config.path, pattern=config.pattern) if config.path is not None else None,)
    held_out = config.validation_path is None
    share = config.validation_share if held_out else 0.0
    parts = tuple(_open(corpus, replace(config, validation_share=share), run_folder) for corpus in named)
    if held_out:
        validation = parts if config.validation_share else ()
    else:
        whole = replace(config, path=config.validation_path, corpora=(), pattern=None, validation_share=0.0)
        opened = _open(CorpusConfig(config.validation_path), whole, run_folder)
        validation = (replace(opened, validation=opened.training),)
    units = {part.unit for part in (*parts, *validation)}
    if len(units) > 1:
        which = ", ".join(f"{part.source} ({part.unit})" for part in (*parts, *validation))
        raise ValueError(f"data: bytes and tokens do not mix: {which}; tokenize all of them with one tokenizer")
    given = [corpus.weight for corpus in config.corpora]
    shares = given if given and given[0] is not None else [part.n_training for part in parts]
    return Corpora(parts, tuple(share / sum(shares) for share in shares), validation)


def open_prefix(files: IndexedDocuments) -> TokenDocuments:
    """All documents of a PREFIX."""
    return TokenDocuments(files, files.starts, files.lengths, _mask_of(files, None))


def _open(corpus: CorpusConfig | None, config: DataConfig, run_folder: Path | None) -> Part:
    prefix = prefix_of(corpus.path) if corpus is not None else None
    if prefix is not None:
        return _open_tokens(corpus, prefix, config)
    if corpus is not None and corpus.mask is not None:
        raise ValueError(
            f"mask={corpus.mask!r} of {corpus.path}, which is text; tokenize it first (moba-cp data build)"
        )
    text = replace(config, corpora=(), path=None, pattern=None)
    if corpus is not None:
        indices = sorted(Path(corpus.path).expanduser().glob("*.idx")) if corpus.pattern is None else []
        inside = next((path.with_suffix("") for path in indices if path.with_suffix(".bin").is_file()), None)
        if inside is not None:
            raise ValueError(f"data.path={corpus.path}: is a folder with tokens in it; name their PREFIX: {inside}")
        text = replace(text, path=corpus.path, pattern=corpus.pattern)
    found = open_corpus(text, run_folder)
    remarks = []
    if found.left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.left_out)
        total = sum(count for _, count in found.left_out)
        remarks.append(f"left out: {total} files that are no text ({kinds}); data.not_text decides")
    if found.json_lines:
        remarks.append(
            f"note: {found.json_lines} files hold JSON lines; their keys, quotes and escapes are trained on too, as "
            "bytes: moba-cp data build takes their texts out"
        )
    return Part(
        source=found.source,
        training=TextDocuments(found.training),
        validation=TextDocuments(found.validation),
        fingerprint=found.fingerprint,
        vocab_size=VOCABULARY,
        unit="bytes",
        bytes_per_token=1.0,
        remarks=tuple(remarks),
    )


def _open_tokens(corpus: CorpusConfig, prefix: Path, config: DataConfig) -> Part:
    if corpus.pattern is not None:
        raise ValueError(f"pattern={corpus.pattern!r} of {prefix}, which is one file of tokens; leave it out")
    files = IndexedDocuments(prefix)
    if not files.n_tokens:
        raise ValueError(f"{prefix}: holds no tokens; build it of more text")
    mask = _mask_of(files, corpus.mask)
    training, validation = _split(files, mask, config.validation_share)
    told = files.description.get("tokens", {})
    part = Part(
        source=str(prefix),
        training=training,
        validation=validation,
        fingerprint=_fingerprint(files, mask),
        vocab_size=told.get("vocab_size"),
        unit="bytes" if told.get("name") == "bytes" else "tokens",
        bytes_per_token=files.description.get("bytes_per_token"),
        remarks=() if mask is None else (f"loss mask: {mask.prefix}",),
    )
    for name, number in (("train on", part.n_training), ("validate on", part.n_validation)):
        if number < config.seq_len and (name == "train on" or config.validation_share):
            raise ValueError(
                f"{prefix}: {number} tokens to {name} are fewer than one sequence, data.seq_len={config.seq_len}; give "
                f"more text or a smaller seq_len{'' if name == 'train on' else ', or change data.validation_share'}"
            )
    return part


def _split(files: IndexedDocuments, mask, share: float) -> tuple[TokenDocuments, TokenDocuments]:
    """Documents to train on and to validate on: the hash of a document's number decides, so that documents that are
    added at the end move no others. Of a single document the tail is held out."""
    starts, lengths = files.starts, files.lengths
    if share and len(files) == 1:
        cut = files.n_tokens - max(1, round(files.n_tokens * share))
        first, last = np.array([cut]), np.array([files.n_tokens - cut])
        return TokenDocuments(files, starts, first, mask), TokenDocuments(files, starts + cut, last, mask)
    keys = _mixed(np.arange(len(files), dtype=np.uint64))
    bound = np.uint64(min(int(share * 2**64), 2**64 - 1))
    if share:
        # At least one document on either side, whatever the share.
        ordered = np.sort(keys)
        bound = min(max(bound, ordered[1]), ordered[-1])
    held_out = keys < bound if share else np.zeros(len(files), bool)
    return tuple(TokenDocuments(files, starts[side], lengths[side], mask) for side in (~held_out, held_out))


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64 of uint64 numbers: spread evenly, and the same in every version of NumPy."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mask_of(files: IndexedDocuments, prefix: str | None) -> IndexedDocuments | None:
    beside = files.prefix.with_name(files.prefix.name + MASK)
    if prefix is None and not beside.with_name(beside.name + ".idx").is_file():
        if files.description.get("mask"):
            raise ValueError(f"{beside}.idx: no such file, but {files.prefix} was built with a mask; build it again")
        return None
    mask = IndexedDocuments(beside if prefix is None else prefix_of(prefix) or Path(prefix))
    if mask.dtype != np.uint8 or not np.array_equal(mask.lengths, files.lengths):
        raise ValueError(f"{mask.prefix}: not a mask of {files.prefix}: it must hold one uint8 for each of its tokens")
    return mask


def _fingerprint(files: IndexedDocuments, mask: IndexedDocuments | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (files, mask) if mask is not None else (files,):
        digest.update(np.ascontiguousarray(part.lengths).data)
        sampled = max(1, _SAMPLED // part.dtype.itemsize)
        for tokens in (part.tokens[:sampled], part.tokens[-sampled:]):
            digest.update(np.ascontiguousarray(tokens).data)
    return digest.hexdigest()


def _tokenizer_of(documents: Documents) -> Path | None:
    if not isinstance(documents, TokenDocuments):
        return None
    prefix = documents.files.prefix
    folder = prefix.with_name(prefix.name + ".tokenizer")
    return folder if folder.is_dir() else None
