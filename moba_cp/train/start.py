"""What ``moba-cp train`` does: read the config, check it, train, and say where everything is."""

import argparse
import sys
import traceback
from pathlib import Path

from . import checkpoint
from .config import TrainConfig
from .log import check_folder, is_own
from .loop import Trainer
from .mesh import close_mesh, launched_rank, launched_size, open_mesh
from .plan import RunPlan, plan_run
from .report import closing_lines
from .yaml_config import load, to_dict, to_yaml

# They decide the data and the learning rate of every step.
_DECISIVE = (("run", "seed"), ("run", "steps"), ("data", "seq_len"), ("data", "sequences_per_step"))


def start(arguments: argparse.Namespace) -> int:
    """Run the command with the options of :mod:`.command`; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    if arguments.overwrite and arguments.resume is not None:
        raise ValueError("--overwrite with --resume: one replaces the run that the other goes on with; leave one out")
    if arguments.ranks is not None and (not arguments.dry_run or arguments.ranks < 1):
        raise ValueError(f"--ranks={arguments.ranks}: needs --dry-run and at least 1; training takes torchrun's ranks")
    config = load(TrainConfig, arguments.config, arguments.overrides)
    plan = plan_run(config, arguments.ranks or launched_size())
    resumed, folder = _resume(arguments.resume, plan), Path(config.run.directory)
    check_folder(folder, is_own(folder, resumed), arguments.overwrite)
    if resumed is not None and launched_rank() == 0:
        _note_differences(resumed, plan)
    if arguments.dry_run:
        if launched_rank() == 0:
            print(to_yaml(config), *(f"# {line}\n" for line in plan.summary()), sep="", end="")
        return 0
    _train(plan, resumed)
    return 0


def _resume(resume: str | None, plan: RunPlan) -> Path | None:
    """The checkpoint to start from, checked against the run; None to start anew."""
    if resume is None:
        if plan.config.run.start_from is not None:
            _same_model(checkpoint.find(Path(plan.config.run.start_from)), plan)
        return None
    path = checkpoint.find(Path(resume or plan.config.run.directory))
    meta = _same_model(path, plan)
    if meta.step >= plan.config.run.steps:
        raise ValueError(f"{path}: has done {meta.step} steps and run.steps={plan.config.run.steps}; raise run.steps")
    return path


def _note_differences(path: Path, plan: RunPlan) -> None:
    """Say why a run resumed from ``path`` will not go on exactly as the run that wrote it would have."""
    meta = checkpoint.read_meta(path)
    saved, config = meta.config, to_dict(plan.config)
    different = [
        f"{section}.{key} ({saved[section][key]} there, {config[section][key]} here)"
        for section, key in _DECISIVE
        if key in saved.get(section, {}) and saved[section][key] != config[section][key]
    ]
    if meta.data_fingerprint != plan.corpus.fingerprint:
        print(f"note: {path} was trained on other data than {plan.corpus.source} holds now", file=sys.stderr)
    if different:
        print(f"note: this run differs from that of {path} in {', '.join(different)}", file=sys.stderr)


def _same_model(path: Path, plan: RunPlan) -> checkpoint.CheckpointMeta:
    meta = checkpoint.read_meta(path)
    checkpoint.check_same_model(path, meta, to_dict(plan.config.model))
    return meta


def _train(plan: RunPlan, resumed: Path | None) -> None:
    first, folder = launched_rank() == 0, Path(plan.config.run.directory)
    if first:
        print(*plan.summary(), sep="\n", flush=True)
    try:
        mesh = open_mesh(plan.config.run)
        Trainer(plan, mesh, resumed).run()
    except Exception:
        # What the one line on the terminal leaves out.
        if folder.is_dir():
            (folder / f"error-rank{launched_rank()}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    close_mesh()
    if first:
        print(*closing_lines(folder), sep="\n", flush=True)
