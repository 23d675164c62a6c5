"""docs/transformers.md, the README's section and the example, as printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moba_cp import cli
from tests.helpers.data_files import write_tokenizer
from tests.helpers.distributed import TIME_SCALE
from tests.helpers.hf_models import tiny, tokens

ROOT = Path(__file__).parents[2]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The working directory has a folder ``model`` with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=400).float().save_pretrained("model")
    write_tokenizer(Path("model"))


def test_the_page(model, capsys):
    page = (ROOT / "docs" / "transformers.md").read_text()
    names = {}
    for block in _blocks(page, "python"):
        exec(block, names)
    assert names["model"].lm_head.weight.grad.isfinite().all() and names["out"].shape == (1, 1, 8, 32)
    assert names["answer"].shape == (1, names["n"] + 20)
    Path("prompt.txt").write_text("a few words")
    (command,) = [line for block in _blocks(page, "bash") for line in block.splitlines() if line.startswith("moba-cp")]
    assert cli.main(shlex.split(command)[1:]) == 0
    assert "answer: 20 tokens" in capsys.readouterr().err


def test_the_readme(model):
    text = (ROOT / "README.md").read_text().split("\n## In transformers\n")[1]
    example = _blocks(text, "python")[0]
    assert len(example.strip().splitlines()) <= 10
    names = {"group": None, "ids": tokens(1, 200)}
    exec(example, names)
    assert names["answer"].shape == (1, 220)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example(tmp_path, ranks):
    text = tmp_path / "book.txt"
    text.write_text("def one(x): return x + 1\n" * 200)
    command = [str(ROOT / "examples" / "transformers_long.py"), "--text", str(text), "--seq-len", "600", "--steps", "4"]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200 * TIME_SCALE
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"step \d+: loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] < 6, done.stdout
