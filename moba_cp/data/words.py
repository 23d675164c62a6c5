"""Byte-level BPE word by word: a tokenizer's own result, several times faster on running text.

Tokenizers such as those of GPT-2, Llama 3 and Qwen cut a text into words by a regular expression and encode each word
by itself. Words repeat, so their tokens are kept; the cutting is done by Python's ``re``, whose character classes are
taken from the tokenizer's own library. Anything else than that structure is not served (None from :func:`word_cache`).
"""

import json
import re
from array import array
from functools import cache

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

# What ByteLevel(use_regex=True) cuts by.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Words that are kept at most; then all are forgotten, which costs less than a count of uses.
_MOST_WORDS = 4_000_000
# Longer words, such as base64 in one line, hardly come twice.
_LONGEST_KEPT = 64
# Characters are below: ASCII, the basic plane, all of the planes that have letters.
_ASCII, _BASIC_PLANE, _ALL = 0x80, 0x10000, 0x40000
_CLASS = re.compile(r"\\[pP]\{\^?\w+\}|\\[sSdDwW]")


def word_cache(tokenizer: Tokenizer, dtype: type) -> "WordCache | None":
    """The cache for ``tokenizer``; None where its structure is not served.

    Args:
        tokenizer: any.
        dtype: NumPy's, of the tokens.
    """
    description = json.loads(tokenizer.to_str())
    normalizer, model = description.get("normalizer"), description["model"]
    pattern = _pattern_of(description.get("pre_tokenizer"))
    if pattern is None or model.get("type") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        return None
    if model.get("end_of_word_suffix") or (normalizer is not None and normalizer["type"] != "NFC"):
        return None
    try:
        # Without groups, findall gives whole matches.
        if re.compile(_translated(pattern, _ASCII)).groups:
            return None
    except re.error:
        return None
    added = [token["content"] for token in description.get("added_tokens", ())]
    return WordCache(tokenizer, pattern, added, normalizer is not None, dtype)


class WordCache(dict):
    """Word -> its tokens as bytes. ``encode(text)`` gives the tokens of a text, or None for a text that holds what
    only the tokenizer itself can treat (the text of an added token)."""

    def __init__(self, tokenizer: Tokenizer, pattern: str, added: list[str], normalizes: bool, dtype: type):
        super().__init__()
        self._tokenizer, self._pattern, self._normalizes = tokenizer, pattern, normalizes
        self._model, self._alphabet, self._code = tokenizer.model, _alphabet(), np.dtype(dtype).char
        self._added = re.compile("|".join(map(re.escape, added))).search if added else lambda text: None

    def encode(self, text: str) -> bytes | None:
        """The tokens of ``text`` without special ones, packed as the dtype; None if it is not served."""
        if self._added(text):
            return None
        if self._normalizes and not text.isascii():
            text = self._tokenizer.normalizer.normalize_str(text)
            if self._added(text):
                return None
        if len(self) > _MOST_WORDS:
            self.clear()
        cut = _compiled(self._pattern, _limit_of(text)).findall
        return b"".join(map(self.__getitem__, cut(text)))

    def __missing__(self, word: str) -> bytes:
        mapped = word.encode("utf-8").decode("latin-1").translate(self._alphabet)
        tokens = array(self._code, [token.id for token in self._model.tokenize(mapped)]).tobytes()
        if len(word) <= _LONGEST_KEPT:
            self[word] = tokens
        return tokens


def _pattern_of(pre_tokenizer: dict | None) -> str | None:
    """The regular expression that cuts a text into words whose bytes are then mapped; None for another structure."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return _GPT2 if last.get("use_regex", True) else None
    split = steps[0]
    served = len(steps) == 2 and split["type"] == "Split" and not last.get("use_regex", True)
    if not served or split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        return None
    return split["pattern"]["Regex"]


def _alphabet() -> dict[int, str]:
    """Byte -> the character that stands for it in the vocabulary of a byte-level BPE."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The bytes of characters up to U+07FF and of one beyond have all values that occur in UTF-8.
    found = {}
    for code in (*range(0x800), *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x40000)):
        if not 0xD800 <= code < 0xE000:
            ((mapped, _),) = bytes_of.pre_tokenize_str(chr(code))
            found |= dict(zip(chr(code).encode("utf-8"), mapped, strict=True))
    return found


def _limit_of(text: str) -> int:
    """One more than the largest character that ``text`` may hold."""
    if text.isascii():
        return _ASCII
    return _BASIC_PLANE if len(text.encode("utf-16-le")) == 2 * len(text) else _ALL


@cache
def _compiled(pattern: str, limit: int) -> re.Pattern:
    return re.compile(_translated(pattern, limit))


def _translated(pattern: str, limit: int) -> str:
    """``pattern`` with its classes of characters spelt out, as the tokenizers library understands them; for texts whose
    characters are below ``limit``, since Python's ``re`` goes through the ranges beyond the basic plane one by one."""
    parts, at, in_brackets = [], 0, False
    for found in _CLASS.finditer(pattern):
        between = pattern[at : found.start()]
        parts.append(between)
        for mark in re.findall(r"\\.|[\[\]]", between):
            in_brackets = mark == "[" or (in_brackets and mark != "]")
        members = _members(found[0], limit)
        parts.append(members if in_brackets else f"[{members}]")
        at = found.end()
    return "".join(parts) + pattern[at:]


@cache
def _members(name: str, limit: int) -> str:
    """The characters below ``limit`` of a class such as ``\\p{L}`` as ranges for a bracket expression."""
    # Surrogates are no characters.
    codes = [code for code in range(limit) if not 0xD800 <= code < 0xE000]
    every = "".join(map(chr, codes))
    pieces = pre_tokenizers.Split(Regex(f"{name}+"), "removed", invert=True).pre_tokenize_str(every)
    # Cut a run of characters where it crosses the gap of the surrogates.
    runs = [run for _, (a, b) in pieces for run in ((a, min(b, 0xD800)), (max(a, 0xD800), b)) if run[0] < run[1]]
    ranges = "".join(f"{_escaped(codes[a])}-{_escaped(codes[b - 1])}" for a, b in runs)
    # A class without members below the limit: what matches nothing in such a text.
    return ranges or _escaped(0x10FFFF)


def _escaped(code: int) -> str:
    return f"\\U{code:08x}"
