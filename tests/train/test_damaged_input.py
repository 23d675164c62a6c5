"""Whatever a config or a path holds, what is said is one line that names it."""

import os
from pathlib import Path

import pytest

from moba_cp import cli
from moba_cp.train.config import TrainConfig
from moba_cp.train.yaml_config import build, load
from tests.helpers.train_runs import DEMO, SHRUNKEN, write_text


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_text(tmp_path / "text", 20)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MOBA_CP_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "override, message",
    [
        ("run.directory=a\0b", "run.directory='a\\x00b': holds a zero byte; leave it out"),
        ("data.path=a\0b", "data.path='a\\x00b': holds a zero byte"),
        ("run.directory=~nobody-here/x", "run.directory='~nobody-here/x' names a home folder that is not known"),
        (f"run.steps={10**30}", "run.steps=1000000000000000000000000000000: beyond 2**63; give a smaller number"),
        (f"run.context_size=-{10**30}", "beyond 2**63; give a smaller number"),
        (f"run.steps={'9' * 5000}", "--set run.steps=999"),
        ("run.timeout_seconds=1e300", "run.timeout_seconds=1e+300 is more than a year; 300 is usual"),
        (f"run.steps={'[' * 5000}", "--set run.steps=[[["),
        ("run.steps=2001-02-30", "--set run.steps=2001-02-30: "),
    ],
)
def test_values_at_the_edge(place, capsys, override, message):
    words = [word for setting in (*SHRUNKEN, f"data.path={place / 'text'}", override) for word in ("--set", setting)]
    assert cli.main(["train", str(DEMO), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said and len(said) < 500, said
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 20_000, "nested too deeply"),
        ("run: {steps: " + "9" * 5000 + "}", "Exceeds the limit"),
        ("a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nrun: {steps: [*c, *c, *c]}", "a: unknown key"),
        ("run:\n  steps: &a [" + "1, " * 40 + "1]", "run.steps=[1, 1, 1, 1, 1, 1, ...]: expected a whole number"),
        ("run: {steps: 2001-02-30}", "day is out of range"),
    ],
    ids=["deep", "digits", "aliases", "long", "date"],
)
def test_files_at_the_edge(place, capsys, text, message):
    Path("x.yaml").write_text(text)
    assert cli.main(["train", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said and ("x.yaml" in said or "unknown" in said or "run." in said)


def test_a_pipe_as_config_is_refused_at_once(place, capsys):
    os.mkfifo("x.yaml")
    assert cli.main(["train", "x.yaml"]) == 2
    assert "x.yaml: is a pipe or a device; give a YAML file" in capsys.readouterr().err


def test_the_home_folder_and_this_one_are_folders_of_runs(place, capsys):
    """A tilde that no shell has replaced is the home folder, and a chart in `.` has a name."""
    config = build(TrainConfig, {"run": {"directory": "~/run", "start_from": "~"}})
    assert config.run.directory == f"{place}/home/run" and config.run.start_from == f"{place}/home"
    settings = [*SHRUNKEN, f"data.path={place / 'text'}", "run.directory=.", "run.steps=1", "run.validate_every=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(["train", str(DEMO), *words]) == 0
    assert {path.name for path in Path.cwd().iterdir()} == {
        "log.jsonl", "config.yaml", "versions.json", "loss.png", "checkpoints"
    }  # fmt: skip
    assert load(TrainConfig, "config.yaml").run.directory == "."


def test_matplotlib_is_missed_before_the_run_not_after(place, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["train", str(DEMO)]) == cli.BUG
    assert "needs the package matplotlib; install with: " in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())
