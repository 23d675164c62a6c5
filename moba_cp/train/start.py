"""What ``moba-cp train`` does: read the config, check it, train, and say where everything is."""

import argparse
import sys
import traceback
from pathlib import Path

from .config import TrainConfig
from .log import check_folder, is_own
from .loop import Trainer
from .mesh import close_mesh, launched_rank, launched_size, open_mesh
from .plan import RunPlan, plan_run
from .report import closing_lines
from .resume import describe, find_checkpoint, notes
from .yaml_config import load, to_yaml


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
    resumed, folder = find_checkpoint(arguments.resume, plan), Path(config.run.directory)
    check_folder(folder, is_own(folder, resumed), arguments.overwrite)
    if launched_rank() == 0:
        told = describe(resumed, plan) if resumed is not None else []
        for note in notes(resumed, plan) if resumed is not None else []:
            print(f"note: {note}", file=sys.stderr)
        if arguments.dry_run:
            lines = [*plan.summary(), *told, f"first sequence: {plan.first_text()}"]
            print(to_yaml(config), *(f"# {line}\n" for line in lines), sep="", end="")
        else:
            print(*plan.summary(), *told, sep="\n", flush=True)
    if arguments.dry_run:
        return 0
    _train(plan, resumed)
    return 0


def _train(plan: RunPlan, resumed: Path | None) -> None:
    first, folder = launched_rank() == 0, Path(plan.config.run.directory)
    try:
        mesh = open_mesh(plan.config.run)
        Trainer(plan, mesh, resumed).run()
    except Exception:
        # The terminal shows one line: the traceback goes into a file.
        if folder.is_dir():
            (folder / f"error-rank{launched_rank()}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    close_mesh()
    if first:
        print(*closing_lines(folder), sep="\n", flush=True)
