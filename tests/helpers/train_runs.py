"""Small training runs on any number of gloo ranks, for the tests of the trainer."""

import json
from pathlib import Path

from moba_cp.train import checkpoint, report
from moba_cp.train.config import TrainConfig
from moba_cp.train.loop import Trainer
from moba_cp.train.mesh import open_mesh
from moba_cp.train.plan import plan_run
from moba_cp.train.yaml_config import load
from tests.helpers.distributed import run_ranks

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
# The demo, shrunken: 16 blocks of which each query chooses 3, several documents in most sequences, a full last layer.
SHRUNKEN = [
    "model.n_layers=2",
    "model.hidden_size=32",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "attention.block_size=16",
    "attention.top_k=3",
    "data.seq_len=256",
    "data.sequences_per_step=2",
    "data.validation_share=0.2",
    "data.validation_sequences=3",
    "optimizer.lr=3e-3",
    "optimizer.warmup_steps=20",
    "run.steps=20",
    "run.validate_every=10",
    "run.checkpoint_every=10",
]


def write_text(folder: Path, n_files: int = 60) -> None:
    """Documents of 20 to 400 bytes, of words that can be learned."""
    folder.mkdir(parents=True)
    words = ["def", "return", "self", "value", "for", "in", "range", "import", "None", "raise"]
    for i in range(n_files):
        text = " ".join(words[(i * j + j * j) % 10] + "()" * (j % 3 == 0) for j in range(4 + i * 7 % 60))
        (folder / f"{i:02}.py").write_text(text)


def train(ranks: int, *runs: tuple[list[str], Path | None], draws: bool = False) -> None:
    """Train on ``ranks`` processes: each of ``runs`` is the overrides of the shrunken demo and what to resume.

    The curve is drawn only on request: its pictures take a third of such a run's time.
    """
    run_ranks(ranks, _train, runs, draws, timeout=240)


def _train(rank, runs, draws):
    if not draws:
        report.draw = lambda *_: None
    for overrides, resume in runs:
        config = load(TrainConfig, DEMO, SHRUNKEN + overrides)
        mesh = open_mesh(config.run)
        start = checkpoint.find(resume) if resume else None
        Trainer(plan_run(config, mesh.size), mesh, start).run()


def logged(folder: Path, name: str = "loss") -> dict[int, float]:
    """What the log in ``folder`` holds of ``name``, by step."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record[name] for record in records if name in record}
