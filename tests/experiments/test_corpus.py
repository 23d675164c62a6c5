"""The text that experiments train on: what is in which document, and what is held out."""

import numpy as np
import pytest

from moba_cp.data.config import DataConfig
from moba_cp.data.corpus import open_corpora
from moba_cp.experiments.corpus import build_corpora, corpus_lines, docstring_mask
from moba_cp.experiments.tokens import Pieces, bytes_per_token

SPLITS = ("training", "tuning", "validation", "tuning_validation")


@pytest.fixture
def packages(tmp_path):
    """Two packages of 60 folders, each with 3 files that hold the folder's number and nobody else's."""
    for package in ("first", "second"):
        for i in range(60):
            folder = tmp_path / "packages" / package / f"part{i:02}"
            folder.mkdir(parents=True)
            for j in range(3):
                lines = "".join(f"x_{package}_{i:02}_{j} = {k}\n" for k in range(20))
                (folder / f"file{j}.py").write_text(f'"""About {package} {i:02} {j}."""\n{lines}')
    return tmp_path / "packages"


def texts(folder, length):
    return {split: (folder / str(length) / f"{split}.bin").read_bytes() for split in SPLITS}


def test_documents_have_one_length_and_folders_are_on_one_side(packages, tmp_path):
    facts = build_corpora(tmp_path / "corpus", [128, 512], [packages])
    for length in (128, 512):
        parts = open_corpora(DataConfig(path=str(tmp_path / "corpus" / str(length) / "training"), seq_len=512)).parts
        assert set(parts[0].training.lengths) == {length} and parts[0].unit == "bytes"
    assert texts(tmp_path / "corpus", 128) == texts(tmp_path / "corpus", 512), "both lengths are of the same text"
    on = {}
    for split, text in texts(tmp_path / "corpus", 512).items():
        assert len(text) % 512 == 0 and facts["splits"][split]["documents"]["512"] == len(text) // 512
        for package in ("first", "second"):
            for i in range(60):
                if f"# file: {package}/part{i:02}/".encode() in text:
                    on.setdefault((package, i), set()).add(split)
    assert all(len(splits) == 1 for splits in on.values()) and {s for x in on.values() for s in x} == set(SPLITS)
    assert "documents: " in corpus_lines(facts)[1]


def test_tokens_are_the_bytes_of_the_text(packages, tmp_path):
    """A vocabulary made of the text: the same folders in each split, whole documents, masks that fit the tokens."""
    facts = build_corpora(tmp_path / "corpus", [64, 128], [packages], vocabulary=400)
    tokenizer = Pieces(tmp_path / "corpus")
    for split in SPLITS:
        prefix = tmp_path / "corpus" / "64" / split
        parts = open_corpora(DataConfig(path=str(prefix), seq_len=128, validation_share=0.0)).parts
        assert set(parts[0].training.lengths) == {64} and parts[0].vocab_size == 400
        tokens = np.fromfile(f"{prefix}.bin", np.uint16)
        text = tokenizer.text(tokens)
        assert text.decode().startswith("# file: first/part")
        assert len(text) == tokenizer.widths(tokens).sum() == facts["splits"][split]["bytes"] > 1.5 * len(tokens)
        assert bytes_per_token(prefix) == len(text) / len(tokens)
    tokens, masked = (np.fromfile(tmp_path / f"corpus/64/tuning{name}.bin", dtype)
                      for name, dtype in (("", np.uint16), ("_mask", np.uint8)))  # fmt: skip
    labelled, docstrings = np.repeat(masked, tokenizer.widths(tokens)), docstring_mask(tokenizer.text(tokens))
    assert labelled[docstrings == 1].all() and docstrings.sum() <= labelled.sum() < 1.5 * docstrings.sum()
    assert "tokens of " in corpus_lines(facts)[1]


def test_copies_come_once_and_what_is_no_text_not_at_all(packages, tmp_path):
    content = (packages / "first" / "part00" / "file0.py").read_bytes()
    (packages / "second" / "copy.py").write_bytes(content)
    (packages / "second" / "part01" / "binary.py").write_bytes(b"\xff\x00BINARY" * 50)
    (packages / "second" / "part01" / "table.py").write_text("TABLE = '" + "7" * 5000 + "'\n")
    build_corpora(tmp_path / "corpus", [128], [packages])
    everything = b"".join(texts(tmp_path / "corpus", 128).values())
    assert everything.count(b"About first 00 0.") <= 1
    assert b"BINARY" not in everything and b"TABLE" not in everything and b"copy.py" not in everything


def test_it_is_built_once_and_anew_for_other_lengths(packages, tmp_path):
    first = build_corpora(tmp_path / "corpus", [128], [packages], held_out=2)
    assert first["splits"]["validation"]["documents"] == {"128": 2}
    file = tmp_path / "corpus" / "128" / "training.bin"
    before = file.stat().st_mtime_ns
    assert build_corpora(tmp_path / "corpus", [128], [packages], held_out=2) == first
    assert file.stat().st_mtime_ns == before
    assert build_corpora(tmp_path / "corpus", [256], [packages])["asked"]["lengths"] == [256]


def test_too_little_text_is_said(tmp_path):
    (tmp_path / "few" / "one").mkdir(parents=True)
    (tmp_path / "few" / "one" / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="has less than one document of 4096 bytes; name folders with more text"):
        build_corpora(tmp_path / "corpus", [4096], [tmp_path / "few"])


def test_labels_of_fine_tuning_are_docstrings():
    text = b'x = """no docstring"""\ndef f():\n    """What f does."""\n    return 1\n\'\'\'A module.\'\'\'\n'
    labelled = bytes(np.frombuffer(text, np.uint8)[docstring_mask(text) == 1])
    assert labelled == b'What f does."""' + b"A module.'''"
