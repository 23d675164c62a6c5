"""Checkpoints that any number of ranks can read; a partly written one is never taken for a complete one.

A checkpoint is a folder ``step-00000500`` of torch.distributed.checkpoint files (weights and optimizer state, each
rank its shard) and ``meta.json`` (step, config, data fingerprint). It is written under another name and renamed at the
end. The order of the data and all random numbers depend on the seed and the step alone, so a checkpoint holds no state
of a data loader or a generator.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

_NAME = re.compile(r"step-(\d{8,})$")
_PARTIAL = ".partial"
META = "meta.json"
# Settings in which runs of one model may differ: how it computes, its initial weights, and the base of its RoPE (for
# longer sequences).
_NOT_THE_MODEL = ("recompute", "init_std", "rope_base")


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


def save(
    folder: Path,
    meta: CheckpointMeta,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    keep_step: int | None = None,
) -> Path:
    """Write a checkpoint into ``folder``, the newest of the ``keep`` that stay (0: all); collective over all ranks.

    The checkpoint of ``keep_step`` stays whatever its age, and is not counted.
    """
    target = folder / f"step-{meta.step:08d}"
    partial = target.with_name(target.name + _PARTIAL)
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(_state(module, optimizer), checkpoint_id=partial)
    if first:
        (partial / META).write_text(json.dumps(vars(meta), indent=1) + "\n")
        # A run resumed from an older checkpoint reaches this step a second time.
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        others = [path for path in find_all(folder) if path != target and step_of(path) != keep_step]
        for old in others[: max(0, len(others) + 1 - keep)] if keep else []:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return target


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read weights and optimizer state in place; collective over all ranks, of any number."""
    state = _state(module, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def load_weights(path: Path, module: nn.Module) -> None:
    """Read weights alone in place; collective over all ranks, of any number."""
    state = get_model_state_dict(module)
    dcp.load({"model": state}, checkpoint_id=path)
    set_model_state_dict(module, state)


def find(path: Path) -> Path:
    """The checkpoint that ``path`` names: itself, or the newest under it or under its folder ``checkpoints``.

    Raises:
        ValueError: there is none.
    """
    if (path / META).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := find_all(folder):
            return found[-1]
    raise ValueError(f"{path}: no checkpoint there; give a run's folder or one of its checkpoints/step-* folders")


def read_meta(path: Path) -> CheckpointMeta:
    """The ``meta.json`` of a checkpoint."""
    try:
        return CheckpointMeta(**json.loads((path / META).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path / META}: not a checkpoint of this library ({error})") from None


def check_same_model(path: Path, meta: CheckpointMeta, model: dict[str, Any]) -> None:
    """Raise ValueError unless the checkpoint holds the model that the config section ``model`` describes."""
    saved = meta.config.get("model", {})
    different = [
        f"model.{key} is {saved.get(key)} there and {model.get(key)} here"
        for key in {**saved, **model}
        if saved.get(key) != model.get(key) and key not in _NOT_THE_MODEL
    ]
    if different:
        raise ValueError(
            f"{path}: a checkpoint of another model: {', '.join(different)}; set the same values, or start anew in "
            "another folder"
        )


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints in ``folder`` of steps after ``step`` (0: all), and partial ones.

    For a ``step`` above 0, the last checkpoint of a run that had ended stays, as ``finished-00000160``: a run that is
    prolonged from before its decay does not take the trained model away.
    """
    for path in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(path)
    for path in find_all(folder):
        if step_of(path) > step:
            if step and _ended_a_run(path):
                finished = path.with_name(f"finished-{step_of(path):08d}")
                shutil.rmtree(finished, ignore_errors=True)
                path.rename(finished)
            else:
                shutil.rmtree(path)
    for path in [] if step else folder.glob("finished-*"):
        shutil.rmtree(path)


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(module, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _ended_a_run(path: Path) -> bool:
    """Whether the checkpoint is of its run's last step."""
    try:
        meta = read_meta(path)
    except ValueError:
        return False
    return meta.step == meta.config.get("run", {}).get("steps")


def find_all(folder: Path) -> list[Path]:
    """Whole checkpoints in ``folder``, oldest step first."""
    if not folder.is_dir():
        return []
    paths = [folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)]
    return sorted((path for path in paths if (path / META).is_file()), key=step_of)


def step_of(path: Path) -> int:
    """Optimizer steps that the checkpoint ``path`` has done, by its name."""
    return int(_NAME.fullmatch(path.name)[1])
