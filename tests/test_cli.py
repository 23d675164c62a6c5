"""The command line: what is run, and the one line that is said about everything that cannot be."""

import argparse
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moba_cp import cli
from moba_cp.train.config import TrainConfig
from moba_cp.train.lock import FolderLock
from moba_cp.train.plan import plan_run
from moba_cp.train.yaml_config import build, load
from tests.helpers.distributed import TIME_SCALE
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, train, write_text

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory with some text beside it."""
    write_text(tmp_path / "text", 20)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MOBA_CP_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def arguments(place, *overrides, flags=()):
    settings = [*SHRUNKEN, f"data.path={place / 'text'}", "run.directory=run", *overrides]
    return ["train", str(DEMO), *(word for setting in settings for word in ("--set", setting)), *flags]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


WRONG_VALUES = [
    ("attention.blocksize=64", "attention.blocksize: unknown key; did you mean block_size?"),
    ("atention.block_size=64", "atention: unknown key; did you mean attention?"),
    ("attention.block_size=many", "attention.block_size='many': expected a whole number, not text"),
    ("attention.block_size=100", "attention.block_size=100 is not a positive multiple of 16; use 96 or 112"),
    ("attention.top_k=0", "attention.top_k=0 is not between 1 and 64"),
    ("attention.top_k=65", "attention.top_k=65 is not between 1 and 64"),
    (
        "attention.layout=diagonal",
        "attention.layout='diagonal': expected one of contiguous, zigzag, zigzag_per_doc",
    ),
    ("attention.full_layers=last 3", "attention.full_layers='last 3' asks for 3 of 2 layers"),
    ("attention.full_layers=[3]", "attention.full_layers=[3] names layer 3, but the model has 2 layers; use numb"),
    ("exchange.mode=ring", "error: exchange.mode='ring': expected one of auto, kv, query, allgather"),
    ("model.n_heads=3", "model.n_kv_heads=2 does not divide n_heads=3"),
    ("model.vocab_size=100", "model.vocab_size=100 is below 256: the tokens are bytes"),
    ("data.path=/nowhere/at/all", "data.path=/nowhere/at/all: no such file or folder"),
    ("data.pattern='*.md'", "no file there matches data.pattern='*.md'"),
    ("data.seq_len=1000000", "bytes to train on are fewer than one sequence, data.seq_len=1000000"),
    ("optimizer.lr=0", "optimizer.lr=0.0 must be above 0 and below 1"),
    ("run.dtype=float16", "run.dtype='float16': did you mean bfloat16? Expected one of float32, bfloat16"),
    ("attention.index={heads: 0}", "attention.index.heads=0 is not a positive integer; use 1 or more"),
    ("attention.schedule=[{until: 2, kind: full}]", "attention.schedule[0].until=2.0 ends the last phase early"),
    ("run.steps=0", "run.steps=0 is below 1"),
    ("run.start_from=nowhere", "run.start_from: nowhere: no checkpoint there"),
    ("run.context_size=3", "run.context_size=3 does not divide the 1 ranks of this run; use one of 1, or null for all"),
    ("run.directory=../text/00.py", "run.directory=../text/00.py: is a file; name a folder"),
    ("run.directory=../text/00.py/a/b", "text/00.py is a file; name a folder"),
    ("run.device=cuda", "run.device='cuda': PyTorch finds no GPU here; use auto or cpu"),
    ("model.n_layers", "--set model.n_layers: expected SECTION.KEY=VALUE"),
]


@pytest.mark.parametrize("override, message", WRONG_VALUES, ids=[override for override, _ in WRONG_VALUES])
def test_a_mistake_gets_one_line_and_leaves_nothing(place, capsys, monkeypatch, override, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = files(place)
    assert cli.main(arguments(place, override)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("moba-cp train: error: ") and shown.err.count("\n") == 1
    assert message in shown.err and "Traceback" not in shown.err
    assert files(place) == before


def test_a_mistake_that_is_very_long_is_shortened(place, capsys):
    assert cli.main(arguments(place, f"data.pattern={'x' * 5000}")) == 2
    shown = capsys.readouterr().err
    assert "data.pattern='xxx" in shown and "xxx...xxx" in shown and len(shown) < 1000


@pytest.mark.parametrize(
    "ranks, override, message",
    [
        (3, "data.seq_len=256", "data.seq_len=256 is not divisible by 2 * cp_size = 6 (zigzag layout); use 258"),
        (3, "data.seq_len=256", "; use 258 or set data.pad_to_multiple: true"),
        (64, "data.seq_len=64", "data.seq_len=64 is not divisible by 2 * cp_size = 128 (zigzag layout); use 128"),
        (8, "run.context_size=2", "data.sequences_per_step=2 is not divisible by the 4 data ranks"),
        (4, "run.context_size=3", "run.context_size=3 does not divide the 4 ranks of this run; use one of 1, 2, 4"),
        (4, "exchange.ranks_per_node=3", "ranks_per_node=3 does not divide the 4 context ranks; use one of 1, 2, 4"),
        (3, "attention.layout=contiguous", "data.seq_len=256 is not divisible by cp_size = 3 (contiguous layout)"),
    ],
)
def test_ranks_that_do_not_fit(place, capsys, ranks, override, message):
    before = files(place)
    assert cli.main(arguments(place, override, flags=("--dry-run", "--ranks", str(ranks)))) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == "" and files(place) == before


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "no.yaml"], "moba-cp train: error: no.yaml: no such file; give a YAML file or one of demo, experi"),
        (["train", "broken.yaml"], "moba-cp train: error: broken.yaml: line 2, column 1: "),
        (["train", "."], "moba-cp train: error: .: is a folder; give a YAML file or one of demo, experi"),
        (["train"], "moba-cp train: error: the following arguments are required: CONFIG; see moba-cp train --help"),
        (["train", "x.yaml", "--dry"], "moba-cp train: error: unrecognized arguments: --dry; see moba-cp train --h"),
        (["train", "x.yaml", "--ranks", "two"], "moba-cp train: error: argument --ranks: invalid int value: 'two'; s"),
        (["tarin", "x.yaml"], "moba-cp: 'tarin x.yaml' is not a command; use one of: train, "),
        (["bench", "attn"], "moba-cp: 'bench attn' is not a command; use one of: bench attention, "),
    ],
)
def test_wrong_files_and_commands(place, capsys, argv, message):
    Path("broken.yaml").write_text("model: {\n")
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message) and shown.err.count("\n") == 1 and files(place / "here") == {"broken.yaml"}


def test_ranks_without_dry_run(place, capsys):
    assert cli.main(arguments(place, flags=("--ranks", "2"))) == 2
    assert "--ranks=2: needs --dry-run" in capsys.readouterr().err


def test_dry_run_prints_the_resolved_config_and_writes_nothing(place, capsys, tmp_path):
    before = files(place)
    assert cli.main(arguments(place, "optimizer.lr=2e-4", flags=("--dry-run", "--ranks", "4"))) == 0
    shown = capsys.readouterr()
    assert files(place) == before and shown.err == ""
    resolved = place / "resolved.yaml"
    resolved.write_text(shown.out)
    config = load(TrainConfig, resolved)
    assert config.optimizer.lr == 2e-4 and config.data.seq_len == 256
    assert set(yaml.safe_load(shown.out)["run"]) >= {"steps", "seed", "timeout_seconds"}
    assert "# ranks: 4 = 1 data x 4 context, 64 tokens of a sequence on each" in shown.out
    assert re.search(r"^# first sequence: '.*(def|return)", shown.out, re.MULTILINE)
    assert re.search(r"# model: [\d.]+ k parameters, 2 layers, full attention in \[2\]", shown.out)


@pytest.mark.parametrize(
    "tokens, ranks, layout, share",
    [(2**20, 1, "zigzag", 2**20), (255, 3, "zigzag", 86), (253, 3, "contiguous", 85)],
)
def test_the_share_of_a_rank_is_shown_in_full(tmp_path, tokens, ranks, layout, share):
    (tmp_path / "text").write_bytes(b"x" * 2**21)
    settings = {"path": str(tmp_path / "text"), "seq_len": tokens, "pad_to_multiple": True, "validation_share": 0.5}
    config = build(TrainConfig, {"data": settings, "attention": {"layout": layout}})
    summary = plan_run(config, ranks).summary()
    assert f"ranks: {ranks} = 1 data x {ranks} context, {share} tokens of a sequence on each" in summary


def test_dry_run_says_where_moba_attends_to_everything(place, capsys):
    for top_k, covers in ((15, False), (16, True)):
        assert cli.main(arguments(place, f"attention.top_k={top_k}", flags=("--dry-run",))) == 0
        note = "# note: attention.top_k=16 blocks of 16 cover data.seq_len=256: MoBA layers attend to everything"
        assert (note in capsys.readouterr().out) is covers


def test_dry_run_shows_what_was_taken_and_left(place, capsys):
    for name, content in {"a.gz": b"\x1f\x8b\x08", "b.jsonl": b'{"text": "x"}\n', "c.bin": b"\0" * 9}.items():
        (place / "text" / name).write_bytes(content)
    (place / "text" / "gone").symlink_to("nowhere")
    assert cli.main(arguments(place, flags=("--dry-run",))) == 0
    shown = capsys.readouterr().out
    assert "# left out: 3 files that are no text (1 gzip, 1 binary, 1 not readable); data.not_text decides" in shown
    assert "# note: 1 files hold JSON lines" in shown
    assert cli.main(arguments(place, "data.pattern=*.py", flags=("--dry-run",))) == 0
    shown = capsys.readouterr().out
    assert "left out" not in shown and "JSON" not in shown


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["train", "dry run"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_starts(place, capsys, monkeypatch, flags):
    before, access = files(place), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK and access(path, mode))
    assert cli.main(arguments(place, "run.directory=runs/a", flags=flags)) == 2
    said = f"run.directory=runs/a: {place / 'here'} is not writable; name another folder, or make it writable\n"
    assert capsys.readouterr().err == f"moba-cp train: error: {said}" and files(place) == before


def test_padding_lets_odd_lengths_through(place, capsys):
    flags = ("--dry-run", "--ranks", "3")
    assert cli.main(arguments(place, "data.seq_len=255", "data.pad_to_multiple=true", flags=flags)) == 0
    assert cli.main(arguments(place, "attention.layout=zigzag_per_document", flags=flags)) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of 2 steps on one rank."""
    place = tmp_path_factory.mktemp("finished")
    write_text(place / "text", 20)
    train(1, ([f"data.path={place / 'text'}", f"run.directory={place / 'run'}", "run.steps=2"], None))
    (place / "cut_off" / "checkpoints").mkdir(parents=True)
    (place / "other").mkdir()
    (place / "other" / "log.jsonl").write_text('{"step": 1}\n')
    return place


@pytest.mark.parametrize(
    "overrides, flags, message",
    [
        ((), (), "holds an earlier run; go on with it (--resume), replace it (--overwrite) or name another folder"),
        ((), ("--resume",), "has done 2 steps and run.steps=2; raise run.steps"),
        (("run.steps=4", "model.hidden_size=64"), ("--resume",), "of another model: model.hidden_size is 32 there"),
        (("run.steps=4",), ("--resume", "elsewhere"), "elsewhere: no checkpoint there"),
        (("run.directory=cut_off",), ("--resume",), "cut_off: its run has saved no checkpoint yet (run.checkpoint_"),
        (("run.steps=4", "run.directory=other"), ("--resume", "run"), "run.directory=other: holds an earlier run"),
        (("run.steps=4",), ("--resume", "--overwrite"), "--overwrite with --resume: one replaces the run that the"),
    ],
    ids=["earlier-run", "nothing-left", "another-model", "no-checkpoint", "cut-off", "another-run", "overwrite"],
)
def test_resume_mistakes_change_nothing(finished, capsys, monkeypatch, overrides, flags, message):
    monkeypatch.chdir(finished)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert cli.main(arguments(finished, "run.steps=2", *overrides, flags=flags)) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_resuming_with_other_settings_says_which(finished, capsys, monkeypatch):
    monkeypatch.chdir(finished)
    changed = ("run.seed=3", "data.seq_len=128", "data.sequences_per_step=4")
    assert cli.main(arguments(finished, "run.steps=4", *changed, flags=("--resume", "--dry-run"))) == 0
    assert capsys.readouterr().err == (
        "note: this run differs from that of run/checkpoints/step-00000002 in data.seq_len (256 there, 128 here), "
        "data.sequences_per_step (2 there, 4 here), run.steps (2 there, 4 here), run.seed (0 there, 3 here)\n"
    )
    assert cli.main(arguments(finished, "run.steps=4", "data.pattern='0*'", flags=("--resume", "--dry-run"))) == 0
    assert "note: run/checkpoints/step-00000002 was trained on other data than " in capsys.readouterr().err


def test_resume_auto_begins_goes_on_and_says_done(place, capsys, monkeypatch):
    """One command line for all calls of a job that is requeued; what a run left that ended early is no obstacle."""
    auto = ("--resume", "auto")
    Path("run").mkdir()
    Path("run", "log.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    assert cli.main(arguments(place, "run.steps=2", flags=auto)) == 0
    assert set(logged(place / "here" / "run")) == {1, 2} and not Path("run", "lock").exists()
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    capsys.readouterr()
    assert cli.main(arguments(place, "run.steps=2", flags=auto)) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("done: all 2 steps of run are done\n") and "checkpoints/step-00000002" in shown
    # The folder itself held the lock meanwhile.
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    with FolderLock(Path("run")):
        assert cli.main(arguments(place, "run.steps=3", "run.timeout_seconds=1", flags=auto)) == 2
    assert "another run is writing there" in capsys.readouterr().err
    assert cli.main(arguments(place, "run.steps=3", flags=auto)) == 0
    assert "resumed from run/checkpoints/step-00000002: 2 of 3 steps are done" in capsys.readouterr().err
    assert set(logged(place / "here" / "run")) == {1, 2, 3}


@pytest.mark.parametrize(
    "given, said",
    [
        ("", "--overwrite"),
        ("--resume", "--resume"),
        ("--resume=there", "--resume=there"),
        ("--set run.steps=9", "--set run.steps=9 --overwrite"),
    ],
)
def test_quickstart_replaces_the_run_unless_it_goes_on(tmp_path, given, said):
    (tmp_path / "bin").mkdir()
    for name, body in {"python": "echo 0", "moba-cp": "exit 0", "torchrun": 'echo "$@"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "launchers" / "quickstart.sh"), *given.split()],
        env=os.environ | {"VENV": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    words = f"--nproc_per_node 2 --no-python {tmp_path}/bin/moba-cp train configs/demo.yaml {said}\n"
    assert done.returncode == 0 and done.stdout.endswith(words), done.stderr


def test_an_error_shows_where_it_comes_from_on_request(place, capsys):
    assert cli.main(arguments(place, "run.steps=0", flags=("--traceback",))) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "package, command",
    [
        ("yaml", f'pip install -c constraints.txt -e ".[train]" in {ROOT}'),
        ("megatron.core", f'pip install -c constraints.txt -e ".[train]" in {ROOT}'),
        ("tokenizers", f'pip install -c constraints.txt -e ".[data]" in {ROOT}'),
        ("no_such_package", "pip install no_such_package"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(place, capsys, monkeypatch, package, command):
    def load(name):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("importlib.import_module", load)
    assert cli.main(["train", "x.yaml"]) == cli.BUG
    said = f"needs the package {package}; install with: {command}\n"
    assert capsys.readouterr().err == f"moba-cp train: error: {said}"


def test_outside_a_checkout_the_hint_names_packages_that_pypi_has(monkeypatch):
    monkeypatch.setattr(cli, "__file__", "/site-packages/moba_cp/cli.py")
    hint = cli._how_to_install("yaml")
    assert hint.startswith("pip install ") and "'pyyaml>=6'" in hint and "'megatron-core>=" in hint
    assert "moba" not in hint and "pytest" not in hint and "torch" not in hint


@pytest.mark.parametrize("words", ["--help", "bench", "bench --help", *(f"{words} --help" for words in cli.COMMANDS)])
def test_help_is_quick_and_needs_no_extra(words):
    """It imports neither PyTorch nor anything that only an extra installs: a fraction of a second instead of five."""
    slow = "torch numpy megatron yaml matplotlib psutil safetensors tokenizers pyarrow tqdm".split()
    script = f"import sys; sys.modules.update(dict.fromkeys({slow})); from moba_cp import cli; cli.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", script, *words.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("usage: moba-cp"), done.stderr


def test_help_of_a_group_lists_its_commands(capsys):
    assert cli.main(["bench"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: moba-cp bench COMMAND") and "bench attention" in shown and "train " not in shown


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "moba_cp", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("moba-cp ")


def test_a_packaged_config_is_found_by_its_name(place, capsys):
    said = []
    for name in ("demo", "demo.yaml", "configs/demo.yaml"):
        assert cli.main(["train", name, *arguments(place, flags=("--dry-run",))[2:]]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] and "warmup_steps: 20" in said[0]
    Path("demo").write_text("run: {steps: 7}\n")
    assert cli.main(["train", "demo", "--set", f"data.path={place / 'text'}", "--set", "data.seq_len=64",
                     "--set", "data.validation_share=0.2", "--dry-run"]) == 0  # fmt: skip
    assert "steps: 7\n" in capsys.readouterr().out, "a file of one's own goes before"


@pytest.mark.parametrize("every, told", [(2, r"step \d+ is saved; --resume goes on"), (10**6, "no step is saved")])
def test_an_interrupted_run_says_what_is_saved(place, every, told):
    command = [sys.executable, "-m", "moba_cp", *arguments(place, "run.steps=100000", f"run.checkpoint_every={every}")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline, log = time.monotonic() + 60 * TIME_SCALE, place / "here" / "run" / "log.jsonl"
        while not (log.is_file() and log.read_text().count("\n") > 4):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60 * TIME_SCALE)
    finally:
        run.kill()
    assert run.returncode == 130 and re.search(rf"^moba-cp train: error: interrupted: {told}$", said, re.MULTILINE)


BROKEN_RANK = """
import sys
from moba_cp import cli
from moba_cp.data import packing
if __import__("os").environ["RANK"] == "1":
    read = packing.Packer.sequence
    def sequence(self, index):
        if index >= 4:
            raise {error}("the disk of rank 1 is gone")
        return read(self, index)
    packing.Packer.sequence = sequence
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("error", ["RuntimeError", "ValueError"])
def test_one_failing_rank_ends_all_with_its_error(place, error):
    script = place / "broken.py"
    script.write_text(BROKEN_RANK.format(error=error))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments(place)], capture_output=True, text=True, timeout=120 * TIME_SCALE, env=environment
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "moba-cp train" in line]
    name = "RuntimeError: " if error == "RuntimeError" else ""
    assert said == [f"moba-cp train (rank 1): error: {name}the disk of rank 1 is gone"]
    assert "the disk of rank 1 is gone" in (place / "here" / "run" / "error-rank1.txt").read_text()


@pytest.mark.parametrize("words", sorted(cli.COMMANDS))
def test_every_command_has_help_with_an_example_that_it_accepts(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*words.split(), "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith(f"usage: moba-cp {words} ") and "exit codes: 0 " in shown
    module = importlib.import_module(cli.COMMANDS[words][0])
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    module.add_arguments(parser)
    examples = re.findall(rf"moba[-_]cp {words}\b(.*)", shown.split("\nexample")[1])
    assert examples
    for example in examples:
        # What stands behind it, from two spaces on, says what it does.
        parser.parse_args(shlex.split(example.strip().split("  ")[0]) if not example.startswith("  ") else [])


@pytest.mark.parametrize("words", ["config", "plan", "bench exchange", "train"])
def test_an_example_runs(words, place, capsys):
    line = cli._EXAMPLES[words].replace("/data/books", str(place / "text"))
    more = ["--dry-run", "--set", "data.seq_len=64", "--set", "data.validation_share=0.2"] if words == "train" else []
    assert cli.main([*shlex.split(line)[1:], *more]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("\n") > 3
