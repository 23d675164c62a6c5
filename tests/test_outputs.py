"""What commands write is checked before they work: missing folders, other people's files, and what is there already."""

import argparse
import importlib
import os

import pytest

from moba_cp import cli
from moba_cp.outputs import check_new, check_writable, output_file


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a document in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "text.txt").write_text("a document")
    (tmp_path / "folder.json").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "name, says",
    [
        ("text.txt", "'text.txt' does not end in .json"),
        ("new/x.json", "there is no folder 'new'; make it first"),
        ("folder.json", "'folder.json' is a folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(here, monkeypatch, name, says):
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        output_file(".json")(name)
    assert output_file(".json")("x.JSON").name == "x.JSON" and not (here / "x.JSON").exists()
    # The first rank writes; on the machine of another one the folder need not be there.
    monkeypatch.setenv("RANK", "1")
    assert output_file(".json")("new/x.json").name == "x.json"


def test_a_pipe_may_have_any_name(here):
    os.mkfifo(here / "pipe")
    for name in ("pipe", "/dev/null"):
        assert str(output_file(".json")(name)) == name


WRITTEN = ("--json", "--chart", "--plot", "--picture", "--profile")


def _output_options() -> list[tuple[str, str]]:
    """Every command's options that name a file which is written at the end."""
    found = [("plot", "--to")]
    for words, (module, _) in cli.COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        named = [(action, option) for action in parser._actions for option in action.option_strings]
        found += [(words, option) for action, option in named if option in WRITTEN and action.nargs != 0]
    return found


@pytest.mark.parametrize("words, option", _output_options())
def test_no_command_works_for_a_file_that_it_cannot_write(here, capsys, words, option):
    """The line is parsed first, so it comes before anything else that is wrong."""
    for suffix in (".json", ".png", ".txt"):
        assert cli.main([*words.split(), option, f"new/x{suffix}"]) == 2
    shown = capsys.readouterr().err
    assert shown.count(f"argument {option}: 'new/x") == shown.count("\n") == 3
    assert shown.count("there is no folder 'new'") == 1 and shown.count("does not end in") == 2


def test_a_folder_that_cannot_be_written_is_refused_and_not_made(here, monkeypatch):
    with pytest.raises(ValueError, match="^--to=text.txt: is a file; name a folder"):
        check_writable("--to", here.relative_to(here) / "text.txt")
    with pytest.raises(ValueError, match="/text.txt is a file; name a folder"):
        check_writable("--to", here / "text.txt" / "a" / "b")
    check_writable("--to", here / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"{here} is not writable; name another folder"):
        check_writable("--to", here / "a" / "b")
    assert not (here / "a").exists()


def test_a_folder_with_files_takes_a_model_only_on_request(here):
    check_new("--to", here / "new", False)
    check_new("--to", here / "folder.json", False)
    check_new("--to", here, True)
    with pytest.raises(ValueError, match="holds files; name another folder, or replace a model in it"):
        check_new("--to", here, False)
