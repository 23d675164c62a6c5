"""Which files are documents, which of them are held out, and what is refused."""

import os
from pathlib import Path

import pytest

from moba_cp.train.text import DataConfig, open_corpus


def write(folder: Path, **files: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def config(path, **fields) -> DataConfig:
    return DataConfig(**{"path": str(path), "seq_len": 8, "validation_share": 0.3} | fields)


def names(documents) -> list[str]:
    return [document.path.name for document in documents]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "text", **{f"doc{i:02}": bytes([i]) * (10 + i) for i in range(20)})
    return tmp_path / "text"


def test_files_are_split_by_content(folder):
    corpus = open_corpus(config(folder))
    train, held_out = names(corpus.training), names(corpus.validation)
    assert sorted(train + held_out) == sorted(os.listdir(folder)) and 1 <= len(held_out) <= 12
    assert train == sorted(train) and held_out == sorted(held_out)
    # Another name and more files move nothing; a copy of a held-out file is held out too.
    (folder / held_out[0]).rename(folder / "aaa")
    write(folder / "sub", copy=(folder / held_out[1]).read_bytes(), other=b"new text")
    again = open_corpus(config(folder))
    assert set(train) <= set(names(again.training)) and {"aaa", "copy"} <= set(names(again.validation))
    assert again.fingerprint != corpus.fingerprint


def test_same_files_have_the_same_fingerprint(folder):
    assert open_corpus(config(folder)) == open_corpus(config(folder))


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_two_files_give_one_to_each_side(tmp_path, share):
    write(tmp_path, a=b"a" * 100, b=b"b" * 100)
    corpus = open_corpus(config(tmp_path, validation_share=share))
    assert (len(corpus.training), len(corpus.validation)) == (1, 1)


def test_single_file_holds_out_its_tail(tmp_path):
    data = bytes(range(200))
    write(tmp_path, a=data)
    corpus = open_corpus(config(tmp_path / "a", validation_share=0.2))
    (train,), (held_out,) = corpus.training, corpus.validation
    assert bytes(train.read(0, train.length)) == data[:160]
    assert bytes(held_out.read(0, held_out.length)) == data[160:]
    assert bytes(held_out.read(3, 7)) == data[163:167]


def test_nothing_is_held_out_on_request(folder):
    corpus = open_corpus(config(folder, validation_share=0))
    assert len(corpus.training) == 20 and corpus.validation == ()


def test_pattern_hidden_and_empty_files(tmp_path):
    write(tmp_path, **{"a.txt": b"x" * 50, "b.txt": b"y" * 50, "c.bin": b"z" * 50, ".d.txt": b"w" * 50, "e.txt": b""})
    write(tmp_path / ".git", **{"f.txt": b"v" * 50})
    corpus = open_corpus(config(tmp_path, pattern="*.txt"))
    assert sorted(names(corpus.training + corpus.validation)) == ["a.txt", "b.txt"]


def test_default_is_the_standard_library():
    corpus = open_corpus(DataConfig())
    documents = corpus.training + corpus.validation
    assert "argparse.py" in names(documents) and all(document.path.suffix == ".py" for document in documents)
    assert not any("site-packages" in document.path.parts for document in documents)
    assert 0.005 < len(corpus.validation) / len(documents) < 0.05


@pytest.mark.parametrize(
    "make, fields, message",
    [
        (lambda p: None, {}, "no such file or folder"),
        (lambda p: write(p), {}, r"no file there matches data.pattern='\*'"),
        (lambda p: write(p, a=b"x" * 99), {"pattern": "*.md"}, r"no file there matches data.pattern='\*.md'"),
        (lambda p: write(p, a=b"", b=b""), {}, "all 2 files are empty; give text"),
        (lambda p: write(p, a=b"x" * 7, b=b"y" * 20), {"seq_len": 64}, "bytes to train on are fewer than one sequence"),
        (lambda p: write(p, a=b"x" * 90), {"validation_share": 0.01}, "1 held-out bytes are fewer than one sequence"),
        (lambda p: write(p) or (p / "a").symlink_to("nowhere"), {}, "/a: is not a readable file"),
        (lambda p: write(p) or os.mkfifo(p / "a"), {}, "/a: is not a readable file"),
    ],
    ids=["missing", "empty-folder", "no-match", "empty-files", "short", "short-held-out", "dangling-link", "pipe"],
)
def test_refused(tmp_path, make, fields, message):
    make(tmp_path / "text")
    with pytest.raises(ValueError, match=message) as caught:
        open_corpus(config(tmp_path / "text", **fields))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_unreadable_file(folder, monkeypatch):
    # By a stand-in for the system's answer: root may read every file.
    def refuse(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match="doc00: cannot be read: Permission denied"):
        open_corpus(config(folder))


def test_file_that_shrinks_is_noticed(folder):
    document = open_corpus(config(folder)).training[0]
    document.path.write_bytes(b"x")
    with pytest.raises(ValueError, match="became shorter while training"):
        document.read(0, document.length)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"seq_len": 1}, "seq_len=1 is below 2"),
        ({"sequences_per_step": 0}, "sequences_per_step=0 is below 1"),
        ({"validation_sequences": 0}, "validation_sequences=0 is below 1"),
        ({"validation_share": 0.6}, "validation_share=0.6 is not between 0 and 0.5"),
        ({"path": ""}, "path='' is empty"),
        ({"pattern": ""}, "pattern='' is empty"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
