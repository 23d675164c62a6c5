"""The README's Python examples run as printed, and its commands of training are accepted."""

import json
import re
import shlex
from pathlib import Path

import torch
import torch.distributed as dist

from moba_cp import cli
from moba_cp.train.checkpoint import CheckpointMeta
from moba_cp.train.config import TrainConfig
from moba_cp.train.plan import plan_run
from moba_cp.train.yaml_config import load, to_dict

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _example(after: str) -> str:
    """The first Python block behind a heading."""
    return re.search(r"```python\n(.*?)```", README.split(f"\n## {after}\n")[1], re.DOTALL)[1]


def test_in_your_own_model():
    example = _example("In your own model")
    assert len(example.strip().splitlines()) <= 13
    names = {}
    exec(example, names)
    names["out"].sum().backward()
    assert names["q"].grad.isfinite().all()


def test_in_megatron_core():
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    example = _example("In Megatron-core")
    assert len(example.strip().splitlines()) <= 12
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
    )
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        tokens = torch.randint(256, (1, 512))
        names = {"config": config, "tokens": tokens, "labels": tokens.roll(-1)}
        exec(example, names)
        names["loss"].mean().backward()
        assert names["model"].decoder.layers[0].self_attention.core_attention.kind == "moba"
        assert names["model"].decoder.layers[1].self_attention.core_attention.kind == "full"
    finally:
        parallel_state.destroy_model_parallel()
        if started:
            dist.destroy_process_group()


def _finish(overrides: list[str]) -> None:
    """Leave in the run's folder what tells a later command that the run has finished."""
    config = load(TrainConfig, "configs/demo.yaml", overrides)
    folder, steps = Path(config.run.directory), config.run.steps
    checkpoint = folder / "checkpoints" / f"step-{steps:08d}"
    checkpoint.mkdir(parents=True)
    meta = CheckpointMeta(steps, to_dict(config), plan_run(config, 1).corpus.fingerprint, config.run.seed)
    (checkpoint / "meta.json").write_text(json.dumps(vars(meta)))
    (folder / "log.jsonl").write_text("")


def test_your_own_text(tmp_path, monkeypatch, capsys):
    """Every command is accepted, in order, behind a quickstart, each run having finished before the next command."""
    for number in range(4):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number}" * 10000)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    text = [f"data.path={tmp_path / 'text'}"]
    _finish(text)
    block = re.search(r"```bash\n(.*?)```", README.split("\n## Your own text\n")[1], re.DOTALL)[1]
    commands = [shlex.split(line, comments=True) for line in block.replace("\\\n", "").splitlines()]
    commands = [words for words in commands if "moba-cp" in words]
    assert len(commands) == 4 and sum("--resume" in words for words in commands) == 1
    for words in commands:
        ranks = words[words.index("--nproc_per_node") + 1] if words[0] == "torchrun" else "1"
        words = words[words.index("moba-cp") + 1 :]
        dry = ["--set", *text, "--dry-run", "--ranks", ranks]
        assert cli.main([*words, *dry]) == 0, (words, capsys.readouterr().err)
        if not {"--dry-run", "--resume"} & set(words):
            _finish([word for before, word in zip(words, words[1:]) if before == "--set"] + text)
