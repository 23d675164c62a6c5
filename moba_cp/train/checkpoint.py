"""Checkpoints that any number of ranks can read; none that is incomplete or damaged is ever taken for a good one.

A checkpoint is a folder ``step-00000500`` of torch.distributed.checkpoint files (weights and optimizer state, each
rank its shard), ``meta.json`` (step, config, data fingerprint) and ``manifest.json`` (size and hash of each file). It
is written under another name and renamed once everything is on the disk, and renamed again before it is deleted. The
order of the data and all random numbers depend on the seed and the step alone, so a checkpoint holds no state of a data
loader or a generator.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from ..index.config import INDEX_WEIGHT
from ..model.attention import KEY_CONV_WEIGHT
from . import manifest, storage
from .agreement import all_values, from_first
from .background import Background
from .manifest import Damage
from .storage import StorageError

_NAME = re.compile(r"step-(\d{8,})$")
_PARTIAL, _SUPERSEDED, _DELETED = ".partial", "superseded-", "deleted-"
META = "meta.json"
_FORMAT = 2
"""Of checkpoints with a manifest; those of version 0.2 had none."""
# Settings in which runs of one model may differ: how it computes, its initial weights, and its rotary embedding, which
# changes with the length of the sequences.
_NOT_THE_MODEL = ("recompute", "init_std", "rope_base", "rope_scaling")


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says about itself."""

    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    """The resolved config of the run that wrote it."""
    data_fingerprint: str
    """Of the corpus it was trained on."""
    seed: int
    """Of the run; with ``step`` it places the data and every random number."""
    format: int = 1
    """2: there is a manifest."""


def save(
    folder: Path,
    meta: CheckpointMeta,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    keep_step: int | None = None,
    check: Callable[[], None] = lambda: None,
    facts: dict[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    background: Background | None = None,
) -> Path:
    """Write a checkpoint into ``folder``, the newest of the ``keep`` that stay (0: all); collective over ``group``.

    The checkpoint of ``keep_step`` stays whatever its age, and is not counted.

    Args:
        check: called by the first rank before the checkpoint takes its name; raises ValueError if it may not.
        facts: what else the manifest says, such as versions and the number of ranks.
        background: what writes a copy in host memory while training goes on, after the one before; None to write now.

    Raises:
        StorageError: on all ranks, if one could not write this checkpoint or, in the background, the one before; what
            was there stays.
        ValueError: on all ranks, if a weight of one is not finite.
    """
    target = folder / f"step-{meta.step:08d}"
    state = _state(module, optimizer)
    _check_finite(state, target, group)

    def write(state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        partial = from_first(lambda: _told(lambda: _begin(folder, target)), group)
        try:
            storage.write(state, partial, group)
            files = _entries(partial, group)
            from_first(lambda: _told(lambda: _finish(partial, target, meta, files, facts or {}, check)), group)
        except StorageError:
            # Room for the next attempt.
            from_first(lambda: shutil.rmtree(partial, ignore_errors=True), group)
            raise
        from_first(lambda: _sweep(folder, target, keep, keep_step), group)

    if background is None:
        write(state, group)
    else:
        background.start(write, state)
    return target


def load(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None
) -> None:
    """Read weights and optimizer state in place; collective over all ranks, of any number.

    What the optimizer was configured with (betas, eps, weight decay) stays as it is here.
    """
    options = [{k: v for k, v in own.items() if k != "params"} for own in optimizer.param_groups]
    state = _state(module, optimizer)
    storage.read(state, path, group)
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for own, configured in zip(optimizer.param_groups, options, strict=True):
        own.update(configured)


def load_weights(path: Path, module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Read weights alone in place; collective over all ranks, of any number. Index branches and
    convolutions over keys that the checkpoint's model did not have stay as they are."""
    state = {"model": get_model_state_dict(module)}
    saved = read_meta(path).config.get("attention", {})
    for name, ending in (("index", INDEX_WEIGHT), ("key_conv", KEY_CONV_WEIGHT)):
        if not saved.get(name):
            state["model"] = {name: x for name, x in state["model"].items() if not name.endswith(ending)}
    storage.read(state, path, group)
    set_model_state_dict(module, state["model"], options=StateDictOptions(strict=False))


def find(path: Path, damaged: dict[Path, str] | None = None) -> Path:
    """The checkpoint that ``path`` names: itself, or the newest under it or under its folder ``checkpoints``.

    Args:
        damaged: checkpoints to pass over, with the reason; those that :func:`check_quickly` finds damaged on the way
            are added to it.

    Raises:
        ValueError: there is none.
    """
    damaged = {} if damaged is None else damaged
    if _NAME.fullmatch(path.name) or (path / META).is_file():
        check_quickly(path)
        return path
    for folder in (path / "checkpoints", path):
        for candidate in reversed(_folders(folder)):
            if is_whole(candidate, damaged):
                return candidate
    why = "".join(f"; {reason}" for reason in damaged.values())
    if not why and (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path}: its run has saved no checkpoint yet (run.checkpoint_every); wait for one, or begin the run anew "
            "(moba-cp train ... --overwrite)"
        )
    raise ValueError(f"{path}: no checkpoint there; give a run's folder or one of its checkpoints/step-* folders{why}")


def is_whole(path: Path, damaged: dict[Path, str]) -> bool:
    """Whether the checkpoint is not among the ``damaged`` nor looks so; if it does, it is added to them."""
    if path not in damaged:
        try:
            check_quickly(path)
        except ValueError as error:
            damaged[path] = str(error)
    return path not in damaged


def any_in(folder: Path) -> bool:
    """Whether something in ``folder`` has a checkpoint's name, damaged ones included."""
    return bool(_folders(folder))


def check_quickly(path: Path) -> None:
    """Raise ValueError unless the checkpoint has all its files, in their sizes; those of version 0.2 only say of which
    step they are."""
    meta = read_meta(path)
    if meta.format >= _FORMAT:
        content = manifest.read(path)
        manifest.check_sizes(path, content)
        for name, step in (("its manifest", content["step"]), ("its meta.json", meta.step)):
            if _NAME.fullmatch(path.name) and step != step_of(path):
                raise Damage(f"{path}: {name} is of step {step}")
    elif (path / manifest.NAME).exists() or (_NAME.fullmatch(path.name) and meta.step != step_of(path)):
        raise Damage(f"{path / META}: is damaged")


def verify(path: Path, group: dist.ProcessGroup | None = None) -> str | None:
    """What is damaged in the checkpoint, None if nothing is; collective, each rank reads a part of the files.

    None too for one without a manifest, as version 0.2 wrote them.
    """
    problem, content = None, None
    try:
        check_quickly(path)
        if read_meta(path).format >= _FORMAT:
            content = manifest.read(path)
            manifest.check_hashes(path, content, dist.get_rank(group), dist.get_world_size(group))
    except ValueError as error:
        problem = str(error)
    every = all_values((problem, content), group)
    if problems := [problem for problem, _ in every if problem is not None]:
        return problems[0]
    others = [rank for rank, (_, seen) in enumerate(every) if seen != every[0][1]]
    return f"{path}: is another checkpoint on ranks {others} than on rank 0" if others else None


def read_meta(path: Path) -> CheckpointMeta:
    """The ``meta.json`` of a checkpoint."""
    try:
        values = json.loads((path / META).read_text(encoding="utf-8"))
        meta = CheckpointMeta(**values)
        if not all(type(getattr(meta, f.name)) is kind for f, kind in zip(fields(meta), (int, dict, str, int, int))):
            raise ValueError("a value of another kind")
    except OSError as error:
        raise ValueError(f"{path / META}: {error.strerror}, so no checkpoint of this library") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / META}: not a checkpoint of this library ({error})") from None
    return meta


def check_same_model(path: Path, meta: CheckpointMeta, model: dict[str, Any]) -> None:
    """Raise ValueError unless the checkpoint holds the model that the config section ``model`` describes."""
    different = model_differences(meta.config.get("model", {}), model)
    if different:
        raise ValueError(
            f"{path}: a checkpoint of another model: {', '.join(different)}; set the same values, or start anew in "
            "another folder"
        )


def model_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Where two config sections ``model`` are not of the same weights."""
    return [
        f"model.{key} is {there.get(key)} there and {here.get(key)} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key) and key not in _NOT_THE_MODEL
    ]


def set_aside_after(folder: Path, step: int) -> None:
    """Take the checkpoints in ``folder`` of steps after ``step`` (0: all) out of the way, and delete partial ones.

    They stay, as ``superseded-...``, until the next checkpoint is saved there. For a ``step`` above 0, the last
    checkpoint of a run that had ended stays for good, as ``finished-00000160``: a run that is prolonged from before its
    decay does not take the trained model away.
    """
    for path in (*folder.glob(f"step-*{_PARTIAL}*"), *folder.glob(f"{_DELETED}*")):
        shutil.rmtree(path, ignore_errors=True)
    for path in _folders(folder):
        if step_of(path) > step:
            if step and _ended_a_run(path):
                finished = path.with_name(f"finished-{step_of(path):08d}")
                if finished.exists():
                    set_aside(folder, finished)
                path.rename(finished)
            else:
                set_aside(folder, path)
    for path in [] if step else folder.glob("finished-*"):
        set_aside(folder, path)


def set_aside(folder: Path, path: Path) -> None:
    """Keep ``path``, a file or folder that a new run replaces, in ``folder`` until the next checkpoint is saved."""
    path.rename(_aside(folder, path))


def copy_aside(folder: Path, path: Path) -> None:
    """:func:`set_aside` of a copy of the file ``path``."""
    shutil.copyfile(path, _aside(folder, path))


def _aside(folder: Path, path: Path) -> Path:
    return folder / f"{_SUPERSEDED}{uuid.uuid4().hex[:8]}-{path.name}"


def find_all(folder: Path) -> list[Path]:
    """Checkpoints in ``folder`` that look whole, oldest step first."""
    return [path for path in _folders(folder) if (path / META).is_file()]


def step_of(path: Path) -> int:
    """Optimizer steps that the checkpoint ``path`` has done, by its name."""
    return int(_NAME.fullmatch(path.name)[1])


def _folders(folder: Path) -> list[Path]:
    """What has a checkpoint's name, whole or not, oldest step first."""
    if not folder.is_dir():
        return []
    return sorted((folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)), key=step_of)


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(module, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _check_finite(state: dict[str, Any], target: Path, group: dist.ProcessGroup | None) -> None:
    """Raise StorageError, on all ranks, if a weight or moment of one is not finite."""
    found = all_values(_first_nonfinite(state, ""), group)
    for rank, name in enumerate(found):
        if name is not None:
            raise StorageError(f"{target}: not written, for {name} on rank {rank} holds infinity or NaN")


def _first_nonfinite(value: Any, name: str) -> str | None:
    """The name of the first tensor that is not finite throughout."""
    if isinstance(value, dict):
        found = (_first_nonfinite(x, f"{name}.{key}" if name else str(key)) for key, x in value.items())
        return next((x for x in found if x is not None), None)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        local = value.to_local() if isinstance(value, DTensor) else value
        return name if not local.isfinite().all() else None
    return None


def _begin(folder: Path, target: Path) -> Path:
    """A new folder to write ``target`` into; what an earlier attempt left is deleted."""
    for old in folder.glob(f"{target.name}{_PARTIAL}*"):
        shutil.rmtree(old, ignore_errors=True)
    # A name of its own: ranks of a job that this one replaces may still be writing.
    partial = folder / f"{target.name}{_PARTIAL}-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    return partial


def _entries(partial: Path, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The manifest's entries of all files, each by the rank that wrote it; a collective call."""
    rank, mine, error = dist.get_rank(group), {}, ""
    try:
        own = [*partial.glob(f"__{rank}_*"), *([partial / ".metadata"] if rank == 0 else [])]
        mine = {path.name: manifest.entry(path, rank) for path in own}
    except OSError as failure:
        error = f"rank {rank}: {failure.strerror}"
    every = all_values((mine, error), group)
    if errors := [error for _, error in every if error]:
        raise StorageError(f"{partial}: could not be read again: {errors[0]}")
    return {name: told for files, _ in every for name, told in files.items()}


def _finish(
    partial: Path, target: Path, meta: CheckpointMeta, files: dict[str, Any], facts: dict, check: Callable[[], None]
) -> None:
    """Complete the folder ``partial`` and give it its name."""
    meta = CheckpointMeta(**{**vars(meta), "format": _FORMAT})
    manifest.write_synced(partial / META, json.dumps(vars(meta), indent=1) + "\n")
    files = {**files, META: manifest.entry(partial / META, 0)}
    manifest.write(partial, {**facts, "format": _FORMAT, "step": meta.step, "files": files})
    check()
    # A run resumed from an older checkpoint reaches this step a second time.
    if target.exists():
        _delete(target)
    partial.rename(target)
    manifest.sync_folder(target.parent)


def _sweep(folder: Path, target: Path, keep: int, keep_step: int | None) -> None:
    """Delete what ``target`` replaces: older checkpoints beyond those to keep, and what was set aside."""
    others = [path for path in _folders(folder) if path != target and step_of(path) != keep_step]
    for old in others[: max(0, len(others) + 1 - keep)] if keep else []:
        _delete(old)
    for old in folder.glob(f"{_SUPERSEDED}*"):
        _delete(old)
    # What a save that failed could not remove, on a disk that was read-only then.
    before = [path for path in folder.glob(f"step-*{_PARTIAL}*") if path.name < target.name]
    for left in (*folder.glob(f"{_DELETED}*"), *before):
        shutil.rmtree(left, ignore_errors=True)


def _delete(path: Path) -> None:
    """Delete a file or folder; a folder loses its name first, so that none ever is half a checkpoint."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(f"{_DELETED}{uuid.uuid4().hex[:8]}-{path.name}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _told(action: Callable[[], Any]) -> Any:
    """``action()``, its OSErrors as StorageErrors."""
    try:
        return action()
    except OSError as error:
        raise StorageError(f"{error.filename}: could not be written: {error.strerror}") from None


def _ended_a_run(path: Path) -> bool:
    """Whether the checkpoint is of its run's last step."""
    try:
        meta = read_meta(path)
    except ValueError:
        return False
    return meta.step == meta.config.get("run", {}).get("steps")
