"""From which checkpoint a run goes on, and what its user should know about that."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..data.encode import TOKENIZER
from . import checkpoint, manifest
from .checkpoint import CheckpointMeta
from .log import CHECKPOINTS, is_own
from .optimizer import OptimizerConfig, learning_rate
from .plan import RunPlan
from .weights import check_hf, is_hf
from .yaml_config import to_dict

# What a run may change without computing anything else than before: where it runs and what it leaves behind. Of the
# corpus the fingerprint speaks.
_SAME_RESULTS = {
    "model": ("recompute", "init_std"),
    "attention": ("deterministic", "layout"),
    "data": ("path", "pattern", "not_text"),
    "optimizer": (),
    "run": (
        "directory", "start_from", "context_size", "deterministic", "device", "validate_every", "checkpoint_every",
        "selection_maps", "selection_statistics", "tensorboard", "wandb", "trace_step", "keep_checkpoints",
        "background_save", "failed_save", "timeout_seconds",
    ),
}  # fmt: skip


AUTO = "auto"
"""What ``--resume`` is given for a command that is called again and again until the run has done all its steps."""


def resolve_auto(plan: RunPlan, damaged: dict[Path, str]) -> tuple[str | None, bool]:
    """What ``--resume auto`` comes to: (what :func:`find_checkpoint` is to be asked for, whether all steps are done).

    A run's folder without any checkpoint, which a run leaves that ended before its first, is begun anew; where there
    are checkpoints but all are damaged, the run does not begin.
    """
    folder = Path(plan.config.run.directory)
    if not checkpoint.any_in(folder / CHECKPOINTS):
        return None, False
    return "", checkpoint.read_meta(checkpoint.find(folder, damaged)).step >= plan.config.run.steps


def find_checkpoint(resume: str | None, plan: RunPlan, damaged: dict[Path, str] | None = None) -> Path | None:
    """The checkpoint to start from, checked against the run.

    A run whose schedule can be prolonged goes on from its newest checkpoint before its decay, unless ``resume`` names a
    checkpoint: what it learned at the rates of the decay belongs to the end of a run.

    Args:
        resume: what ``--resume`` was given: a checkpoint, a run's folder, "" for run.directory; None to start anew.
        plan: the run that is to start.
        damaged: checkpoints to pass over, with the reason; those found damaged on the way are added.

    Returns:
        the checkpoint's folder, None to start anew.

    Raises:
        ValueError: no checkpoint there, one of another model, or one that has done all steps of the run.
    """
    if resume is None:
        weights = plan.config.run.start_from
        if weights is not None and is_hf(weights):
            check_hf(weights, plan.config.model)
            if plan.corpus.unit == "bytes" and (Path(weights) / TOKENIZER).is_file():
                raise ValueError(
                    f"run.start_from={weights}: has a tokenizer, and the data are read as bytes; make tokens of them "
                    f"(moba-cp data build TEXT --to PREFIX --tokenizer {weights}) and set data.path=PREFIX"
                )
        elif weights is not None:
            try:
                _same_model(checkpoint.find(Path(weights)), plan, index_may_be_new=True)
            except ValueError as error:
                raise ValueError(f"run.start_from: {error}") from None
        return None
    asked, damaged = Path(resume or plan.config.run.directory), {} if damaged is None else damaged
    path = checkpoint.find(asked, damaged)
    meta = _same_model(path, plan)
    if meta.step >= plan.config.run.steps:
        raise ValueError(f"{path}: has done {meta.step} steps and run.steps={plan.config.run.steps}; raise run.steps")
    return path if path == asked else _before_decay(path, meta, plan, damaged)


def describe(path: Path, plan: RunPlan) -> list[str]:
    """What a run that goes on from ``path`` says of it: steps done and done again, learning rate before and after."""
    meta, run = checkpoint.read_meta(path), plan.config.run
    lines = [f"resumed from {path}: {meta.step} of {run.steps} steps are done"]
    newest = checkpoint.step_of(checkpoint.find_all(path.parent)[-1])
    if newest > meta.step and _is_prolonged(meta, plan):
        kept = f", and their model is kept as finished-{newest:08d}" if is_own(Path(run.directory), path) else ""
        lines.append(f"steps {meta.step + 1} to {newest}, with a falling learning rate, are done again without{kept}")
    before = _rate(meta)
    if before is not None:
        after = learning_rate(plan.config.optimizer, meta.step + 1, run.steps)
        lines.append(f"learning rate: {before:.3g} in step {meta.step}, {after:.3g} in step {meta.step + 1}")
    return lines


def notes(path: Path, plan: RunPlan, content: str | None = None) -> list[str]:
    """Why a run resumed from ``path`` will not go on exactly as the run that wrote it would have.

    Args:
        content: digest of the corpus' bytes, see :func:`.agreement.content_of`; None where they were not read.
    """
    meta = checkpoint.read_meta(path)
    saved, config = meta.config, to_dict(plan.config)
    lines = []
    if meta.format < 2:
        lines.append(f"{path} was written before checkpoints had a manifest: whether it is whole cannot be told")
    trained_on = manifest.read(path).get("content") if meta.format >= 2 and content is not None else None
    if meta.data_fingerprint != plan.corpus.fingerprint or trained_on not in (None, content):
        lines.append(f"{path} was trained on other data than {plan.corpus.source} holds now")
    if different := differences(saved, config):
        lines.append(f"this run differs from that of {path} in {', '.join(different)}")
    before, here = _rate(meta), plan.config.optimizer
    if before is not None and not math.isclose(
        before, learning_rate(here, meta.step, plan.config.run.steps), rel_tol=0.01
    ):
        lines.append("the learning rate jumps" + _why(meta, plan))
    return lines


def differences(saved: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Settings of a checkpoint's config that decide what is computed and are others in ``config``."""
    return [
        f"{section}.{key} ({saved[section][key]} there, {config[section][key]} here)"
        for section, harmless in _SAME_RESULTS.items()
        for key in config[section]
        if key not in harmless and key in saved.get(section, {}) and saved[section][key] != config[section][key]
    ]


def _before_decay(newest: Path, meta: CheckpointMeta, plan: RunPlan, damaged: dict[Path, str]) -> Path:
    """The newest checkpoint from before the decay, if ``newest`` is from within it and the run is prolonged."""
    if not _is_prolonged(meta, plan):
        return newest
    last = _optimizer_of(meta).decay_start(meta.config["run"]["steps"])
    earlier = [path for path in checkpoint.find_all(newest.parent) if checkpoint.step_of(path) <= last]
    return next((path for path in reversed(earlier) if checkpoint.is_whole(path, damaged)), newest)


def _is_prolonged(meta: CheckpointMeta, plan: RunPlan) -> bool:
    """Whether the run that wrote the checkpoint had a schedule that can be prolonged, and now has more steps."""
    there, here = _optimizer_of(meta), plan.config.optimizer
    steps = meta.config.get("run", {}).get("steps")
    return (
        steps is not None
        and there is not None
        and there.schedule == here.schedule == "wsd"
        and there.decay_start(steps) < here.decay_start(plan.config.run.steps)
    )


def _why(meta: CheckpointMeta, plan: RunPlan) -> str:
    """The reason for a jump of the learning rate, where it is the usual one."""
    there, here, steps = _optimizer_of(meta), plan.config.optimizer, plan.config.run.steps
    if there.schedule == here.schedule == "cosine" and there.lr == here.lr and meta.config["run"]["steps"] < steps:
        return (
            f": a cosine schedule over {meta.config['run']['steps']} steps is prolonged to {steps}; a run that may be "
            "prolonged starts with optimizer.schedule: wsd"
        )
    return "; name an earlier checkpoint (--resume PATH), or set optimizer.lr to the rate to go on with"


def _rate(meta: CheckpointMeta) -> float | None:
    """The learning rate of the checkpoint's last step; None where its config does not say."""
    optimizer, steps = _optimizer_of(meta), meta.config.get("run", {}).get("steps")
    return learning_rate(optimizer, meta.step, steps) if optimizer is not None and steps and meta.step else None


def _optimizer_of(meta: CheckpointMeta) -> OptimizerConfig | None:
    """The optimizer section of the config in a checkpoint; a key of a later version is left out."""
    section = meta.config.get("optimizer")
    if section is None:
        return None
    return OptimizerConfig(**{f.name: section[f.name] for f in fields(OptimizerConfig) if f.name in section})


def _same_key_conv(path: Path, there: dict, here: dict, may_be_new: bool) -> None:
    """Raise ValueError unless the convolutions over keys are as wide in both, or new."""
    width, of_checkpoint = here["key_conv"], there.get("key_conv", 0)
    if may_be_new and not of_checkpoint:
        return
    if width != of_checkpoint:
        raise ValueError(
            f"{path}: attention.key_conv is {of_checkpoint} there and {width} here, which decides the weights of "
            "convolutions over keys; leave it as it is there"
            + ("" if may_be_new or of_checkpoint else ", or begin a run with run.start_from")
        )


def _same_model(path: Path, plan: RunPlan, index_may_be_new: bool = False) -> CheckpointMeta:
    meta = checkpoint.read_meta(path)
    checkpoint.check_same_model(path, meta, to_dict(plan.config.model))
    there, here = (x.get("attention", {}) for x in (meta.config, to_dict(plan.config)))
    _same_key_conv(path, there, here, index_may_be_new)
    if index_may_be_new and (there.get("index") is None or here["index"] is None):
        return meta
    # Which layers have one depends on full_layers too.
    layers = "full_layers" if here["index"] is not None else "index"
    if different := [key for key in ("index", layers) if there.get(key) != here[key]]:
        raise ValueError(
            f"{path}: attention.{different[0]} is {there.get(different[0])} there and {here[different[0]]} here, which "
            "decides the weights of index branches; leave it as it is there"
            + ("" if index_may_be_new else ", or begin a run with run.start_from")
        )
    return meta
