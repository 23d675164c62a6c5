"""Packing: every byte once an epoch, labels that stay within documents, an order that depends on the seed alone."""

import numpy as np
import pytest
import torch

from moba_cp.data.packing import PackedSequence, Packer, pad_documents, pad_end
from moba_cp.data.text import Document
from moba_cp.model.loss import IGNORED_LABEL

LENGTHS = [1, 5, 37, 2, 64, 13, 16, 1, 100, 9]


@pytest.fixture
def documents(tmp_path):
    """Documents whose bytes are all different from their neighbours' in every document."""
    made = []
    for i, length in enumerate(LENGTHS):
        (tmp_path / f"{i}").write_bytes(bytes((i * 23 + j * 7) % 256 for j in range(length)))
        made.append(Document(tmp_path / f"{i}", 0, length))
    return tuple(made)


def content(document: Document) -> bytes:
    return bytes(document.read(0, document.length))


def parts(sequence: PackedSequence) -> list[tuple[bytes, list[int]]]:
    """(tokens, labels) of each document of a sequence."""
    bounds = sequence.cu_seqlens.tolist()
    return [(bytes(sequence.tokens[a:b].tolist()), sequence.labels[a:b].tolist()) for a, b in zip(bounds, bounds[1:])]


@pytest.mark.parametrize("seq_len", [2, 16, 62, 248])
def test_labels_are_the_next_byte_of_the_same_document(documents, seq_len):
    whole = [content(document) for document in documents]
    packer = Packer(documents, seq_len, seed=3)
    seen = 0
    for index in range(packer.per_epoch):
        sequence = packer.sequence(index)
        assert sequence.tokens.shape == sequence.labels.shape == (seq_len,)
        assert sequence.cu_seqlens[0] == 0 and sequence.cu_seqlens[-1] == seq_len
        for tokens, labels in parts(sequence):
            assert labels[:-1] == list(tokens[1:])
            # Cut by the sequence: the label is the byte after the cut. At the document's end: none.
            following = bytes([labels[-1]]) if labels[-1] != IGNORED_LABEL else b""
            if following:
                assert any(tokens + following in document for document in whole)
            else:
                assert any(document.endswith(tokens) for document in whole)
            seen += len(tokens)
    assert seen == packer.per_epoch * seq_len


def test_an_epoch_holds_every_byte_once(documents):
    total = sum(LENGTHS)
    packer = Packer(documents, total // 8, seed=0)
    assert packer.per_epoch == 8 and total % 8 == 0
    for epoch in range(3):
        tokens = torch.cat([packer.sequence(8 * epoch + i).tokens for i in range(8)])
        expected = np.frombuffer(b"".join(content(document) for document in documents), np.uint8)
        assert sorted(tokens.tolist()) == sorted(expected.tolist())
        # One label is missing at each document's end, and nowhere else.
        labels = torch.cat([packer.sequence(8 * epoch + i).labels for i in range(8)])
        assert (labels == IGNORED_LABEL).sum() == len(LENGTHS)


def equal(a: PackedSequence, b: PackedSequence) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


def test_a_sequence_depends_on_seed_and_index_alone(documents):
    forward, backward = Packer(documents, 31, seed=5), Packer(documents, 31, seed=5)
    count = 3 * forward.per_epoch
    first = [forward.sequence(i) for i in range(count)]
    second = [backward.sequence(i) for i in reversed(range(count))][::-1]
    assert all(equal(a, b) for a, b in zip(first, second))
    other = Packer(documents, 31, seed=6)
    assert not all(equal(a, other.sequence(i)) for i, a in enumerate(first))
    per_epoch = forward.per_epoch
    assert not all(equal(a, b) for a, b in zip(first[:per_epoch], first[per_epoch:]))


def test_order_is_pinned(documents):
    # The order is part of what a resumed run relies on: it may not change with a version of NumPy or of this library.
    packer = Packer(documents, 62, seed=0)
    starts = [packer.sequence(i).tokens[:4].tolist() for i in range(packer.per_epoch)]
    assert starts == [[4, 11, 18, 25], [54, 61, 68, 75], [69, 76, 46, 53], [232, 239, 246, 253]]


def test_too_little_text(documents):
    with pytest.raises(ValueError, match="248 bytes are fewer than one sequence, seq_len=249"):
        Packer(documents, 249, seed=0)


@pytest.mark.parametrize("pad, multiple", [(pad_end, 8), (pad_documents, 8), (pad_end, 1), (pad_documents, 6)])
def test_padding_keeps_documents_and_adds_no_label(documents, pad, multiple):
    sequence = Packer(documents, 62, seed=1).sequence(0)
    padded = pad(sequence, multiple)
    before, after = parts(sequence), parts(padded)
    assert len(before) == len(after) > 1
    for i, ((tokens, labels), (new_tokens, new_labels)) in enumerate(zip(before, after)):
        n = len(tokens)
        assert new_tokens[:n] == tokens and new_labels[:n] == labels
        assert set(new_labels[n:]) <= {IGNORED_LABEL}
        assert len(new_tokens) - n < multiple
        if pad is pad_documents:
            assert len(new_tokens) % multiple == 0
        elif i < len(before) - 1:
            assert len(new_tokens) == n
    assert padded.tokens.numel() % multiple == 0 and padded.cu_seqlens.dtype == torch.int32
