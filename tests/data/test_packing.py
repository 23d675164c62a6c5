"""Packing: every token once an epoch, labels that stay within documents, an order that depends on the seed alone."""

import tracemalloc

import numpy as np
import pytest
import torch

from moba_cp.cp.layout import rank_segments
from moba_cp.data.corpus import TextDocuments
from moba_cp.data.packing import Mixer, PackedSequence, Packer, pad_documents, pad_end
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
    return TextDocuments(tuple(made))


def content(document: Document) -> bytes:
    return bytes(document.read(0, document.length))


def parts(sequence: PackedSequence) -> list[tuple[bytes, list[int]]]:
    """(tokens, labels) of each document of a sequence."""
    bounds = sequence.cu_seqlens.tolist()
    return [(bytes(sequence.tokens[a:b].tolist()), sequence.labels[a:b].tolist()) for a, b in zip(bounds, bounds[1:])]


@pytest.mark.parametrize("seq_len", [2, 16, 62, 248])
def test_labels_are_the_next_byte_of_the_same_document(documents, seq_len):
    whole = [content(document) for document in documents.documents]
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
        expected = np.frombuffer(b"".join(content(document) for document in documents.documents), np.uint8)
        assert sorted(tokens.tolist()) == sorted(expected.tolist())
        # One label is missing at each document's end, and nowhere else.
        labels = torch.cat([packer.sequence(8 * epoch + i).labels for i in range(8)])
        assert (labels == IGNORED_LABEL).sum() == len(LENGTHS)


def equal(a: PackedSequence, b: PackedSequence) -> bool:
    return all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("tokens", "labels", "cu_seqlens"))


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
    with pytest.raises(ValueError, match="248 tokens are fewer than one sequence, seq_len=249"):
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
    assert (
        len(padded) == padded.tokens.numel() and len(padded) % multiple == 0 and padded.cu_seqlens.dtype == torch.int32
    )


class Numbers:
    """Documents whose tokens are all different: document * 10,000 + position; a mask that learns every third."""

    def __init__(self, lengths, masked=False):
        self.lengths, self.masked = np.array(lengths, np.int64), masked

    def read(self, document, start, stop):
        return np.arange(start, stop, dtype=np.int32) + document * 10_000

    def read_mask(self, document, start, stop):
        return (np.arange(start, stop) % 3 == 0).astype(np.uint8) if self.masked else None


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_per_document"])
@pytest.mark.parametrize("packing, overlap", [("stream", 0), ("best_fit", 0), ("best_fit", 7)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_ranks_make_the_sequence(layout, packing, overlap, size):
    packer = Packer(Numbers([3, 50, 130, 1, 64, 17, 40, 200], masked=True), 64, 2, packing, overlap)
    for index in range(packer.per_epoch):
        sequence = packer.sequence(index)
        if layout == "zigzag_per_document":
            sequence = pad_documents(sequence, 2 * size)
        tokens, labels = sequence.read()
        places = rank_segments(layout, len(sequence), size, sequence.cu_seqlens.numpy())
        for segments in places:
            mine, their_labels = sequence.read(segments)
            assert mine.tolist() == [x for a, n in segments for x in tokens[a : a + n].tolist()]
            assert their_labels.tolist() == [x for a, n in segments for x in labels[a : a + n].tolist()]


@pytest.mark.parametrize("overlap", [0, 7])
def test_best_fit_learns_every_label_once_and_cuts_no_short_document(overlap):
    lengths = [3, 50, 130, 1, 64, 17, 40, 200, 65, 63]
    packer = Packer(Numbers(lengths), 64, 0, "best_fit", overlap)
    learned, placed, pieces = [], 0, []
    for index in range(packer.per_epoch):
        sequence = packer.sequence(index)
        tokens, labels = sequence.read()
        assert len(tokens) == len(sequence) == 64
        for piece, begin in zip(sequence.pieces, sequence.begins.tolist()):
            expected = np.arange(piece.start, piece.start + piece.length) + piece.document * 10_000
            assert tokens[begin : begin + piece.length].tolist() == expected.tolist()
            placed += piece.length
            pieces.append(piece)
        has = labels != IGNORED_LABEL
        assert (labels[has] == tokens[has] + 1).all(), "labels are the next token"
        learned += labels[has].tolist()
    every = [d * 10_000 + p for d, n in enumerate(lengths) for p in range(1, n)]
    assert sorted(learned) == every
    assert packer.waste == pytest.approx(1 - placed / (64 * packer.per_epoch)) and packer.n_cut == 3
    for document, length in enumerate(lengths):
        mine = sorted(p for p in pieces if p.document == document)
        assert len(mine) == 1 or length > 64
        assert all(b.start == a.start + 64 - overlap for a, b in zip(mine, mine[1:]))
    assert not overlap or any(piece.seen for piece in pieces)


def test_best_fit_wastes_little_and_is_fast():
    lengths = np.random.default_rng(0).integers(1, 3000, 20_000)
    packer = Packer(Numbers(lengths), 2048, 0, "best_fit")
    assert packer.waste < 0.01
    assert sum(len(packer.sequence(i).pieces) for i in range(packer.per_epoch)) > 20_000


def test_masks_leave_labels_out():
    sequence = Packer(Numbers([64, 64], masked=True), 32, 0).sequence(0)
    tokens, labels = sequence.read()
    has = labels != IGNORED_LABEL
    assert has.any() and (labels[has] % 10_000 % 3 == 0).all() and ((tokens[~has] + 1) % 10_000 % 3 != 0).all()


def test_attention_across_documents_is_one_document():
    documents = Numbers([3, 50, 130, 64, 17])
    alone, across = (Packer(documents, 64, 0, attend_across=x) for x in (False, True))
    for index in range(alone.per_epoch):
        a, b = alone.sequence(index), across.sequence(index)
        assert b.cu_seqlens.tolist() == [0, 64] and torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
        padded = pad_documents(b, 48)
        assert padded.cu_seqlens.tolist() == [0, 96] and torch.equal(padded.tokens[:64], a.tokens)


def test_corpora_are_mixed_by_weight_each_in_its_own_order():
    parts = [Packer(Numbers([n] * 20), 16, 5) for n in (100, 30, 500)]
    mixer, again = (Mixer(parts, (0.7, 0.05, 0.25), 5) for _ in range(2))
    places = [mixer.place(i) for i in range(3 * 4096)]
    assert places == [again.place(i) for i in reversed(range(3 * 4096))][::-1]
    for corpus, share in enumerate((0.7, 0.05, 0.25)):
        numbers = [number for c, number in places if c == corpus]
        assert numbers == sorted(numbers) or sorted(numbers) == list(range(len(numbers)))
        assert len(numbers) / len(places) == pytest.approx(share, abs=1 / 4096)
        # Evenly: any hundred sequences hold it about as often.
        counts = [sum(c == corpus for c, _ in places[i : i + 100]) for i in range(0, 4000, 100)]
        assert max(counts) - min(counts) <= 6
    assert torch.equal(mixer.sequence(9).tokens, parts[places[9][0]].sequence(places[9][1]).tokens)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_order_is_exact_after_ten_stops_and_on_any_number_of_ranks(packing):
    """Each start makes everything anew, from the step alone, on 1, 2 or 4 ranks that share the sequences."""
    random, per_step = np.random.default_rng(1), 2

    def sequences(size: int, first: int, stop: int):
        parts = [Packer(Numbers(x), 64, 3, packing) for x in ([50, 130, 20, 700, 9], [64, 100, 33])]
        mixer = Mixer(parts, (0.6, 0.4), 3)
        for index in range(first, stop):
            sequence, whole = mixer.sequence(index), {}
            for segments in rank_segments("zigzag", len(sequence), size, sequence.cu_seqlens.numpy()):
                tokens, labels = sequence.read(segments)
                at = 0
                for a, n in segments:
                    whole[a] = tokens[at : at + n].tolist(), labels[at : at + n].tolist()
                    at += n
            yield (
                [x for _, part in sorted(whole.items()) for x in part[0]],
                [x for _, part in sorted(whole.items()) for x in part[1]],
            )

    expected = list(sequences(1, 0, 60 * per_step))
    stops = [0, *sorted(random.choice(np.arange(1, 60), 10, replace=False).tolist()), 60]
    for size in (1, 2, 4):
        got = [x for a, b in zip(stops, stops[1:]) for x in sequences(size, a * per_step, b * per_step)]
        assert got == expected
    changing = [x for i, (a, b) in enumerate(zip(stops, stops[1:])) for x in sequences(2 ** (i % 3), 2 * a, 2 * b)]
    assert changing == expected


def test_a_rank_holds_its_share_of_a_million_tokens():
    """At T = 1M on 8 ranks: 16 bytes a token of the share, and a little beside."""
    total = 2**20
    sequence = Packer(Numbers([total // 3] * 7), total, 0).sequence(0)
    segments = rank_segments("zigzag", total, 8, sequence.cu_seqlens.numpy())[3]
    tracemalloc.start()
    try:
        tokens, labels = sequence.read(segments)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tokens.numel() == total // 8
    print(f"peak of a rank's loader: {peak / 2**20:.2f} MiB")
    assert peak < 32 * total // 8
