"""Tokens of the experiments' text: bytes, or those of a byte-level BPE that is trained on the text itself.

Every token of either is a run of bytes, and the tokens of a text are its bytes: losses per token tell those per byte.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.encode import TOKENIZER, ByteEncoder, TokenizerEncoder
from .rows import Rows

# Bytes of text that a vocabulary is made of, taken evenly from all of it; more takes longer and changes few tokens.
_SAMPLE_BYTES = 16_000_000


def _byte_characters() -> dict[str, int]:
    """The byte of each character that byte-level BPE writes bytes as: what can be seen stands for itself."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_characters()


class Bytes:
    """A token is a byte."""

    unit, dtype = "bytes", np.dtype(np.uint8)

    def encode(self, parts: Sequence[bytes]) -> np.ndarray:
        """[n], the tokens of texts that stand one behind another."""
        return np.frombuffer(b"".join(parts), self.dtype)

    def widths(self, tokens: np.ndarray) -> np.ndarray:
        """[n], the bytes of each token."""
        return np.ones(len(tokens), np.int64)

    def text(self, tokens: np.ndarray) -> bytes:
        """The bytes of all tokens."""
        return tokens.tobytes()

    def describe(self) -> dict:
        """What the description beside the data says of the tokens."""
        return ByteEncoder().describe()


class Pieces:
    """Tokens of a byte-level BPE.

    Args:
        folder: with its ``tokenizer.json``.
    """

    unit = "tokens"

    def __init__(self, folder: Path):
        self._encoder = TokenizerEncoder(folder, end="none")
        self.dtype = self._encoder.dtype
        self._bytes = [b""] * self._encoder.vocab_size
        for token, number in self._encoder.tokenizer.get_vocab().items():
            self._bytes[number] = bytes(map(_BYTES.__getitem__, token))
        self._widths = np.array(list(map(len, self._bytes)), np.int64)

    def encode(self, parts: Sequence[bytes]) -> np.ndarray:
        """[n], the tokens of texts that stand one behind another; none spans two of them."""
        found = self._encoder.tokenizer.encode_batch_fast([part.decode("utf-8") for part in parts])
        return np.concatenate([np.array(one.ids, self.dtype) for one in found])

    def widths(self, tokens: np.ndarray) -> np.ndarray:
        """[n], the bytes of each token."""
        return self._widths[tokens]

    def text(self, tokens: np.ndarray) -> bytes:
        """The bytes of all tokens."""
        return b"".join(map(self._bytes.__getitem__, tokens.tolist()))

    def describe(self) -> dict:
        """What the description beside the data says of the tokens."""
        return self._encoder.describe()


def train_tokenizer(folder: Path, parts: Sequence[bytes], vocabulary: int) -> None:
    """Write ``folder/tokenizer.json``: byte-level BPE with at most ``vocabulary`` tokens, for texts like ``parts``."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("no tokenizers here, of which the text's vocabulary is made; pip install tokenizers") from None
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    step = max(1, round(sum(map(len, parts)) / _SAMPLE_BYTES))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((part.decode("utf-8") for part in parts[::step]), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / TOKENIZER))


def bytes_per_token(prefix: str | Path) -> float:
    """What the description beside tokenized text says, 1 without one."""
    file = Path(f"{prefix}.json")
    return json.loads(file.read_text(encoding="utf-8"))["bytes_per_token"] if file.is_file() else 1.0


def token_mask(widths: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[n] uint8: 1 for the tokens of which a byte has 1 in ``mask`` [bytes]; widths [n] bytes, at least 1 each."""
    starts = np.cumsum(widths) - widths
    return np.maximum.reduceat(mask, starts) if len(starts) else mask[:0]


def width_lines(rows: Rows) -> list[str]:
    """How to compare losses per token with those of other tokens, where tokens are no bytes."""
    widths = {row.get("bytes_per_token", 1.0) for row in rows} - {1.0}
    if not widths:
        return []
    said = " or ".join(f"{width:.3f}" for width in sorted(widths))
    return [f"Losses are nats per token; a token of the validation has {said} bytes in the mean.", ""]
