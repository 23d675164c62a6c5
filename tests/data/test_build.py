"""Documents into tokens: those of the tokenizers library, in files that Megatron reads, whatever stops in between."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer

from moba_cp import cli
from moba_cp.data import build as build_module
from moba_cp.data.build import BuildOptions, build
from moba_cp.data.config import DataConfig
from moba_cp.data.corpus import open_corpora
from moba_cp.data.encode import TokenizerEncoder
from moba_cp.data.fast import fast_encoder
from moba_cp.data.indexed import IndexedDocuments
from moba_cp.data.inputs import Bad, find_units, first_line_of, lines_in, read_unit
from tests.helpers.data_files import END, TEXTS, write_jsonl, write_tokenizer
from tests.helpers.distributed import TIME_SCALE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of tokenizers by their structure."""
    base = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_tokenizer(base / kind, kind) for kind in ("gpt2", "llama3", "qwen2")}


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen2"])
def test_fast_tokens_are_those_of_the_tokenizers_library(tokenizers, kind):
    pytest.importorskip("gigatoken", reason="comes with the extra data")
    tokenizer = Tokenizer.from_file(str(tokenizers[kind] / "tokenizer.json"))
    encode = fast_encoder(tokenizer)
    every = "".join(chr(c) for c in range(1, 0x3000)) + "".join(chr(c) + "a " for c in range(0x1F000, 0x1F100))
    added = [f"a {END} b", f"{END}{END}é{END}\u0301 x", END[:-1]]
    chance = random.Random(0)
    alphabet = [*"aZ 's'T\n\r\t1é\u0301\u0323\u200d\u00a0\u0344中한.,!{", "\r\n", "  ", "👩", "'Re", "ﬁ"]
    drawn = ["".join(chance.choices(alphabet, k=chance.randrange(1, 200))) for _ in range(300)]
    for text in [*TEXTS, *added, *drawn, every, "", " ", "\n", "  x", "a" * 300, "\0"]:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        for _ in range(2):
            assert encode(text).tolist() == expected, text[:80]


def test_other_tokenizers_are_left_to_the_library(tokenizers, tmp_path):
    description = json.loads((tokenizers["gpt2"] / "tokenizer.json").read_text())
    for name, value in (
        # gigatoken takes this one, and gives other tokens.
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("normalizer", {"type": "Lowercase"}),
    ):
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(description | {name: value}))
        tokenizer = Tokenizer.from_file(str(file))
        assert fast_encoder(tokenizer) is None
        encoder = TokenizerEncoder(file)
        assert encoder.encode("The quick").tolist() == tokenizer.encode("The quick").ids


def test_without_gigatoken_the_library_does_it(tokenizers, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encoder = TokenizerEncoder(tokenizers["llama3"], end="none")
    assert encoder.encode(TEXTS[0]).tolist() == encoder.tokenizer.encode(TEXTS[0]).ids
    assert encoder._fast is None


def test_other_tokens_in_a_unit_are_noticed_and_the_library_goes_on(tokenizers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moba_cp.data.fast.fast_encoder", lambda tokenizer: lambda text: np.array([1], np.uint32))
    write_jsonl(tmp_path / "a.jsonl", 5)
    made = build(BuildOptions((str(tmp_path / "a.jsonl"),), str(tmp_path / "a"), str(tokenizers["gpt2"])), 1)
    assert made.tokens > 100 and "more slowly" in capsys.readouterr().err


def test_files_are_megatrons(tokenizers, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    texts = write_jsonl(tmp_path / "in" / "a.jsonl", 30)
    build(BuildOptions((str(tmp_path / "in"),), str(tmp_path / "out" / "a.v1"), str(tokenizers["llama3"])), 1)
    tokenizer = Tokenizer.from_file(str(tokenizers["llama3"] / "tokenizer.json"))
    theirs = IndexedDataset(str(tmp_path / "out" / "a.v1"))
    ours = IndexedDocuments(tmp_path / "out" / "a.v1")
    assert len(theirs) == len(ours) == 30 and ours.dtype == np.uint16
    end = tokenizer.token_to_id(END)
    for i, text in enumerate(texts):
        expected = [*tokenizer.encode(text, add_special_tokens=False).ids, end]
        assert theirs[i].tolist() == ours.read(i, 0, len(expected)).tolist() == expected
    assert theirs.document_indices.tolist() == list(range(31))

    # What Megatron writes, documents of several sentences among it.
    builder = IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=np.int32)
    import torch

    builder.add_document(torch.arange(7), [3, 4])
    builder.add_document(torch.arange(100_000, 100_002), [2])
    builder.finalize(str(tmp_path / "b.idx"))
    ours = IndexedDocuments(tmp_path / "b")
    assert ours.lengths.tolist() == [7, 2] and ours.description == {}
    assert ours.read(0, 2, 7).tolist() == [2, 3, 4, 5, 6] and ours.read(1, 0, 2).tolist() == [100_000, 100_001]


def test_units_of_any_size_give_the_same(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": "x" * (i * 37 % 90 + 1)}) for i in range(60)]
    lines[7:7] = ["", "   "]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "in" / "b.jsonl").write_text("\n".join(lines[:9]) + "\nbroken\n" + "\n".join(lines[9:20]))
    found = set()
    for size in (17, 100, 1000, 10**6):
        units = find_units([str(tmp_path / "in")], None, size)
        documents, begun, file = [], 0, None
        for unit in units:
            begun, file = (begun if unit.files == file else 0), unit.files
            documents += [
                (Path(file[0]).name, x.line + begun, x.reason if isinstance(x, Bad) else x.text)
                for x in read_unit(unit, "text", None)
            ]
            # The rest of a last line without a line break is a unit without lines.
            assert first_line_of(unit) == begun or not list(read_unit(unit, "text", None))
            begun += lines_in(unit)
        found.add(tuple(documents))
    assert len(found) == 1 and len(documents) == 60 + 18 + 1
    assert ("b.jsonl", 10, "no JSON: Expecting value: line 1 column 1 (char 0)") in documents


BAD = {
    "cut.jsonl": (b'{"text": "good"}\n{"text": "cut o', ":2: no JSON"),
    "field.jsonl": (b'{"text": "good"}\n\n{"txet": "x"}\n', ":3: no field 'text'; there are 'txet'"),
    "list.jsonl": (b"[1]\n", ":1: a JSON list, not an object"),
    "null.jsonl": (b'{"text": null}\n', ":1: field 'text' holds null, not text"),
    "empty.jsonl": (b'{"text": "a"}\n{"text": ""}\n', ":2: empty document"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "b"}\n{"text": "caf\xe9"}\n', ":3: not UTF-8 (byte 0xe9 at column 14)"),
    "half.jsonl": (b'{"text": "\\ud83d x"}\n', ":1: half of a surrogate pair at character 0"),
    "latin.txt": (b"one\ntwo caf\xe9\n", ":2: not UTF-8 (byte 0xe9 at column 8)"),
    "wide.txt": ("text".encode("utf-16"), ":1: UTF-16, not UTF-8"),
    "empty.txt": (b"", ":1: empty document"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_named_and_left_out_or_refused(tmp_path, capsys, name):
    data, said = BAD[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / "z.txt").write_text("good text")
    command = ["data", "build", str(tmp_path / "in"), "--to", str(tmp_path / "a"), "--workers", "1"]
    assert cli.main([*command, "--bad", "refuse"]) == 2
    shown = capsys.readouterr().err
    assert f"in/{name}{said}" in shown and shown.count("\n") == 1 and not (tmp_path / "a.idx").exists()
    assert cli.main(command) == 0
    assert f"in/{name}{said}" in (tmp_path / "a.bad.txt").read_text()
    shown = capsys.readouterr().out
    assert "left out: 1 documents" in shown and said in shown
    assert json.loads((tmp_path / "a.json").read_text())["left_out"] == 1
    assert (tmp_path / "a.lengths.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_but_bad_documents_is_an_error(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("x\n")
    assert cli.main(["data", "build", str(tmp_path / "a.jsonl"), "--to", str(tmp_path / "a"), "--workers", "1"]) == 2
    assert "no document can be used" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_where_tokens_may_lie(tmp_path, capsys, monkeypatch):
    """Not under the name of a folder, which data.path would mean; and a folder of tokens is not read as text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text " * 9)
    command = ["data", "build", "text", "--workers", "1", "--to"]
    for prefix, says in (
        ("text", "--to=text: is a folder"),
        ("text/a.txt/b", "--to=text/a.txt: is a file; name a folder"),
    ):
        assert cli.main([*command, prefix]) == 2 and says in capsys.readouterr().err
    assert cli.main(["data", "build", "nowhere", "--to", "new/tokens"]) == 2 and not (tmp_path / "new").exists()
    assert cli.main([*command, "tokens/text"]) == 0
    with pytest.raises(ValueError, match="data.path=tokens: is a folder with tokens in it; name .*: tokens/text"):
        open_corpora(DataConfig(path="tokens"))


def test_compressed_lines_and_parquet_hold_the_same_documents(tmp_path):
    texts = write_jsonl(tmp_path / "plain" / "a.jsonl", 400)
    lines = (tmp_path / "plain" / "a.jsonl").read_bytes()
    for folder in ("gz", "zst", "parquet"):
        (tmp_path / folder).mkdir()
    (tmp_path / "gz" / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.output_stream(str(tmp_path / "zst" / "a.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines)
    parquet.write_table(pyarrow.table({"n": range(400), "text": texts}), tmp_path / "parquet" / "a.parquet",
                        row_group_size=64)  # fmt: skip
    for folder in ("plain", "gz", "zst", "parquet"):
        build(BuildOptions((str(tmp_path / folder),), str(tmp_path / folder / "out")), 1)
        documents = IndexedDocuments(tmp_path / folder / "out")
        assert [bytes(documents.read(i, 0, n)).decode() for i, n in enumerate(documents.lengths)] == texts


def test_masks_mark_the_tokens_of_the_ranges(tokenizers, tmp_path):
    text = "user: hi\nassistant: naïve answer"
    begin = text.index("naïve")
    records = [{"text": text, "learn": [[begin, len(text)]]}, {"text": "nothing"}, {"text": "x", "learn": [[0, 9]]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for tokenizer, prefix in ((None, "bytes"), (str(tokenizers["gpt2"]), "bpe")):
        options = BuildOptions((str(tmp_path / "a.jsonl"),), str(tmp_path / prefix), tokenizer, mask_field="learn")
        made = build(options, 1)
        assert made.documents == 2 and "no list of [begin, end] within the text's 1 characters" in made.named[0]
        documents = IndexedDocuments(tmp_path / prefix)
        mask = IndexedDocuments(tmp_path / f"{prefix}_mask")
        assert mask.lengths.tolist() == documents.lengths.tolist() and not mask.read(1, 0, mask.lengths[1]).any()
        learned = documents.read(0, 0, documents.lengths[0])[mask.read(0, 0, mask.lengths[0]) == 1]
        if tokenizer is None:
            assert bytes(learned).decode() == "naïve answer"
        else:
            decoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
            # The space before the word is in its token; the document's end is learned with its last word.
            assert decoder.decode(learned.tolist(), skip_special_tokens=False) == " naïve answer" + END


def test_truncated_files_are_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 10)
    build(BuildOptions((str(tmp_path / "a.jsonl"),), str(tmp_path / "a")), 1)
    size = (tmp_path / "a.bin").stat().st_size
    os.truncate(tmp_path / "a.bin", size - 1)
    with pytest.raises(ValueError, match=rf"a\.bin: truncated, {size - 1} of {size} bytes; document 9 is not whole"):
        IndexedDocuments(tmp_path / "a")
    os.truncate(tmp_path / "a.idx", 60)
    with pytest.raises(ValueError, match=r"a\.idx: truncated, 60 of 242 bytes"):
        IndexedDocuments(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(b"something else, and quite long for a header")
    with pytest.raises(ValueError, match=r"a\.idx: not the index of an IndexedDataset"):
        IndexedDocuments(tmp_path / "a")


@pytest.fixture
def small_units(monkeypatch):
    """Many units of a small file."""
    find = build_module.find_units
    monkeypatch.setattr(build_module, "find_units", lambda paths, pattern: find(paths, pattern, 2000))


@pytest.mark.parametrize("stopped_after", [0, 1, 7])
def test_a_stopped_build_goes_on_and_gives_the_same(tokenizers, tmp_path, monkeypatch, small_units, stopped_after):
    write_jsonl(tmp_path / "a.jsonl", 60)
    options = [BuildOptions((str(tmp_path / "a.jsonl"),), str(tmp_path / x), str(tokenizers["qwen2"])) for x in "ab"]
    build(options[0], 1)
    work, done = build_module._work, []

    def counted(unit, folder, index):
        done.append(index)
        if len(done) == stopped_after + 1:
            # What a killed process leaves: tokens without an end.
            (folder / f"{index:07d}.tokens").write_bytes(b"half")
            with open(folder / "tokens.bin", "ab") as stream:
                stream.write(b"not noted as done")
            raise KeyboardInterrupt
        return work(unit, folder, index)

    monkeypatch.setattr(build_module, "_work", counted)
    with pytest.raises(KeyboardInterrupt):
        build(options[1], 1)
    assert not (tmp_path / "b.idx").exists()
    done.append(None)
    first = len(done)
    build(options[1], 1)
    assert done[first] == stopped_after, "what was done is not done again"
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert not (tmp_path / "b.build").exists()


def test_other_inputs_start_anew(tmp_path, monkeypatch, small_units):
    write_jsonl(tmp_path / "a.jsonl", 60)
    options = BuildOptions((str(tmp_path / "a.jsonl"),), str(tmp_path / "a"))
    monkeypatch.setattr(build_module, "_finish", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(options, 1)
    monkeypatch.undo()
    texts = write_jsonl(tmp_path / "a.jsonl", 61)
    assert build(options, 1).text_bytes == sum(map(len, texts))


def test_a_killed_build_ends_its_processes_and_goes_on(tmp_path):
    """SIGKILL of the first process, in the middle: nothing stays running, and the next build gives what one would."""
    write_jsonl(tmp_path / "a.jsonl", 4000)
    slow = (
        "import time, sys; from moba_cp.data import build as b; f = b.find_units; w = b._work\n"
        "b.find_units = lambda paths, pattern: f(paths, pattern, 40_000)\n"
        "def work(*a):\n    time.sleep(0.05)\n    return w(*a)\n"
        "b._work = work\n"
        "import moba_cp.cli as cli\n"
        "if __name__ == '__main__':\n    sys.exit(cli.main(sys.argv[1:]))\n"
    )
    (tmp_path / "slow.py").write_text(slow)
    command = [sys.executable, str(tmp_path / "slow.py"), "data", "build", str(tmp_path / "a.jsonl"), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen([*command, "--to", str(tmp_path / "a")], env=environment, start_new_session=True)
    journal, deadline = tmp_path / "a.build" / "done.jsonl", time.monotonic() + 60 * TIME_SCALE
    while not (journal.is_file() and journal.read_text().count("\n") >= 3):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    while _in_group(running.pid):
        assert time.monotonic() < deadline, "processes of a killed build go on"
        time.sleep(0.05)
    noted = journal.read_text().count("\n")
    for prefix in ("a", "b"):
        done = subprocess.run(
            [*command, "--to", str(tmp_path / prefix)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert noted >= 3 and (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


def _in_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "--to", "a"], "nowhere: no such file or folder"),
        (["a.jsonl", "--to", "a", "--tokenizer", "."], "tokenizer='.': no tokenizer.json there"),
        (["a.jsonl", "--to", "a", "--tokenizer", "a.jsonl"], "a.jsonl: not a tokenizer of Hugging Face's tokenizers"),
        (["a.jsonl", "--to", "a", "--workers", "0"], "--workers=0 is below 1"),
        (["a.jsonl", "a.jsonl", "--to", "a"], "a.jsonl: named twice"),
        (["a.jsonl", "--to", "there"], "--to=there: there.idx is there"),
        (["a.jsonl"], "the following arguments are required: --to"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", 3)
    (tmp_path / "there.idx").touch()
    assert cli.main(["data", "build", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_show_decodes_a_document(tokenizers, tmp_path, capsys):
    texts = write_jsonl(tmp_path / "a.jsonl", 3)
    build(BuildOptions((str(tmp_path / "a.jsonl"),), str(tmp_path / "a"), str(tokenizers["gpt2"])), 1)
    assert cli.main(["data", "show", str(tmp_path / "a"), "--document", "1", "--all"]) == 0
    assert texts[1] + END in capsys.readouterr().out
    assert cli.main(["data", "show", str(tmp_path / "a.bin")]) == 0
    assert "a: 3 documents" in capsys.readouterr().out
    assert cli.main(["data", "show", str(tmp_path / "b")]) == 2
    assert cli.main(["data", "show", str(tmp_path / "a"), "--sequence", "-1"]) == 2
    assert "--sequence=-1 is below 0; they are counted from 0" in capsys.readouterr().err
    assert cli.main(["data", "show", str(tmp_path / "a"), "--document", "3"]) == 2


def test_data_commands_import_no_pytorch():
    script = "import sys; sys.modules['torch'] = None; from moba_cp.data import build, command, encode, report, show"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
