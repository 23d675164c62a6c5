"""What ``moba-cp train`` does: read the config, check it, train, and say where everything is."""

import argparse
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from . import checkpoint, sinks
from .agreement import content_of, digest_of, from_first, require_equal
from .config import RunConfig, TrainConfig
from .lock import FolderLock
from .log import CHECKPOINTS, FLIGHT, check_folder, is_own, versions
from .loop import Trainer
from .mesh import Mesh, close_mesh, launched_rank, launched_size, open_mesh, start_ranks
from .plan import RunPlan, plan_run
from .report import closing_lines
from .resume import AUTO, describe, find_checkpoint, notes, resolve_auto
from .signals import STOPPED, Stopped
from .weights import is_hf, remarks
from .yaml_config import load, to_dict, to_yaml

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
    if importlib.util.find_spec("matplotlib") is None:
        # Not at the first checkpoint, hours from here.
        raise ModuleNotFoundError("draws the loss curve", name="matplotlib")
    sinks.check(config.run)
    plan = plan_run(config, arguments.ranks or launched_size())
    if arguments.dry_run:
        return _dry_run(plan, arguments.resume, arguments.overwrite)
    if arguments.resume != AUTO:
        # What is wrong is said before any process group is made; what holds is decided below, by the first rank.
        _decide(plan, arguments.resume, arguments.overwrite, {})
    return _run(plan, arguments.resume, arguments.overwrite)


class _Decision(NamedTuple):
    """From where a run starts."""

    start: Path | None
    """The checkpoint to go on from; None to begin anew."""
    reads: Path | None
    """The checkpoint that is read: that, or the one of ``run.start_from``, or the last of a run that is done."""
    done: bool = False
    """All steps are done already."""


def _decide(plan: RunPlan, resume: str | None, overwrite: bool, damaged: dict[Path, str]) -> _Decision:
    """From where the run starts.

    Raises:
        ValueError: no such checkpoint, one of another model, or a folder that was not to be touched.
    """
    folder, weights = Path(plan.config.run.directory), plan.config.run.start_from
    if resume == AUTO:
        resume, done = resolve_auto(plan, damaged)
        if done:
            return _Decision(None, checkpoint.find(folder, damaged), True)
        # Without a checkpoint there is nothing to lose.
        overwrite = overwrite or resume is None
    start = find_checkpoint(resume, plan, damaged)
    check_folder(folder, is_own(folder, start), overwrite)
    ours = weights is not None and not is_hf(weights)
    reads = checkpoint.find(Path(weights)) if start is None and ours else start
    if start is None and reads is not None and is_own(folder, reads):
        raise ValueError(
            f"run.start_from={weights}: lies in run.directory={folder}, whose checkpoints the run replaces; name "
            "another folder for the run"
        )
    return _Decision(start, reads)


def _decide_together(plan: RunPlan, resume: str | None, overwrite: bool, mesh: Mesh) -> _Decision:
    """What the first rank decides, on all ranks; of the checkpoints the newest whose every byte is as it was written.
    A collective call.

    Raises:
        ValueError: as :func:`_decide`, or a checkpoint that was named is damaged.
    """
    damaged: dict[Path, str] = {}
    while True:
        decision, damaged = from_first(lambda: (_decide(plan, resume, overwrite, damaged), damaged), mesh.group)
        problem = checkpoint.verify(decision.reads, mesh.group) if decision.reads is not None else None
        if problem is None:
            break
        if not decision.done and decision.start in (None, Path(resume or "")):
            raise ValueError(f"{problem}; name an earlier checkpoint, or a run's folder to take the newest whole one")
        damaged[decision.reads] = problem
    if mesh.first:
        for path, why in damaged.items():
            print(f"note: {path} is damaged and passed over: {why}", file=sys.stderr)
    return decision


def _dry_run(plan: RunPlan, resume: str | None, overwrite: bool) -> int:
    start, _, done = _decide(plan, resume, overwrite, {})
    if launched_rank() == 0:
        told = _told(plan, start)
        lines = [*plan.summary(), *told, f"first sequence: {plan.first_text()}", *([_done(plan)] if done else [])]
        print(to_yaml(plan.config), *(f"# {line}\n" for line in lines), sep="", end="")
    return 0


def _run(plan: RunPlan, resume: str | None, overwrite: bool) -> int:
    first, folder, run = launched_rank() == 0, Path(plan.config.run.directory), plan.config.run
    mesh = None
    try:
        # Where NCCL's flight recorder writes when a collective times out: flight-rank0 and so on, for
        # `torchfrtrace`. PyTorch renamed the variable.
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
            os.environ.setdefault(name, str((folder / FLIGHT).absolute()))
        start_ranks(run)
        # Before the groups are made, whose shape the config decides.
        content = content_of(plan.corpus.paths)
        require_equal(_equal_everywhere(plan, content))
        mesh = open_mesh(run)
        with _Held(folder, mesh, _patience(run, resume)) as held:
            start, _, done = _decide_together(plan, resume, overwrite, mesh)
            if first and not done:
                print(*plan.summary(), *_told(plan, start, digest_of(content)), sep="\n", file=sys.stderr, flush=True)
            if not done:
                Trainer(plan, mesh, start, held.check, {"content": digest_of(content)}).run()
    except Stopped as stopped:
        close_mesh(mesh)
        if first:
            steps = f"{stopped.step} of {run.steps} steps are saved"
            print(f"stopped as asked: {steps} (exit code {STOPPED}); --resume goes on", file=sys.stderr, flush=True)
        return stopped.code
    except KeyboardInterrupt:
        saved = checkpoint.find_all(folder / CHECKPOINTS)
        told = f"step {checkpoint.step_of(saved[-1])} is saved; --resume goes on" if saved else "no step is saved"
        raise KeyboardInterrupt(f"interrupted: {told}") from None
    except Exception as error:
        # The terminal shows one line: the traceback goes into a file.
        if folder.is_dir():
            (folder / f"error-rank{launched_rank()}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        explained = mesh.heartbeat.explain(error) if mesh is not None else error
        if explained is not error:
            raise explained from error
        raise
    close_mesh(mesh)
    if first:
        print(*([_done(plan)] if done else []), *closing_lines(folder), sep="\n", flush=True)
    return 0


def _equal_everywhere(plan: RunPlan, content: dict[str, str]) -> dict[str, Any]:
    """What every rank has to have been given alike: each key of the config, the versions, the bytes of the corpus."""
    mine = versions()
    return {
        **to_dict(plan.config),
        "version of": {name: mine[name] for name in ("moba-cp", "torch", "triton", "megatron-core")},
        "corpus": {"fingerprint": plan.corpus.fingerprint},
        "content of": content,
    }


class _Held:
    """The lock of a run's folder, held by the first rank; entering it is a collective call."""

    def __init__(self, folder: Path, mesh: Mesh, patience: float):
        self._lock, self._mesh = FolderLock(folder, patience), mesh

    def __enter__(self) -> FolderLock:
        from_first(lambda: self._lock.acquire() and None, self._mesh.group)
        return self._lock

    def __exit__(self, *exception) -> None:
        self._lock.release()


def _patience(run: RunConfig, resume: str | None) -> float:
    """Seconds for which a run waits for the folder. One that is called again may meet ranks of the call before that
    are still ending; the other ranks wait too, with the run's timeout."""
    return min(_PATIENCE_SECONDS, run.timeout_seconds / 2) if resume == AUTO else 0.0


def _told(plan: RunPlan, start: Path | None, content: str | None = None) -> list[str]:
    """What is said of the checkpoint ``start``: remarks at once on stderr, the rest as lines."""
    if start is None:
        weights = plan.config.run.start_from
        return [] if weights is None else remarks(weights, plan.config.model)
    for note in notes(start, plan, content):
        print(f"note: {note}", file=sys.stderr)
    return describe(start, plan)


def _done(plan: RunPlan) -> str:
    return f"done: all {plan.config.run.steps} steps of {plan.config.run.directory} are done"
