"""Text into tokens: by a file of Hugging Face's ``tokenizers``, or byte by byte."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# What belongs to a tokenizer in a folder of transformers.
_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# The vocabulary up to which Megatron's files have two bytes for a token.
_TWO_BYTES_BELOW = 65500


class ByteEncoder:
    """A token is a byte of UTF-8; there are no special tokens."""

    name, vocab_size, begin, end, dtype = "bytes", 256, None, None, np.dtype(np.uint8)

    def encode(self, text: str) -> np.ndarray:
        """[n] uint8."""
        return np.frombuffer(text.encode("utf-8"), self.dtype)

    def compare(self, text: str) -> bool:
        """True: a byte is a byte."""
        return True

    def encode_masked(self, text: str, learned: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n] and mask [n] uint8, 1 for the bytes of the characters in the ranges ``learned``."""
        mask = np.zeros(len(text.encode("utf-8")), np.uint8)
        for begin, stop in learned:
            start = len(text[:begin].encode("utf-8"))
            mask[start : start + len(text[begin:stop].encode("utf-8"))] = 1
        return self.encode(text), mask

    def decode(self, tokens: np.ndarray) -> str:
        """The text of ``tokens``; bytes that are no UTF-8 become U+FFFD."""
        return bytes(tokens.tolist()).decode("utf-8", "replace")

    def describe(self) -> dict:
        """What the description beside the data says of the tokens."""
        return {"name": self.name, "vocab_size": self.vocab_size, "begin": None, "end": None, "hash": None}


class TokenizerEncoder:
    """Tokens of a ``tokenizer.json``.

    Args:
        path: that file, or a folder with it.
        begin: token put before each document: its text, or "none".
        end: token put behind each document: its text, "none", or "auto" for the end-of-sequence token that
            ``tokenizer_config.json`` beside the file names, if it does.

    Raises:
        ValueError: no such file, or no such token.
    """

    def __init__(self, path: str | Path, begin: str = "none", end: str = "auto"):
        from tokenizers import Tokenizer

        from .fast import fast_encoder

        self.file = tokenizer_file(path)
        try:
            self.tokenizer = Tokenizer.from_file(str(self.file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{self.file}: not a tokenizer of Hugging Face's tokenizers ({error})") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.name = str(self.file)
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        # Ids may have gaps, and the largest decides.
        self.vocab_size = max([self.vocab_size - 1, *self.tokenizer.get_vocab().values()]) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size < _TWO_BYTES_BELOW else np.int32)
        self.begin = self._special(begin, "--begin-token")
        self.end = self._special(_named(self.file, "eos_token") if end == "auto" else end, "--end-token")
        self._fast = fast_encoder(self.tokenizer)

    def encode(self, text: str) -> np.ndarray:
        """[n] uint16 or int32, with the tokens ``begin`` and ``end``."""
        tokens = self._fast(text).astype(self.dtype) if self._fast is not None else self.encode_exactly(text)
        return self._framed(tokens, self.begin, self.end)

    def encode_exactly(self, text: str) -> np.ndarray:
        """As the tokenizers library encodes it, without ``begin`` and ``end``."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, self.dtype)

    def compare(self, text: str) -> bool:
        """Whether :meth:`encode` gives the tokens of the tokenizers library for ``text``; if not, that library encodes
        from now on."""
        from .fast import agrees

        if self._fast is None or agrees(self.tokenizer, self._fast, text):
            return True
        self._fast = None
        return False

    def encode_masked(self, text: str, learned: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n] and mask [n] uint8: 1 for tokens of which a character lies in the ranges ``learned``, and for the
        token behind a document that ends in one."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        mask = np.zeros(len(spans), np.uint8)
        for begin, stop in learned:
            mask |= ((spans[:, 0] < stop) & (spans[:, 1] > begin)).astype(np.uint8)
        to_the_end = any(stop >= len(text) for _, stop in learned)
        framed = self._framed(np.array(encoding.ids, self.dtype), self.begin, self.end)
        return framed, self._framed(
            mask, None if self.begin is None else 0, None if self.end is None else int(to_the_end)
        )

    def decode(self, tokens: np.ndarray) -> str:
        """The text of ``tokens``, special ones included."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def describe(self) -> dict:
        """What the description beside the data says of the tokens."""
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "begin": self.begin,
            "end": self.end,
            "hash": digest,
        }

    def special_ids(self) -> dict[str, int | None]:
        """The ids of the tokens that begin and end a text, as a model's config.json names them."""
        names = {"bos_token_id": _named(self.file, "bos_token"), "eos_token_id": _named(self.file, "eos_token")}
        return {name: self.tokenizer.token_to_id(token) for name, token in names.items() if token is not None}

    def copy_to(self, folder: Path) -> None:
        """Put the tokenizer's files into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.file, folder / TOKENIZER)
        for name in _FILES[1:]:
            if (self.file.parent / name).is_file():
                shutil.copyfile(self.file.parent / name, folder / name)

    def _special(self, token: str | None, option: str) -> int | None:
        if token in (None, "none"):
            return None
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"{option}={token!r} is no token of {self.file}; name one of its tokens, or none")
        return found

    def _framed(self, tokens: np.ndarray, begin: int | None, end: int | None) -> np.ndarray:
        before, behind = (np.array([] if x is None else [x], tokens.dtype) for x in (begin, end))
        return np.concatenate([before, tokens, behind]) if before.size or behind.size else tokens


def tokenizer_file(path: str | Path) -> Path:
    """The ``tokenizer.json`` that ``path`` names or holds.

    Raises:
        ValueError: there is none.
    """
    path = Path(path).expanduser()
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"tokenizer={str(path)!r}: no {TOKENIZER} there; name such a file or a folder with one (transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes it)"
        )
    return file


def _named(file: Path, name: str) -> str | None:
    """The token that the files beside a tokenizer call ``name``, such as ``eos_token``."""
    config = file.parent / TOKENIZER_CONFIG
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get(name)
    except (ValueError, AttributeError):
        raise ValueError(f"{config}: not JSON with a tokenizer's settings") from None
    return token.get("content") if isinstance(token, dict) else token


def make_encoder(tokenizer: str | None, begin: str = "none", end: str = "auto") -> ByteEncoder | TokenizerEncoder:
    """The encoder by a tokenizer's path; None: bytes."""
    return ByteEncoder() if tokenizer is None else TokenizerEncoder(tokenizer, begin, end)
