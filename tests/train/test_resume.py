"""Going on with a run for more steps: from which checkpoint, at which learning rate, and what is said of it."""

import json
from pathlib import Path

import pytest

from moba_cp import cli
from moba_cp.train import checkpoint, manifest
from moba_cp.train.checkpoint import CheckpointMeta
from moba_cp.train.config import TrainConfig
from moba_cp.train.plan import plan_run
from moba_cp.train.resume import _SAME_RESULTS, describe, differences, find_checkpoint, notes
from moba_cp.train.yaml_config import load, to_dict
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, train, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    write_text(folder)
    return folder


def settings(text, folder, schedule, steps):
    return [f"data.path={text}", f"run.directory={folder}", f"optimizer.schedule={schedule}", f"run.steps={steps}"]


def plan(text, folder, schedule, steps, *overrides):
    config = load(TrainConfig, DEMO, [*SHRUNKEN, *settings(text, folder, schedule, steps), *overrides])
    return plan_run(config, 1)


def leave_checkpoints(run, *steps):
    """The folders that a run leaves, without weights."""
    for step in steps:
        path = checkpoint_of(run, step)
        path.mkdir(parents=True)
        meta = CheckpointMeta(step, to_dict(run.config), run.corpus.fingerprint, run.config.run.seed, 2)
        (path / checkpoint.META).write_text(json.dumps(vars(meta)))
        manifest.write(path, {"step": step, "files": {}})


def checkpoint_of(run, step):
    return Path(run.config.run.directory) / "checkpoints" / f"step-{step:08d}"


def test_a_prolonged_run_computes_what_a_longer_one_would_have(text, tmp_path):
    """Stopped at 10 steps of which the last 2 decay, and gone on to 14: no step differs from 14 in one go."""

    def overrides(name, steps):
        return [*settings(text, tmp_path / name, "wsd", steps), "run.keep_checkpoints=1", "optimizer.warmup_steps=3"]

    train(1, (overrides("long", 14), None), (overrides("short", 10), None))
    short = tmp_path / "short"
    assert {path.name for path in (short / "checkpoints").iterdir()} == {"step-00000008", "step-00000010"}
    assert logged(short, "learning_rate")[10] < logged(short, "learning_rate")[8]
    start = find_checkpoint("", plan(text, short, "wsd", 14, "optimizer.warmup_steps=3"))
    assert start == short / "checkpoints" / "step-00000008"
    train(1, (overrides("short", 14), start))
    assert logged(short) == logged(tmp_path / "long")
    assert logged(short, "learning_rate") == logged(tmp_path / "long", "learning_rate")
    names = {path.name for path in (short / "checkpoints").iterdir()}
    assert names == {"finished-00000010", "step-00000011", "step-00000014"}, "a finished model is not deleted"


def test_what_is_said_of_a_prolonged_run(text, tmp_path):
    leave_checkpoints(plan(text, tmp_path, "wsd", 100), 60, 80, 100)
    longer = plan(text, tmp_path, "wsd", 200)
    path = find_checkpoint("", longer)
    assert path.name == "step-00000080"
    assert describe(path, longer) == [
        f"resumed from {path}: 80 of 200 steps are done",
        "steps 81 to 100, with a falling learning rate, are done again without, and their model is kept as "
        "finished-00000100",
        "learning rate: 0.003 in step 80, 0.003 in step 81",
    ]
    assert notes(path, longer) == [f"this run differs from that of {path} in run.steps (100 there, 200 here)"]


def test_a_stopped_run_goes_on_within_its_decay(text, tmp_path):
    same = plan(text, tmp_path, "wsd", 100)
    leave_checkpoints(same, 60, 80, 90)
    path = find_checkpoint("", same)
    assert path.name == "step-00000090" and notes(path, same) == []
    assert describe(path, same)[1:] == ["learning rate: 0.00165 in step 90, 0.00152 in step 91"]


@pytest.mark.parametrize(
    "schedule, reason", [("cosine", "a cosine schedule over 100 steps is prolonged to 200"), ("wsd", "name an")]
)
def test_a_jump_is_said(text, tmp_path, schedule, reason):
    """Of a cosine, and of a checkpoint within the decay that was named."""
    leave_checkpoints(plan(text, tmp_path, schedule, 100), 60, 100)
    longer = plan(text, tmp_path, schedule, 200)
    path = checkpoint_of(longer, 100)
    assert find_checkpoint(str(path), longer) == path
    if schedule == "cosine":
        assert find_checkpoint("", longer) == path
    assert "the learning rate jumps" in notes(path, longer)[-1] and reason in notes(path, longer)[-1]
    assert "learning rate: 0.0003 in step 100, " in describe(path, longer)[-1]


def test_a_checkpoint_without_a_schedule_is_a_cosine(text, tmp_path):
    """Runs of versions that knew no schedule go on as they were."""
    run = plan(text, tmp_path, "cosine", 100)
    leave_checkpoints(run, 60)
    meta = json.loads((checkpoint_of(run, 60) / checkpoint.META).read_text())
    del meta["config"]["optimizer"]["schedule"], meta["config"]["optimizer"]["decay"]
    (checkpoint_of(run, 60) / checkpoint.META).write_text(json.dumps(meta))
    assert notes(find_checkpoint("", run), run) == []


def test_the_command_says_where_it_goes_on(text, tmp_path, capsys):
    leave_checkpoints(plan(text, tmp_path, "wsd", 100), 80)
    words = [word for setting in [*SHRUNKEN, *settings(text, tmp_path, "wsd", 100)] for word in ("--set", setting)]
    assert cli.main(["train", str(DEMO), *words, "--resume", "--dry-run"]) == 0
    assert f"# resumed from {checkpoint_of(plan(text, tmp_path, 'wsd', 100), 80)}: 80 of 100" in capsys.readouterr().out


def test_every_setting_that_changes_results_is_said(text, tmp_path):
    """What is not said of a resumed run is what it may change without computing anything else."""
    run = plan(text, tmp_path, "wsd", 100)
    config = to_dict(run.config)
    for section, harmless in _SAME_RESULTS.items():
        for key in config[section]:
            saved = to_dict(run.config)
            saved[section][key] = "another"
            assert bool(differences(saved, config)) != (key in harmless), f"{section}.{key}"
    assert "rope_base" not in _SAME_RESULTS["model"] and "validation_share" not in _SAME_RESULTS["data"]


def test_other_bytes_far_within_a_file_are_other_data(text, tmp_path):
    """The fingerprint knows sizes and the first 64 KiB; the manifest knows the bytes."""
    run = plan(text, tmp_path, "wsd", 100)
    leave_checkpoints(run, 60)
    path = checkpoint_of(run, 60)
    manifest.write(path, {"step": 60, "files": {}, "content": "abc"})
    assert notes(path, run, "abc") == [] == notes(path, run)
    assert "was trained on other data than" in notes(path, run, "abd")[0]


def test_a_checkpoint_of_before_manifests_is_taken_with_a_word(text, tmp_path):
    run = plan(text, tmp_path, "wsd", 100)
    leave_checkpoints(run, 60)
    path = checkpoint_of(run, 60)
    (path / manifest.NAME).unlink()
    meta = json.loads((path / checkpoint.META).read_text())
    del meta["format"]
    (path / checkpoint.META).write_text(json.dumps(meta))
    assert find_checkpoint("", run) == path
    assert notes(path, run) == [
        f"{path} was written before checkpoints had a manifest: whether it is whole cannot be told"
    ]
