"""``moba-cp generate``: runs and folders of Hugging Face's answer prompts."""

import argparse
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from moba_cp import cli
from moba_cp.hf import use_moba
from moba_cp.hf.answer import answer
from moba_cp.train.generate_command import _Printer, _prompt
from tests.helpers.data_files import write_tokenizer
from tests.helpers.hf_models import tiny, tokens
from tests.helpers.train_runs import train, write_text

PROMPT = "def return self value for in range import None raise() " * 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a byte model, with its last layer full, and its export."""
    folder = tmp_path_factory.mktemp("generate")
    write_text(folder / "text")
    train(1, ([f"data.path={folder / 'text'}", f"run.directory={folder / 'run'}", "run.steps=12"], None))
    assert cli.main(["export", str(folder / "run"), "--to", str(folder / "exported")]) == 0
    (folder / "prompt.txt").write_text(PROMPT)
    return folder


def _answer(capsys, *words: str) -> str:
    capsys.readouterr()
    assert cli.main(["generate", *words, "--device", "cpu"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "prompt: 330 tokens in " in printed.err and "a second" in printed.err
    return printed.out[:-1]


def test_a_run_and_its_export_answer_alike(run, capsys):
    expected = AutoModelForCausalLM.from_pretrained(run / "exported", attn_implementation="moba").eval()
    ids = torch.tensor([list(PROMPT.encode())])
    whole = expected.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, use_cache=False
    )
    text = bytes(whole[0, 330:].tolist()).decode("utf-8", "replace")
    file = ["--prompt-file", str(run / "prompt.txt"), "--max-tokens", "24"]
    for model in ("run", "exported"):
        for piece in ("16384", "100"):
            assert _answer(capsys, str(run / model), *file, "--piece", piece) == text
    assert text.isprintable() and len(text) == 24


def test_attention_is_as_asked_for(run, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "moba_cp.hf.use_moba", lambda model, **options: seen.append(options) or use_moba(model, **options)
    )
    model, prompt = str(run / "run"), ["--prompt", PROMPT, "--max-tokens", "3"]
    for words in ([], ["--attention", "full"], ["--decoding", "full"], ["--top-k", "2"]):
        _answer(capsys, model, *prompt, *words)
    trained = {"block_size": 16, "top_k": 3, "full_layers": [2]}
    assert seen == [
        trained, trained | {"full_layers": [1, 2]}, trained | {"decoding": "full"}, trained | {"top_k": 2}
    ]  # fmt: skip


def test_drawn_tokens_follow_the_seed(run, capsys):
    words = [str(run / "run"), "--prompt", PROMPT, "--max-tokens", "20", "--temperature", "1.5", "--seed"]
    first, again, other = (_answer(capsys, *words, seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_a_folder_that_says_nothing_of_moba(tmp_path, capsys):
    """Full attention, its tokenizer, and an end."""
    write_tokenizer(tmp_path / "model")
    model = tiny(vocab_size=400).float()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    words = ["generate", str(tmp_path / "model"), "--prompt", "a few words of a prompt", "--device", "cpu"]
    assert cli.main([*words, "--max-tokens", "5"]) == 0
    full = capsys.readouterr().out
    assert cli.main([*words, "--max-tokens", "5", "--attention", "moba", "--block-size", "16", "--top-k", "64"]) == 0
    assert capsys.readouterr().out == full, "all blocks"
    assert cli.main([*words, "--attention", "moba"]) == 2
    assert "says no block size and top-k; give --block-size and --top-k" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        (["nowhere", "--prompt", "x"], "nowhere"),
        (["RUN", "--prompt", ""], "the prompt is empty"),
        (["RUN", "--prompt", "x", "--prompt-file", "y"], "not allowed with"),
        (["RUN"], "one of the arguments --prompt-file --prompt is required"),
        (["RUN", "--prompt-file", "missing.txt"], "missing.txt: no such file"),
        (["RUN", "--prompt", "x", "--max-tokens", "0"], "max_tokens=0 is not above 0"),
        (["RUN", "--prompt", "x", "--top-p", "0"], "top_p=0.0"),
        (["RUN", "--prompt", "x", "--device", "gpu"], "--device=gpu: not known; use cpu, cuda"),
        (["RUN", "--prompt", "x", "--device", "cuda:99"], "--device=cuda:99: PyTorch finds "),
        (["RUN", "--prompt", "x", "--attention", "full", "--decoding", "moba"], "--decoding=moba with full attention"),
    ],
)
def test_wrong_options_are_one_line(run, words, says, capsys):
    capsys.readouterr()
    assert cli.main(["generate", *[str(run / "run") if x == "RUN" else x for x in words]]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1


def test_characters_of_several_tokens_are_written_whole(capsys):
    printer = _Printer(lambda x: bytes(x.tolist()).decode("utf-8", "replace"), [0])
    for i, token in enumerate("aé\n世界".encode() + b"\0"):
        printer.add(token)
        if i == 1:
            assert capsys.readouterr().out == "a"
    printer.close()
    assert capsys.readouterr().out == "é\n世界\n" and len(printer.times) == 11


def test_spaces_behind_line_breaks_are_written(capsys):
    """Of tokenizers whose first token loses its space."""
    pieces = ["def", " x", "\n", "   ", " y", "\n"]
    printer = _Printer(lambda x: "".join(pieces[i] for i in x.tolist()).removeprefix(" "), [])
    for token in (1, 2, 3, 0, 4, 2, 2, 4):
        printer.add(token)
    printer.close()
    assert capsys.readouterr().out == "x\n   def y\n\n y\n"


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_line_breaks_of_a_prompt_stay(tmp_path, monkeypatch, source):
    """They are tokens; text mode would read all of them as line feeds."""
    data = "one\r\ntwo\rthree\u2028é\n"
    (tmp_path / "prompt.txt").write_bytes(data.encode())
    named = str(tmp_path / "prompt.txt")
    if source == "stdin":
        named = "-"
        monkeypatch.setattr(sys, "stdin", open(tmp_path / "prompt.txt", encoding="utf-8"))
    assert _prompt(argparse.Namespace(prompt=None, prompt_file=named)) == data
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    if source == "stdin":
        monkeypatch.setattr(sys, "stdin", open(tmp_path / "prompt.txt", encoding="utf-8"))
    with pytest.raises(ValueError, match="not UTF-8 at byte 3"):
        _prompt(argparse.Namespace(prompt=None, prompt_file=named))


def test_a_model_s_own_settings_do_not_count():
    """Greedy is the likeliest token, and a temperature draws from all of them."""
    model, prompt = use_moba(tiny(), 16, 3), tokens(1, 40)[0]
    expected = prompt[None]
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    settings = model.generation_config
    settings.repetition_penalty, settings.eos_token_id, settings.min_new_tokens = 5.0, expected[0, 44].item(), 2
    assert torch.equal(answer(model, prompt, 12), expected[0, 40:])
    torch.manual_seed(0)
    drawn = torch.cat([prompt, answer(model, prompt, 100, temperature=1e6)])
    with torch.no_grad():
        logits = model(drawn[None], use_cache=False).logits[0, 39:-1]
    rank = (logits > logits.gather(1, drawn[40:, None])).sum(1)
    assert len(rank) == 100 and rank.max() >= 50 and model.generation_config is settings


def test_answer_streams_and_ends():
    model = use_moba(tiny(), 16, 3)
    prompt, seen = tokens(1, 70)[0], []
    out = answer(model, prompt, max_tokens=9, on_token=seen.append)
    assert out.tolist() == seen and len(seen) == 9
    cut = answer(model, prompt, max_tokens=9, end=[seen[4], 1000])
    assert cut.tolist() == seen[: seen.index(seen[4]) + 1]
    with pytest.raises(ValueError, match=r"prompt has shape \(1, 70\)"):
        answer(model, prompt[None])


def test_transformers_is_named_where_it_is_missing(monkeypatch, capsys, run):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *x: None if name == "transformers" else find(name, *x)
    )
    for name in [name for name in sys.modules if name.startswith("moba_cp.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("moba_cp.hf", raising=False)
    assert cli.main(["generate", str(run / "run"), "--prompt", "x"]) == 1
    assert "needs the package transformers; install with: pip install" in capsys.readouterr().err
