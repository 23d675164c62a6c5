"""The experiment with the switch: what its three runs are, and what it says of their logs."""

import argparse
import json

import pytest

from moba_cp.experiments import command, switch
from moba_cp.train.config import TrainConfig
from moba_cp.train.yaml_config import load
from tests.helpers.train_runs import DEMO, write_text


def test_the_runs_differ_in_attention_alone(tmp_path):
    base = load(TrainConfig, DEMO)
    runs = {name: switch._variant(base, name, 0.9, tmp_path / name) for name in switch.COLORS}
    kinds = {name: [config.attention.at(step, 160).default for step in (144, 145)] for name, config in runs.items()}
    assert kinds == {"moba": ["moba", "moba"], "full": ["full", "full"], "switch": ["moba", "full"]}
    assert len({config.run.directory for config in runs.values()}) == 3
    for config in runs.values():
        assert (config.model, config.data, config.optimizer) == (base.model, base.data, base.optimizer)
        assert config.run.seed == base.run.seed


def test_rise_compares_the_steps_around_the_switch():
    losses = {step: 3.0 if step < 10 else 2.5 for step in range(1, 13)} | {10: 5.5}
    assert switch.rise(losses, 10, window=4) == pytest.approx(3.5 - 3.0)


def test_a_switch_soon_after_the_beginning_has_fewer_steps_before_it():
    assert switch.rise({step: 5.0 - step for step in range(1, 9)}, 3, window=8) == pytest.approx(-0.5 - 3.5)


def test_a_spike_shows_in_what_is_said(tmp_path, capsys):
    write_text(tmp_path / "text")
    for name in switch.COLORS:
        (tmp_path / name).mkdir()
        records = [{"step": 0, "validation_loss": 6.0}]
        for step in range(1, 21):
            kind = "full" if name == "full" or (name == "switch" and step > 12) else "moba"
            loss = 4.0 + (name == "switch" and step == 13)
            records.append({"step": step, "loss": loss, "attention": kind})
        records[-1]["validation_loss"] = 3.5
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    settings = [f"data.path={tmp_path / 'text'}", "data.seq_len=256", "data.validation_share=0.2", "run.steps=20"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert command.main(parser.parse_args([str(DEMO), *words, "--directory", str(tmp_path), "--redraw"])) == 0
    said = capsys.readouterr().out
    assert "from step 13 on" in said and "MoBA, then full  +0.1250" in said and "full attention   +0.0000" in said
    assert "MoBA, then full  3.5000" in said
    assert (tmp_path / "switch.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "moba" / "log.jsonl").unlink()
    with pytest.raises(ValueError, match="moba: no step is logged there; train it first, without --redraw"):
        command.main(parser.parse_args([str(DEMO), *words, "--directory", str(tmp_path), "--redraw"]))
