"""Documents packed into sequences of one length, and which sequence belongs to which step.

Legend: T tokens of a sequence. An epoch concatenates all documents in a shuffled order, cuts that stream into
sequences of T tokens and shuffles these. A sequence is thus a function of (seed, index) alone, whatever the number of
ranks, and a run's position in the data is its step. A document that crosses a cut continues in another sequence, as a
document of its own: attention and positions start again there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.loss import IGNORED_LABEL
from .text import Document


@dataclass(frozen=True)
class PackedSequence:
    """T tokens of whole and cut documents, before any sharding."""

    tokens: Tensor
    """[T] int64."""
    labels: Tensor
    """[T] int64, the next token of the same document; IGNORED_LABEL for a document's last token and for padding."""
    cu_seqlens: Tensor
    """[n_docs + 1] int32, document boundaries."""


class Packer:
    """Sequence ``index`` of an endless, shuffled stream over ``documents``.

    Args:
        documents: at least ``seq_len`` bytes in all.
        seq_len: T.
        seed: another seed is another order.
    """

    def __init__(self, documents: tuple[Document, ...], seq_len: int, seed: int):
        self.documents, self.seq_len, self.seed = documents, seq_len, seed
        self.lengths = np.array([document.length for document in documents], dtype=np.int64)
        self.per_epoch = int(self.lengths.sum()) // seq_len
        if self.per_epoch < 1:
            raise ValueError(f"{self.lengths.sum()} bytes are fewer than one sequence, seq_len={seq_len}")
        self._epoch = None

    def sequence(self, index: int) -> PackedSequence:
        """Sequence ``index`` (0, 1, ...; after an epoch's last comes the next epoch's first)."""
        epoch, place = divmod(index, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            order = _shuffled(len(self.documents), self.seed, epoch, 0)
            ends = np.cumsum(self.lengths[order])
            self._epoch = epoch, order, ends, _shuffled(self.per_epoch, self.seed, epoch, 1)
        _, order, ends, places = self._epoch
        return self._cut(order, ends, int(places[place]) * self.seq_len)

    def _cut(self, order: np.ndarray, ends: np.ndarray, start: int) -> PackedSequence:
        """Tokens ``[start, start + T)`` of the stream of documents that ``order`` and ``ends`` describe."""
        stop = start + self.seq_len
        tokens = np.empty(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORED_LABEL, dtype=np.int64)
        bounds, at = [0], start
        i = int(np.searchsorted(ends, start, side="right"))
        while at < stop:
            document = self.documents[order[i]]
            document_start = int(ends[i]) - document.length
            end = min(stop, int(ends[i]))
            # Read one byte more than the tokens, if the document goes on: it is the label of the last token.
            data = document.read(at - document_start, min(end + 1 - document_start, document.length))
            low, high = at - start, end - start
            tokens[low:high] = data[: high - low]
            labels[low : low + len(data) - 1] = data[1:]
            bounds.append(high)
            at, i = end, i + 1
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        return PackedSequence(torch.from_numpy(tokens), torch.from_numpy(labels), cu_seqlens)


def pad_end(sequence: PackedSequence, multiple: int) -> PackedSequence:
    """The sequence made a multiple of ``multiple`` tokens long by unlabelled tokens after its last document's end.

    They belong to the last document. Attention is causal, so tokens after the real ones do not change their outputs.
    """
    lengths = sequence.cu_seqlens.diff().tolist()
    lengths[-1] += -sequence.tokens.numel() % multiple
    return _padded(sequence, lengths)


def pad_documents(sequence: PackedSequence, multiple: int) -> PackedSequence:
    """Each document made a multiple of ``multiple`` tokens long, as :func:`pad_end` does for the last."""
    return _padded(sequence, [length + -length % multiple for length in sequence.cu_seqlens.diff().tolist()])


def _padded(sequence: PackedSequence, lengths: list[int]) -> PackedSequence:
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    # A token moves back by the padding of all documents before its own.
    shift = (cu_seqlens - sequence.cu_seqlens)[:-1].repeat_interleave(sequence.cu_seqlens.diff())
    dest = torch.arange(sequence.tokens.numel()) + shift
    length = int(cu_seqlens[-1])
    tokens = sequence.tokens.new_zeros(length).index_copy_(0, dest, sequence.tokens)
    labels = sequence.labels.new_full((length,), IGNORED_LABEL).index_copy_(0, dest, sequence.labels)
    return PackedSequence(tokens, labels, cu_seqlens)


def _shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of ``range(n)`` that depends on ``key`` alone.

    NumPy keeps a generator's raw output stable between versions, but not its ``permutation``: sort raw output.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable")
