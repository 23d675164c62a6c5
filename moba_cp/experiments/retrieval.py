"""Retrieval from a long document: generators that need no download, and how often a model answers right.

Tokens are printable bytes in three classes: noise, keys and values. A document is noise in which pairs, a key and its
value behind it, stand at random; keys are asked, each followed by its value, which alone has a label. In every second
document that models train on they are asked at its end, as in tests. In the others a key is asked wherever it comes
again, up to once for two tokens: with a label for every hundredth token alone, models learn nothing within a thousand
steps, and MoBA does not learn to choose. Once they find keys, these have few pairs as often as many: where there are
many, the last one of a key stands nearby, and little has to be chosen. Tests ask for one key alone in the document
(``pass-key``), for one of many (``multi-key``), at a given depth, and for all of many (associative recall).
"""

import json
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..cp.comm import Communicator
from ..cp.context import CPContext
from ..data.encode import ByteEncoder
from ..data.indexed import MASK, write_index
from ..train.config import TrainConfig
from ..train.evaluate import model_with
from ..train.mesh import open_mesh
from .corpus import TRAINING, VALIDATION

# Text, so that a prompt can be written by hand: who guesses a digit is right once in ten.
NOISE = (" " + string.punctuation).encode()
KEYS = string.ascii_letters.encode()
VALUES = string.digits.encode()
DEPTHS = 8
"""Equal parts of a document in which the asked key of a test stands."""
MANY = 32
"""Pairs of a document of which one is asked."""
RECALLED = (4, 8, 16, 32, 48)
"""Pairs of a document of which all are asked."""
# Share of a document that is pairs, at the least, where keys are asked throughout.
_LEAST_FILLED = 0.05
# Documents of each cell of a test, and tokens of a forward pass, by the kind of device.
_DOCUMENTS, _AT_ONCE = {"cuda": 16, "cpu": 2}, {"cuda": 65536, "cpu": 2048}


@dataclass(frozen=True)
class Document:
    """Tokens [T] uint8, and the positions [n] of the values that are asked."""

    tokens: np.ndarray
    answers: np.ndarray


def make_document(
    generator: np.random.Generator, length: int, pairs: int, asked: int, depth: tuple[float, float] | None = None
) -> Document:
    """A document of ``length`` tokens with ``pairs`` pairs, of which ``asked`` are asked at its end.

    Args:
        depth: the shares of the text before the questions between which the first of the asked stands; None: anywhere.
    """
    noise, keys, values = (np.frombuffer(some, np.uint8) for some in (NOISE, KEYS, VALUES))
    tokens = generator.choice(noise, length)
    keys, values = generator.permutation(keys)[:pairs], generator.choice(values, pairs)
    room = length - 2 * asked
    # Pairs do not overlap: their places are drawn in units of two tokens.
    units = room // 2
    if depth is None:
        places = generator.permutation(units)[:pairs]
    else:
        first = int(generator.integers(int(depth[0] * units), max(int(depth[1] * units), int(depth[0] * units) + 1)))
        others = generator.permutation(units)
        places = np.concatenate([[first], others[others != first][: pairs - 1]])
    tokens[2 * places], tokens[2 * places + 1] = keys, values
    order = generator.permutation(asked)
    tokens[room::2][:asked], tokens[room + 1 :: 2][:asked] = keys[:asked][order], values[:asked][order]
    return Document(tokens, room + 1 + 2 * np.arange(asked))


def make_recall(generator: np.random.Generator, length: int, pairs: int, filled: float) -> Document:
    """A document of ``length`` tokens: a share ``filled`` is pairs of at most ``pairs`` keys, each of which is asked
    whenever it comes again, and the rest is noise."""
    noise, keys, values = (np.frombuffer(some, np.uint8) for some in (NOISE, KEYS, VALUES))
    tokens = generator.choice(noise, length)
    keys, values = generator.permutation(keys)[:pairs], generator.choice(values, pairs)
    units = length // 2
    places = np.sort(generator.permutation(units)[: max(2, int(filled * units))])
    which = generator.integers(pairs, size=len(places))
    tokens[2 * places], tokens[2 * places + 1] = keys[which], values[which]
    again = np.ones(len(places), bool)
    again[np.unique(which, return_index=True)[1]] = False
    return Document(tokens, 2 * places[again] + 1)


def build_retrieval(folder: Path, lengths: tuple[int, ...], tokens: int, held_out: int, sparse: bool) -> None:
    """Write ``folder/training`` and ``folder/validation`` (.bin, .idx and masks), unless they are there.

    Args:
        lengths: of documents; each has an equal share of the tokens.
        tokens: of all training documents.
        held_out: validation documents of each length.
        sparse: whether the documents in which keys come again have few pairs as often as many, evenly by ratio.
    """
    described = {"lengths": list(lengths), "tokens": tokens, "held_out": held_out}
    described |= {"alphabet": (NOISE + KEYS + VALUES).decode(), "asked": "at the end, or throughout", "sparse": sparse}
    note = folder / "made.json"
    if note.is_file() and json.loads(note.read_text()) == described:
        return
    folder.mkdir(parents=True, exist_ok=True)
    counts = {TRAINING: [max(1, tokens // len(lengths) // n) for n in lengths], VALIDATION: [held_out] * len(lengths)}
    for seed, (split, numbers) in enumerate(counts.items()):
        generator, documents = np.random.default_rng(seed), []
        for length, number in zip(lengths, numbers):
            # From one to as many pairs as there are keys, evenly by ratio: the few are found first.
            pairs = (2 ** generator.uniform(0, np.log2(len(KEYS)) + 1e-9, number)).astype(int).clip(1, length // 8)
            for i, n in enumerate(pairs):
                if split == TRAINING and i % 2 == 0:
                    # Each key is asked once in the mean, at the least.
                    least = min(1.0, max(_LEAST_FILLED, 4 * n / length))
                    filled = least ** generator.uniform() if sparse else generator.uniform(0.1, 1.0)
                    documents.append(make_recall(generator, length, n, filled))
                else:
                    documents.append(make_document(generator, length, n, n))
        write_documents(folder / split, documents)
    note.write_text(json.dumps(described))


def write_documents(prefix: Path, documents: list[Document]) -> None:
    """Write ``prefix.bin``, ``.idx`` and ``.json``, and the mask of what is asked, which alone has labels."""
    lengths = np.array([len(document.tokens) for document in documents], np.int32)
    np.concatenate([document.tokens for document in documents]).tofile(prefix.with_name(prefix.name + ".bin"))
    mask = np.zeros(int(lengths.sum()), np.uint8)
    for begin, document in zip(np.cumsum(lengths) - lengths, documents):
        mask[begin + document.answers] = 1
    beside = prefix.with_name(prefix.name + MASK)
    mask.tofile(beside.with_name(beside.name + ".bin"))
    described = {"tokens": ByteEncoder().describe(), "bytes_per_token": 1.0, "mask": True}
    prefix.with_name(prefix.name + ".json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    write_index(beside, lengths, np.dtype(np.uint8))
    write_index(prefix, lengths, np.dtype(np.uint8))


@torch.no_grad()
def answer(config: TrainConfig, lengths: tuple[int, ...]) -> dict:
    """How often the model in the run's folder answers right.

    Args:
        lengths: of documents.

    Returns:
        ``{"pass-key": {length: [share by depth]}, "multi-key": ..., "recall": {pairs: share}}``, recall at the longest
        of the lengths that the model was trained on, which is the last but one.
    """
    mesh = open_mesh(config.run)
    attention = config.attention.at(config.run.steps, config.run.steps)
    module = model_with(config.run.directory, config, attention, mesh)
    comm, kind = Communicator(mesh.context_group), mesh.device.type
    repeats = _DOCUMENTS[kind]

    def share(documents: list[Document]) -> list[float]:
        """Of each document the share of right answers."""
        length, right = len(documents[0].tokens), []
        at_once = max(1, _AT_ONCE[kind] // length)
        for first in range(0, len(documents), at_once):
            some = documents[first : first + at_once]
            ends = [i * length for i in range(len(some) + 1)]
            context = CPContext(comm, layout="contiguous", seq_len=ends[-1], cu_seqlens=ends, device=mesh.device)
            tokens = torch.from_numpy(np.concatenate([x.tokens for x in some])).long()
            logits = module(tokens.to(mesh.device), None, context)
            for document, row in zip(some, logits.argmax(-1).view(len(some), length).cpu().numpy()):
                right.append(float((row[document.answers - 1] == document.tokens[document.answers]).mean()))
        return right

    generator = np.random.default_rng(2)
    found: dict = {"pass-key": {}, "multi-key": {}, "recall": {}}
    for name, pairs in (("pass-key", 1), ("multi-key", MANY)):
        for length in lengths:
            documents = [
                make_document(generator, length, min(pairs, length // 8), 1, (i / DEPTHS, (i + 1) / DEPTHS))
                for i in range(DEPTHS)
                for _ in range(repeats)
            ]
            found[name][str(length)] = np.reshape(share(documents), (DEPTHS, repeats)).mean(1).tolist()
    longest = lengths[-2]
    for pairs in RECALLED:
        documents = [make_document(generator, longest, pairs, pairs) for _ in range(repeats)]
        found["recall"][str(pairs)] = float(np.mean(share(documents)))
    return found
