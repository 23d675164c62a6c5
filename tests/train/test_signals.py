"""A run that is asked to stop saves at once on all ranks, and goes on as if it had never stopped."""

import os
import signal

import pytest

from moba_cp import cli
from moba_cp.train import checkpoint
from moba_cp.train.config import TrainConfig
from moba_cp.train.loop import Trainer
from moba_cp.train.mesh import open_mesh
from moba_cp.train.plan import plan_run
from moba_cp.train.signals import STOP_FILE, STOPPED, Stopped
from moba_cp.train.yaml_config import load
from tests.helpers.distributed import run_ranks
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, write_text


def _overrides(folder, name):
    return [
        *SHRUNKEN, "run.steps=7", "run.checkpoint_every=100", "run.validate_every=100",
        f"data.path={folder / 'text'}", f"run.directory={folder / name}",
    ]  # fmt: skip


def _trainer(folder, name, resume=None):
    config = load(TrainConfig, DEMO, _overrides(folder, name))
    mesh = open_mesh(config.run)
    return Trainer(plan_run(config, mesh.size), mesh, resume)


def _ask(rank, folder, trainer, step, by):
    """Ask for a stop within ``step``; returns the step that was saved."""
    train_step, file = trainer.train_step, folder / f"stop-{by}"
    os.environ.pop(STOP_FILE, None)
    if by == "file":
        os.environ[STOP_FILE] = str(file)

    def asked():
        if trainer.step == step - 1 and by == "signal" and rank == 1:
            # Twice, as schedulers do: the second must not kill a run that is saving.
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        if trainer.step == step - 1 and by == "file" and rank == 0:
            file.touch()
        return train_step()

    trainer.train_step = asked
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        trainer.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped.value.code == (0 if by == "file" else STOPPED)
    return stopped.value.step


def _stop_twice(rank, folder):
    """Train one run in one go, and one that is stopped in its third step and in its fifth."""
    _trainer(folder, "whole").run()
    steps = [_ask(rank, folder, _trainer(folder, "stopped"), 3, "signal")]
    steps.append(_ask(rank, folder, _trainer(folder, "stopped", checkpoint.find(folder / "stopped")), 5, "file"))
    del os.environ[STOP_FILE]
    _trainer(folder, "stopped", checkpoint.find(folder / "stopped")).run()
    return steps


def test_all_ranks_save_the_same_step_and_go_on_from_it(tmp_path):
    write_text(tmp_path / "text")
    assert run_ranks(2, _stop_twice, tmp_path) == [[3, 5], [3, 5]]
    assert not (tmp_path / "stop-signal").exists()
    assert (tmp_path / "stop-file").read_text() == "saved 5\n"
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    assert sorted(logged(tmp_path / "stopped")) == list(range(1, 8))


def _arguments(folder, name):
    settings = [word for setting in _overrides(folder, name) for word in ("--set", setting)]
    return ["train", str(DEMO), *settings, "--resume", "auto"]


def test_one_command_starts_goes_on_and_ends(tmp_path, capsys, monkeypatch):
    write_text(tmp_path / "text")
    folder = tmp_path / "run"
    # A run that was killed before its first checkpoint is begun again.
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 0, "validation_loss": 5.0}\n{"step": 1, "loss": 5.0}\n')
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    assert cli.main(_arguments(tmp_path, "run")) == 0, "the answer is in the file"
    assert (tmp_path / "stop").read_text() == "saved 1\n"
    shown = capsys.readouterr().err
    assert "stopped as asked: 1 of 7 steps are saved (exit code 75)" in shown
    assert list(logged(folder)) == [1]
    (tmp_path / "stop").unlink()
    assert cli.main(_arguments(tmp_path, "run")) == 0
    assert "1 of 7 steps are done" in (shown := capsys.readouterr()).err
    assert shown.out.startswith("curve: ") and shown.out.count("\n") == 3, "stdout is the result"
    before = (folder / "log.jsonl").read_text()
    assert cli.main(_arguments(tmp_path, "run")) == 0
    assert "done: all 7 steps" in capsys.readouterr().out
    assert (folder / "log.jsonl").read_text() == before
