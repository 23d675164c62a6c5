"""What ``moba-cp train`` does: read the config, check it, train, and say where everything is."""

import argparse
import sys
import traceback
from pathlib import Path

from .agreement import from_first
from .config import RunConfig, TrainConfig
from .lock import FolderLock
from .log import check_folder, is_own
from .loop import Trainer
from .mesh import Mesh, close_mesh, launched_rank, launched_size, open_mesh
from .plan import RunPlan, plan_run
from .report import closing_lines
from .resume import AUTO, describe, find_checkpoint, notes, resolve_auto
from .signals import STOPPED, Stopped
from .yaml_config import load, to_yaml

_PATIENCE_SECONDS = 60.0


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
    if arguments.dry_run:
        return _dry_run(plan, arguments.resume, arguments.overwrite)
    if arguments.resume != AUTO:
        # What is wrong is said before any process group is made; what holds is decided below, by the first rank.
        _decide(plan, arguments.resume, arguments.overwrite)
    return _run(plan, arguments.resume, arguments.overwrite)


def _decide(plan: RunPlan, resume: str | None, overwrite: bool) -> tuple[Path | None, bool]:
    """(The checkpoint to start from or None to begin anew, whether all steps are done already).

    Raises:
        ValueError: no such checkpoint, one of another model, or a folder that was not to be touched.
    """
    if resume == AUTO:
        resume, done = resolve_auto(plan)
        if done:
            return None, True
        # Without a checkpoint there is nothing to lose.
        overwrite = overwrite or resume is None
    start, folder = find_checkpoint(resume, plan), Path(plan.config.run.directory)
    check_folder(folder, is_own(folder, start), overwrite)
    return start, False


def _dry_run(plan: RunPlan, resume: str | None, overwrite: bool) -> int:
    start, done = _decide(plan, resume, overwrite)
    if launched_rank() == 0:
        told = _told(plan, start)
        lines = [*plan.summary(), *told, f"first sequence: {plan.first_text()}", *([_done(plan)] if done else [])]
        print(to_yaml(plan.config), *(f"# {line}\n" for line in lines), sep="", end="")
    return 0


def _run(plan: RunPlan, resume: str | None, overwrite: bool) -> int:
    first, folder, run = launched_rank() == 0, Path(plan.config.run.directory), plan.config.run
    try:
        mesh = open_mesh(run)
        with _Held(folder, mesh, _patience(run, resume)):
            start, done = from_first(lambda: _decide(plan, resume, overwrite), mesh.group)
            if first and not done:
                print(*plan.summary(), *_told(plan, start), sep="\n", flush=True)
            if not done:
                Trainer(plan, mesh, start).run()
    except Stopped as stopped:
        close_mesh()
        if first:
            steps = f"{stopped.step} of {run.steps} steps are saved"
            print(f"stopped as asked: {steps} (exit code {STOPPED}); --resume goes on", flush=True)
        return stopped.code
    except Exception:
        # The terminal shows one line: the traceback goes into a file.
        if folder.is_dir():
            (folder / f"error-rank{launched_rank()}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    close_mesh()
    if first:
        print(*([_done(plan)] if done else []), *closing_lines(folder), sep="\n", flush=True)
    return 0


class _Held:
    """The lock of a run's folder, held by the first rank; entering it is a collective call."""

    def __init__(self, folder: Path, mesh: Mesh, patience: float):
        self._lock, self._mesh = FolderLock(folder, patience), mesh

    def __enter__(self) -> None:
        from_first(lambda: self._lock.acquire() and None, self._mesh.group)

    def __exit__(self, *exception) -> None:
        self._lock.release()


def _patience(run: RunConfig, resume: str | None) -> float:
    """Seconds for which a run waits for the folder. One that is called again may meet ranks of the call before that
    are still ending; the other ranks wait too, with the run's timeout."""
    return min(_PATIENCE_SECONDS, run.timeout_seconds / 2) if resume == AUTO else 0.0


def _told(plan: RunPlan, start: Path | None) -> list[str]:
    """What is said of the checkpoint ``start``: remarks at once on stderr, the rest as lines."""
    if start is None:
        return []
    for note in notes(start, plan):
        print(f"note: {note}", file=sys.stderr)
    return describe(start, plan)


def _done(plan: RunPlan) -> str:
    return f"done: all {plan.config.run.steps} steps of {plan.config.run.directory} are done"
