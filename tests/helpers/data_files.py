"""Small tokenizers and files of documents for the tests of data."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END = "<|end|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEXTS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs.\n\nIt'S only\tmid-way ...  and back \r\n",
    "def f(self, value):\n    return [x**2 for x in range(10)]\n",
    "Zürich, naïve café — “quotes” …  ١٢٣ 四五六 Ǆ ſ'ſ\u2028next\u00a0space\u3000wide\x1c\x85end",
    "emoji 👩‍👩‍👧 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 and e\u0301 composed",
]


def write_tokenizer(folder: Path, kind: str = "gpt2", vocab_size: int = 400) -> Path:
    """A byte-level BPE of the structure of ``gpt2``, ``llama3`` or ``qwen2`` in ``folder``, with an end token."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(LLAMA3 if kind == "llama3" else QWEN2), "isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_jsonl(path: Path, n: int = 200, **fields) -> list[str]:
    """``n`` documents of 20 to 900 characters of words that can be learned; their texts are returned."""
    words = ["def", "return", "self", "value", "for", "in", "range", "import", "None", "raise"]
    texts = [
        " ".join(words[(i * j + j * j) % 10] + "()" * (j % 3 == 0) for j in range(4 + i * 7 % 150)) for i in range(n)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts), encoding="utf-8")
    return texts
