"""Files as people have them: signatures, damage, names that are no text, rows that are no UTF-8."""

import bz2
import errno
import gzip
import io
import os

import pyarrow
import pytest
from pyarrow import parquet

from moba_cp import cli
from moba_cp.data.build import BuildOptions, build
from moba_cp.data.indexed import IndexedDocuments


def _built(folder, **options):
    """The texts that a build of ``folder`` makes, and its report."""
    prefix = folder.parent / "out"
    report = build(BuildOptions((str(folder),), str(prefix), **options), 1)
    documents = IndexedDocuments(prefix)
    return [bytes(documents.read(i, 0, n)).decode() for i, n in enumerate(documents.lengths)], report


def test_a_signature_in_front_of_utf_8_is_no_text(tmp_path):
    signature, lines = b"\xef\xbb\xbf", b'{"text": "one"}\n{"text": "two"}\n'
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(signature + lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(signature + lines))
    (folder / "c.txt").write_bytes(signature + b"three")
    (folder / "d.txt").write_bytes(signature)
    texts, report = _built(folder)
    assert texts == ["one", "two", "one", "two", "three"] and report.reasons == {"empty document": 1}


def _damaged(kind: str) -> bytes:
    lines = b'{"text": "one"}\n' * 1000
    if kind == "parquet":
        stream = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": [f"{i} and more" for i in range(1000)]}), stream)
        return stream.getvalue()[:100] + bytes(200) + stream.getvalue()[300:]
    return {"gz": gzip.compress(lines)[:-20], "other.gz": b"no gzip", "bz2": bz2.compress(lines)[:-9]}[kind]


@pytest.mark.parametrize("kind", ["gz", "other.gz", "bz2", "parquet"])
def test_a_damaged_file_is_named(tmp_path, capsys, kind):
    """Among many files nobody could tell which one it is."""
    (tmp_path / "in").mkdir()
    name = f"b.{kind}" if kind == "parquet" else f"b.jsonl.{kind.split('.')[-1]}"
    (tmp_path / "in" / name).write_bytes(_damaged(kind))
    (tmp_path / "in" / "a.txt").write_text("good text")
    assert cli.main(["data", "build", str(tmp_path / "in"), "--to", str(tmp_path / "a"), "--workers", "1"]) == 2
    shown = capsys.readouterr().err
    assert f"in/{name}: damaged or cut off (" in shown and shown.count("\n") == 1


@pytest.mark.parametrize("kind", ["binary", "string", "dictionary"])
def test_rows_of_parquet_that_are_no_utf_8_are_named(tmp_path, kind):
    texts = pyarrow.array([b"good", b"one\ntwo\n\xff", b"", None, b"last"], pyarrow.binary())
    if kind != "binary":
        texts = texts.view(pyarrow.string())
    if kind == "dictionary":
        texts = texts.dictionary_encode()
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "in" / "a.parquet")
    found, report = _built(tmp_path / "in")
    assert found == ["good", "last"]
    said = [line.partition("a.parquet")[2] for line in report.named]
    assert said == [
        ":2: not UTF-8 (byte 0xff at column 1)", ":3: empty document", ":4: field 'text' holds null, not text",
    ]  # fmt: skip


def test_names_of_files_that_are_no_text(tmp_path, capsys):
    """In a list of what was left out, which is written after hours."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.jsonl")).write_text('{"text": "one"}\nbad\n')
    assert cli.main(["data", "build", str(folder), "--to", str(tmp_path / "a"), "--workers", "1"]) == 0
    assert b"in/\xff.jsonl:2: no JSON" in (tmp_path / "a.bad.txt").read_bytes()
    assert "in/\\udcff.jsonl:2: no JSON" in capsys.readouterr().out


def test_suffixes_in_capitals(tmp_path):
    folder, lines = tmp_path / "in", b'{"text": "one"}\n'
    folder.mkdir()
    (folder / "A.JSONL").write_bytes(lines)
    (folder / "B.JSON.GZ").write_bytes(gzip.compress(lines))
    parquet.write_table(pyarrow.table({"text": ["two"]}), folder / "C.PARQUET")
    assert _built(folder)[0] == ["one", "one", "two"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, capsys, monkeypatch):
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("text")

    def scan(folder, scandir=os.scandir):
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    assert cli.main(["data", "build", str(tmp_path / "in"), "--to", str(tmp_path / "a"), "--workers", "1"]) == 2
    assert "in/closed: Permission denied" in capsys.readouterr().err
