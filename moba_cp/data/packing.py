"""Documents packed into sequences of one length, and which sequence belongs to which step.

Legend: T tokens of a sequence. A sequence is a function of (seed, index) alone, whatever the number of ranks, so a
run's position in the data is its step, and there is no state to save. It is a list of pieces of documents; their tokens
are read when asked for, and only those of the asked segments: no rank needs to hold a whole sequence.

``stream``: an epoch concatenates all documents in a shuffled order, cuts that stream into sequences of T tokens and
shuffles these. A document that crosses a cut continues in another sequence, as a document of its own: attention and
positions start again there.

``best_fit``: documents longer than T are cut into pieces of T. All pieces, the longest first, are put each into the
fullest sequence that has room for it, once for all epochs; an epoch shuffles the sequences. What stays empty is padded.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cp.layout import Segments, ragged_arange
from ..model.loss import IGNORED_LABEL
from .corpus import Documents

# The sequences of several corpora are mixed in periods, within which each has its exact share.
_PERIOD = 4096
_MOST_SEQUENCES = 2**29


class Piece(NamedTuple):
    """Tokens ``[start, start + length)`` of a document, the first ``seen`` of which another piece learns."""

    document: int
    start: int
    length: int
    seen: int = 0


@dataclass(frozen=True)
class PackedSequence:
    """T tokens of whole and cut documents, with padding or without."""

    documents: Documents
    pieces: tuple[Piece, ...]
    begins: np.ndarray
    """[pieces] int64, where each begins in the sequence."""
    cu_seqlens: Tensor
    """[n_docs + 1] int32: what sees itself alone. A piece each, unless attention goes across documents."""

    def __len__(self) -> int:
        return int(self.cu_seqlens[-1])

    def read(self, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and labels, [L] int64 each, of the ``segments``, by default of all.

        A label is the next token of the same document; IGNORED_LABEL for a document's last token, for padding, for what
        a mask leaves out, and for what another piece learns.
        """
        segments = [(0, len(self))] if segments is None else segments
        tokens = np.zeros(sum(length for _, length in segments), np.int64)
        labels = np.full_like(tokens, IGNORED_LABEL)
        at = 0
        for start, length in segments:
            first = max(int(np.searchsorted(self.begins, start, side="right")) - 1, 0)
            for i in range(first, len(self.pieces)):
                if self.begins[i] >= start + length:
                    break
                self._fill(i, start, tokens[at : at + length], labels[at : at + length])
            at += length
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    @property
    def tokens(self) -> Tensor:
        """[T] int64."""
        return self.read()[0]

    @property
    def labels(self) -> Tensor:
        """[T] int64."""
        return self.read()[1]

    def _fill(self, i: int, start: int, tokens: np.ndarray, labels: np.ndarray) -> None:
        """Put what piece ``i`` has in the segment from ``start`` into the segment's ``tokens`` and ``labels``."""
        piece, begin = self.pieces[i], int(self.begins[i])
        low, high = max(start, begin), min(start + len(tokens), begin + piece.length)
        if low >= high:
            return
        # In the document. One token more, if the document goes on: it is the label of the last.
        first, last = piece.start + low - begin, piece.start + high - begin
        stop = min(last + 1, int(self.documents.lengths[piece.document]))
        data = self.documents.read(piece.document, first, stop)
        here = slice(low - start, high - start)
        tokens[here] = data[: high - low]
        following = data[1:].astype(np.int64)
        mask = self.documents.read_mask(piece.document, first + 1, stop)
        if mask is not None:
            following[mask == 0] = IGNORED_LABEL
        following[: max(piece.start + piece.seen - first, 0)] = IGNORED_LABEL
        labels[low - start : low - start + len(following)] = following


class Packer:
    """Sequence ``index`` of an endless, shuffled stream over ``documents``.

    Args:
        documents: at least ``seq_len`` tokens in all.
        seq_len: T.
        seed: another seed is another order.
        packing: ``stream`` or ``best_fit``.
        overlap: tokens that a piece of a document longer than T repeats of the one before; for ``best_fit``.
        attend_across: attention goes across the documents of a sequence.
    """

    def __init__(
        self,
        documents: Documents,
        seq_len: int,
        seed: int,
        packing: str = "stream",
        overlap: int = 0,
        attend_across: bool = False,
    ):
        self.documents, self.seq_len, self.seed, self.attend_across = documents, seq_len, seed, attend_across
        self.lengths = documents.lengths
        total = int(self.lengths.sum())
        if total < seq_len:
            raise ValueError(f"{total} tokens are fewer than one sequence, seq_len={seq_len}")
        self._bins = _best_fit(self.lengths, seq_len, overlap, seed) if packing == "best_fit" else None
        self.per_epoch = total // seq_len if self._bins is None else len(self._bins.ends)
        """Sequences of an epoch."""
        if self.per_epoch > _MOST_SEQUENCES:
            # An epoch's order is an array of all its sequences.
            raise ValueError(
                f"data.seq_len={seq_len} cuts {total} tokens into {self.per_epoch} sequences an epoch, more than "
                f"{_MOST_SEQUENCES}; raise seq_len or give less text"
            )
        self.waste = 0.0 if self._bins is None else 1 - self._bins.lengths.sum() / (self.per_epoch * seq_len)
        """Share of the tokens of an epoch that is padding."""
        self.n_cut = int((self.lengths > seq_len).sum())
        """Documents longer than a sequence."""
        self._epoch = None

    def sequence(self, index: int) -> PackedSequence:
        """Sequence ``index`` (0, 1, ...; after an epoch's last comes the next epoch's first)."""
        epoch, place = divmod(index, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            places = _shuffled(self.per_epoch, self.seed, epoch, 1)
            if self._bins is None:
                order = _shuffled(len(self.lengths), self.seed, epoch, 0)
                self._epoch = epoch, places, order, np.cumsum(self.lengths[order])
            else:
                self._epoch = epoch, places, None, None
        _, places, order, ends = self._epoch
        number = int(places[place])
        pieces = self._bins.pieces(number) if self._bins is not None else self._cut(order, ends, number * self.seq_len)
        begins = np.cumsum([0, *(piece.length for piece in pieces)])
        bounds = [0, self.seq_len] if self.attend_across else [*begins[:-1].tolist(), self.seq_len]
        return PackedSequence(self.documents, pieces, begins[:-1], torch.tensor(bounds, dtype=torch.int32))

    def _cut(self, order: np.ndarray, ends: np.ndarray, start: int) -> tuple[Piece, ...]:
        """Tokens ``[start, start + T)`` of the stream of documents that ``order`` and ``ends`` describe."""
        pieces, at = [], start
        i = int(np.searchsorted(ends, start, side="right"))
        while at < start + self.seq_len:
            document = int(order[i])
            end = min(start + self.seq_len, int(ends[i]))
            if end > at:
                pieces.append(Piece(document, at - int(ends[i] - self.lengths[document]), end - at))
            at, i = end, i + 1
        return tuple(pieces)


class Mixer:
    """Sequences of several corpora by weight, each corpus in its own order.

    Args:
        packers: of each corpus.
        weights: their shares; they add up to 1.
        seed: another seed is another order.
    """

    def __init__(self, packers: list[Packer], weights: tuple[float, ...], seed: int):
        self.packers, self.seed = packers, seed
        self._counts = _shares(weights, _PERIOD)
        self.per_epoch = sum(packer.per_epoch for packer in packers)
        """Sequences that all corpora have."""
        self._period = None

    def sequence(self, index: int) -> PackedSequence:
        """Sequence ``index`` (0, 1, ...)."""
        corpus, number = self.place(index)
        return self.packers[corpus].sequence(number)

    def place(self, index: int) -> tuple[int, int]:
        """Which corpus sequence ``index`` is of, and its index there."""
        if len(self.packers) == 1:
            return 0, index
        period, at = divmod(index, _PERIOD)
        if self._period is None or self._period[0] != period:
            # Each corpus comes evenly, at a random moment of each of its turns.
            corpora = np.repeat(np.arange(len(self._counts)), self._counts)
            turns = ragged_arange(np.zeros(len(self._counts), np.int64), self._counts)
            moments = (turns + _uniform(_PERIOD, self.seed, period, 2)) / self._counts[corpora]
            order = np.argsort(moments, kind="stable")
            self._period = period, corpora[order], turns[order]
        _, corpora, turns = self._period
        corpus = int(corpora[at])
        return corpus, period * int(self._counts[corpus]) + int(turns[at])


class _Bins:
    """Pieces, ordered by the sequence that they are in."""

    def __init__(
        self, document: np.ndarray, start: np.ndarray, lengths: np.ndarray, seen: np.ndarray, bins: np.ndarray
    ):
        order = np.argsort(bins, kind="stable")
        self._columns = document[order], start[order], lengths[order], seen[order]
        self.lengths = self._columns[2]
        self.ends = np.cumsum(np.bincount(bins))

    def pieces(self, number: int) -> tuple[Piece, ...]:
        begin = int(self.ends[number - 1]) if number else 0
        rows = (column[begin : int(self.ends[number])].tolist() for column in self._columns)
        return tuple(Piece(*row) for row in zip(*rows, strict=True))


def _best_fit(lengths: np.ndarray, seq_len: int, overlap: int, seed: int) -> _Bins:
    # A long document has pieces at 0, T - overlap, 2 (T - overlap), ..., the last of which ends with it.
    stride = seq_len - overlap
    counts = np.where(lengths > seq_len, -(-(lengths - overlap) // stride), np.minimum(lengths, 1))
    document = np.repeat(np.arange(len(lengths)), counts)
    number = ragged_arange(np.zeros(len(lengths), np.int64), counts)
    start = number * stride
    held = np.minimum(lengths[document] - start, seq_len)
    # A piece's label of its first token beyond what the one before it learned: that ended with the token behind it.
    seen = np.where(number > 0, overlap, 0)
    shuffled = _shuffled(len(document), seed, 3)
    order = shuffled[np.argsort(-held[shuffled], kind="stable")]
    document, start, held, seen = (x[order] for x in (document, start, held, seen))

    bins, n_bins = np.empty(len(order), np.int64), 0
    # Room that is left -> the sequences with exactly so much of it; and these amounts, sorted.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for i, length in enumerate(held.tolist()):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen, n_bins = seq_len, n_bins, n_bins + 1
        else:
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        bins[i] = chosen
        if room > length:
            if room - length not in by_room:
                by_room[room - length] = []
                insort(rooms, room - length)
            by_room[room - length].append(chosen)
    return _Bins(document, start, held, seen, bins)


def pad_end(sequence: PackedSequence, multiple: int) -> PackedSequence:
    """The sequence made a multiple of ``multiple`` tokens long by unlabelled tokens after its last document's end.

    They belong to the last document. Attention is causal, so tokens after the real ones do not change their outputs.
    """
    lengths = sequence.cu_seqlens.diff().tolist()
    lengths[-1] += -len(sequence) % multiple
    return _padded(sequence, lengths)


def pad_documents(sequence: PackedSequence, multiple: int) -> PackedSequence:
    """Each document made a multiple of ``multiple`` tokens long, as :func:`pad_end` does for the last."""
    return _padded(sequence, [length + -length % multiple for length in sequence.cu_seqlens.diff().tolist()])


def _padded(sequence: PackedSequence, lengths: list[int]) -> PackedSequence:
    old = sequence.cu_seqlens.numpy().astype(np.int64)
    new = np.cumsum([0, *lengths])
    # A piece moves back by the padding of all documents before its own.
    owner = np.searchsorted(old, sequence.begins, side="right") - 1
    begins = sequence.begins + (new - old)[owner]
    return replace(sequence, begins=begins, cu_seqlens=torch.tensor(new.tolist(), dtype=torch.int32))


def _shares(weights: tuple[float, ...], total: int) -> np.ndarray:
    """``total`` divided by ``weights`` into whole numbers, at least 1 each; the largest remainders are rounded up."""
    exact = np.array(weights) * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    for i in np.argsort(counts - exact, kind="stable")[: max(0, total - int(counts.sum()))]:
        counts[i] += 1
    counts[np.argmax(counts)] += total - counts.sum()
    return counts


def _uniform(n: int, *key: int) -> np.ndarray:
    """[n] float64 in [0, 1) that depend on ``key`` alone."""
    return (np.random.PCG64(np.random.SeedSequence(key)).random_raw(n) >> np.uint64(11)) * 2.0**-53


def _shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of ``range(n)`` that depends on ``key`` alone.

    NumPy keeps a generator's raw output stable between versions, but not its ``permutation``: sort raw output.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable")
