"""Which files are documents, which of them are held out, and what is refused."""

import gzip
import os
from pathlib import Path

import pytest

from moba_cp.data.config import DataConfig
from moba_cp.data.text import open_corpus

GZIP = gzip.compress(b"some text that is longer than its header", mtime=0)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


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
    write(tmp_path / "text", **{f"doc{i:02}": bytes([65 + i]) * (10 + i) for i in range(20)})
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
    data = bytes(range(1, 201))
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
        (lambda p: write(p, a=b"x" * 90), {"validation_share": 0.01}, "1 validation bytes are fewer than one sequence"),
        (
            lambda p: write(p) or (p / "a").symlink_to("nowhere"),
            {"not_text": "refuse"},
            "/a: not readable, no text; remo",
        ),
        (lambda p: write(p) or os.mkfifo(p / "a"), {"not_text": "refuse"}, "/a: not readable, no text; remove"),
        (
            lambda p: write(p, a=b"x" * 99, b=GZIP),
            {"not_text": "refuse"},
            "/b: gzip, no text; remove it, narrow data.pa",
        ),
        (lambda p: write(p, a=GZIP), {}, "gzip, no text; give text, or set data.not_text: take"),
        (lambda p: write(p, a=GZIP, b=PNG), {}, r"none of 2 files is text \(1 gzip, 1 PNG\); give text, or set"),
    ],
    ids=[
        "missing",
        "empty-folder",
        "no-match",
        "empty-files",
        "short",
        "short-held-out",
        "dangling-link",
        "pipe",
        "gzip",
        "one",
        "none",
    ],
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
    with pytest.raises(ValueError, match=r"none of 20 files is text \(20 not readable\)"):
        open_corpus(config(folder))


def test_what_is_no_text_is_left_out_and_counted(folder):
    whole = open_corpus(config(folder))
    write(folder, **{"a.gz": GZIP, "b.gz": GZIP, "c.png": PNG, "d.txt": "text".encode("utf-16"), "e.bin": b"ab\0cd"})
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    corpus = open_corpus(config(folder))
    assert dict(corpus.left_out) == {"gzip": 2, "not readable": 2, "PNG": 1, "UTF-16": 1, "binary": 1}
    assert (corpus.training, corpus.validation, corpus.fingerprint) == (
        whole.training, whole.validation, whole.fingerprint
    )  # fmt: skip
    taken = open_corpus(config(folder, not_text="take"))
    assert taken.left_out == (("not readable", 2),) and len(taken.training + taken.validation) == 25


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_text_of_any_one_byte_encoding_is_text(folder, encoding):
    write(folder, umlauts="größer, schöner".encode(encoding))
    corpus = open_corpus(config(folder))
    assert corpus.left_out == () and "umlauts" in names(corpus.training + corpus.validation)


def test_json_lines_are_taken_and_counted(folder):
    write(
        folder, **{"a.jsonl": b'{"text": "x"}\n{"text": "y"}\n', "b.txt": b"{braces} are text\n", "c.json": b'{"a": 1}'}
    )
    assert open_corpus(config(folder)).json_lines == 2


def test_folders_of_runs_are_no_data(folder):
    """Neither that of the run itself, whatever it holds by now, nor those of earlier ones."""
    whole = open_corpus(config(folder))
    write(folder / "run" / "checkpoints" / "step-00000001", **{"meta.json": b"x" * 99, "shard": b"y" * 99})
    write(folder / "earlier" / "run", **{"log.jsonl": b"x" * 99, "config.yaml": b"a: 1", "versions.json": b"{}"})
    assert open_corpus(config(folder), folder / "run") == whole


def test_the_folder_of_the_run_is_not_its_data(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    for run in (folder, tmp_path / "link"):
        with pytest.raises(ValueError, match="is run.directory too, where the run writes; name another folder for the"):
            open_corpus(config(folder), run)


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
