"""moba-cp config: every key of the dataclasses, with its default, and the page made of them."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from moba_cp import cli
from moba_cp.train.config import TrainConfig
from moba_cp.train.config_keys import all_keys, as_markdown

ROOT = Path(__file__).parents[2]


def fields_of(cls, prefix=""):
    """(path, default) of every key by the classes themselves."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        nested = [x for x in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(x)]
        is_list = typing.get_origin(hints[field.name]) is tuple
        yield prefix + field.name, field.default
        for kind in nested:
            yield from fields_of(kind, f"{prefix}{field.name}{'[]' if is_list else ''}.")


def test_keys_and_defaults_are_those_of_the_classes():
    keys = {key.path: key for key in all_keys()}
    expected = dict(fields_of(TrainConfig))
    assert list(keys) == list(expected) and len(keys) > 70
    for path, default in expected.items():
        assert keys[path].meaning.endswith((".", ")", '"')) and len(keys[path].meaning) > 5, path
        if default is not dataclasses.MISSING:
            shown = yaml.safe_load(keys[path].default)
            assert shown == (list(default) if isinstance(default, tuple) else default) or str(default) == str(shown), (
                path
            )
        assert keys[path].is_section or keys[path].type


def test_the_page_is_what_the_command_prints():
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == as_markdown(all_keys()), "run: moba-cp config --markdown > docs/config.md"


def test_keys_are_explained_without_pytorch():
    script = "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'yaml'])); from moba_cp import cli; " \
             "sys.exit(cli.main(['config', '--section', 'optimizer']))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "optimizer.lr = 0.001    (number)" in done.stdout, done.stderr
    assert "model." not in done.stdout


def test_a_config_is_printed_with_all_that_it_leaves_out(capsys):
    assert cli.main(["config", "demo", "--set", "attention.top_k=7"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["attention"]["top_k"] == 7 and shown["run"]["seed"] == 0 and shown["model"]["n_layers"] == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--section", "nothing"], "--section=nothing: no such section or key; use one of model, attention"),
        (["--set", "run.seed=1"], "--set without CONFIG"),
        (["demo", "--section", "run"], "CONFIG with --section or --markdown"),
        (["demo", "--set", "run.sed=1"], "run.sed: unknown key; did you mean seed?"),
    ],
)
def test_mistakes_get_one_line(capsys, arguments, message):
    assert cli.main(["config", *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
