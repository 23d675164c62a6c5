"""Configs and data that chance has damaged: never a traceback, and always the name of what is wrong.

By default some of each; ``MOBA_CP_TEST_CASES=600`` draws more.
"""

import os
import random
from pathlib import Path

import pytest
import yaml

from moba_cp import cli
from moba_cp.train.config import TrainConfig
from moba_cp.train.yaml_config import load, to_dict
from tests.helpers.train_runs import DEMO, SHRUNKEN, write_text

CASES = int(os.environ.get("MOBA_CP_TEST_CASES", "60"))
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 100, 2**31, 2**62, 2**64, 10**40, 0.0, -0.5, 0.5, 1e-300, 1e300,
    float("nan"), float("inf"), "", " ", "a", "null", "nan", "1e3", "moba", "full", "last 1", "last 0", "last 99",
    "~", "~/x", "/", ".", "..", "/dev/null", "/dev/zero", "\0", "\u202e", "x" * 5000, [], [1], [[]], [{}], {}, {"a": 1},
    [{"until": 0.5, "kind": "moba"}, {"kind": "full"}], [{"until": 2}], "2001-01-01",
]  # fmt: skip


YAML_MARKS = [b"[", b"{", b"&a ", b"*a ", b"!!python/object:os.system ", b"\t", b"%", b"'"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_text(tmp_path / "text", 20)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MOBA_CP_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def _shrunken(place) -> dict:
    return to_dict(load(TrainConfig, DEMO, [*SHRUNKEN, f"data.path={place / 'text'}", "run.directory=run"]))


def _damage(config: dict, chance: random.Random) -> list[str]:
    """Change one to three things of ``config``; the keys that were changed."""
    changed = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        section = chance.choice(sorted(config))
        what = chance.random()
        if not isinstance(config[section], dict) or what < 0.05:
            config[section] = chance.choice(VALUES)
            changed.append(section)
        elif what < 0.15:
            key = chance.choice(["", "x", 7, None, "steps ", "Steps", *config[section]]) if config[section] else "x"
            config[section][key if key not in config[section] else f"{key}_"] = 1
            changed.append(str(key).strip())
        elif config[section]:
            key = chance.choice(sorted(config[section], key=str))
            config[section][key] = chance.choice(VALUES)
            changed.append(f"{section}.{key}")
    return changed


def _said(capsys, argv) -> tuple[int, str]:
    code = cli.main(argv)
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return code, shown.err


def test_damaged_configs(place, capsys):
    Path("x.yaml").write_text(yaml.safe_dump(_shrunken(place)), encoding="utf-8")
    assert _said(capsys, ["train", "x.yaml", "--dry-run"])[0] == 0, "nothing is damaged yet"
    refused = 0
    for seed in range(CASES):
        chance, config = random.Random(seed), _shrunken(place)
        changed = _damage(config, chance)
        Path("x.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        code, said = _said(capsys, ["train", "x.yaml", "--dry-run", "--ranks", str(chance.choice([1, 2, 3, 8]))])
        assert code in (0, 2), f"seed {seed}, {changed}: {said}"
        if code == 2:
            refused += 1
            assert said.count("\n") == 1 and len(said) < 1000, f"seed {seed}: {said}"
            # The key that was changed, or one that no longer fits it.
            named = [f"{section}{mark}" for section in config for mark in ".="]
            assert any(x in said for x in [*changed, *named, "config=", "x.yaml"]), f"seed {seed}, {changed}: {said}"
    assert CASES / 3 < refused, f"{refused} of {CASES} were refused"
    assert {path.name for path in Path.cwd().iterdir()} == {"x.yaml"}


def test_damaged_files(place, capsys):
    """Bytes of a YAML file flipped, cut out, doubled."""
    whole = DEMO.read_bytes()
    for seed in range(CASES):
        chance, data = random.Random(1000 + seed), bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 5])):
            at = chance.randrange(len(data))
            what = chance.randrange(4)
            if what == 0:
                data[at] = chance.randrange(256)
            elif what == 1:
                del data[at : at + chance.choice([1, 5, 100])]
            elif what == 2:
                data[at:at] = data[at : at + chance.choice([1, 30, 300])]
            else:
                data[at:at] = chance.choice(YAML_MARKS)
        Path("x.yaml").write_bytes(data)
        code, said = _said(capsys, ["train", "x.yaml", "--dry-run", "--set", f"data.path={place / 'text'}",
                                    "--set", "data.seq_len=256", "--set", "data.validation_share=0.2"])  # fmt: skip
        assert code in (0, 2), f"seed {seed}: {said}"
        named = any(x in said for x in ("x.yaml", "unknown key", "."))
        assert code == 0 or (named and said.count("\n") == 1), f"seed {seed}: {said}"


def _file(path: Path, chance: random.Random) -> None:
    """Make something at ``path``: text, noise, a link to nothing, a pipe, a folder, a file with a huge hole."""
    size, kind = chance.choice([0, 1, 300]), chance.randrange(8)
    if kind == 0:
        path.symlink_to("nowhere")
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        with open(path, "wb") as file:
            file.write(b"text " * 20_000)
            file.truncate(10**12)
    else:
        content = chance.randbytes(size), b"some text. " * size, b"\x1f\x8b" + bytes(size)
        path.write_bytes(chance.choice(content))


def test_damaged_data(place, capsys):
    """Folders of files of chance bytes: what cannot be used is left out or refused by name."""
    refused, cases = 0, max(20, CASES // 3)
    for seed in range(cases):
        chance, folder = random.Random(2000 + seed), place / f"data{seed}"
        folder.mkdir()
        for number in range(chance.randrange(1, 6)):
            path = folder / chance.choice(["a", ".b", "c.txt", "\udcff", "d" * 200, f"e{number}"])
            if not (path.exists() or path.is_symlink()):
                _file(path, chance)
        for name in ("good", "better") if seed % 2 else ():
            (folder / name).write_text(f"{name} words. " * 500)
        settings = [f"data.path={folder}", "data.seq_len=64", "data.validation_share=0.2"]
        settings.append(f"data.not_text={chance.choice(['skip', 'refuse', 'take'])}")
        words = [word for setting in settings for word in ("--set", setting)]
        code, said = _said(capsys, ["train", str(DEMO), "--dry-run", *words])
        assert code in (0, 2), f"seed {seed}: {said}"
        named = str(folder) in said or "data.seq_len=64" in said
        assert code == 0 or (named and said.count("\n") == 1), f"seed {seed}: {said}"
        refused += code == 2
    assert 0 < refused < cases
