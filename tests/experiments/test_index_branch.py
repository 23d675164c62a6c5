"""The experiment with index branches: what its runs are, that it runs from end to end, and what it says."""

import argparse
import json

import pytest

from moba_cp.experiments import index_branch, index_command
from moba_cp.train.config import TrainConfig
from moba_cp.train.yaml_config import load
from tests.helpers.train_runs import SHRUNKEN, write_text

CONFIG = "hybrid/index_branch"
TINY = [*SHRUNKEN, "attention.index={heads: 2, dim: 8}", "run.dtype=float32", "run.steps=10", "run.validate_every=5",
        "optimizer.warmup_steps=2"]  # fmt: skip


def call(folder, *words, settings=()):
    parser = argparse.ArgumentParser()
    index_command.add_arguments(parser)
    settings = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
    return index_branch.main(parser.parse_args([CONFIG, *settings, "--directory", str(folder), *words]))


def test_the_runs_differ_in_attention_alone(tmp_path):
    assert index_command.VARIANTS == index_branch.VARIANTS
    base = load(TrainConfig, CONFIG)
    runs = {name: index_branch.variant(base, name, tmp_path / name) for name in index_branch.VARIANTS}
    kinds = {name: [config.attention.at(step, 600).default for step in (180, 181)] for name, config in runs.items()}
    assert kinds == {"full": ["full"] * 2} | {name: ["full", "moba"] for name in ("moba", "mean", "max")}
    scores = [config.attention.index and config.attention.index.score for config in runs.values()]
    assert scores == [None, None, "mean", "max"]
    for config in runs.values():
        assert (config.model, config.data, config.optimizer) == (base.model, base.data, base.optimizer)


def test_it_runs_from_end_to_end(tmp_path, capsys):
    write_text(tmp_path / "text")
    text = f"data.path={tmp_path / 'text'}"
    assert call(tmp_path / "runs", "--only", "full", "mean", settings=[text]) == 0
    said = capsys.readouterr().out
    assert "full attention" in said and "index branch, mean" in said and "when it begins to choose" in said
    assert "mean keys" not in said.split("validation loss at step 10")[1]
    assert (tmp_path / "runs" / "index-branch.png").read_bytes().startswith(b"\x89PNG")
    kinds = [json.loads(line).get("attention") for line in (tmp_path / "runs/mean/log.jsonl").read_text().splitlines()]
    assert kinds[1:] == ["full"] * 3 + ["moba"] * 7


def test_what_is_said_of_the_logs():
    record = lambda step, kind, **more: {"step": step, "loss": 3.0, "attention": kind, **more}
    full = [
        record(1, "full", validation_loss=4.0),
        record(2, "full", validation_loss=2.0),
        record(3, "full", validation_loss=1.0),
    ]
    mean = [
        record(1, "full", index_loss=1.5, validation_loss=3.8),
        record(2, "moba", index_loss=0.25, validation_loss=2.01),
    ]
    lines = index_branch.verdict({"full": full, "mean": mean})
    assert (
        "at step 2" in lines[0] and "index branch, mean     2.0100  +0.50 % (between -5.00 and +0.50 along" in lines[2]
    )
    assert "at most 1.5000, 1.5000 when it begins to choose" in lines[3]
    none = ["no step at which all runs were validated"]
    assert index_branch.verdict({"full": full[2:], "mean": mean}) == none
    # Before the first step all are alike.
    begun = [{"step": 0, "validation_loss": 5.0}]
    assert index_branch.verdict({"full": begun + full, "mean": begun}) == none


def test_a_config_without_branches_or_warm_up_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run is logged there; train them first, without --redraw"):
        call(tmp_path, "--redraw")
    with pytest.raises(ValueError, match="attention.index=null: the config has no index branches"):
        call(tmp_path, settings=["attention.index=null"])
    with pytest.raises(ValueError, match=r"attention.schedule has the kinds \['moba', 'full'\]"):
        call(tmp_path, settings=["attention.schedule=[{until: 0.5, kind: moba}, {kind: full}]"])
