"""Where the weights that a run begins with come from: a checkpoint of this library, or of Hugging Face's models."""

from pathlib import Path

import torch.distributed as dist
from torch import nn

from ..megatron.hf import load_hf
from ..megatron.hf_config import describe, model_config_of, read_config
from ..model.config import ModelConfig
from . import checkpoint


def is_hf(path: str | Path) -> bool:
    """Whether ``path`` is a folder of a model of Hugging Face's: with a ``config.json`` and no checkpoint of ours."""
    path = Path(path)
    return (path / "config.json").is_file() and not (path / checkpoint.META).is_file()


def load_weights(path: str | Path, module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Fill ``module``, sharded or not, with the weights that ``path`` names; collective over all ranks.

    Raises:
        ValueError: no weights there, or those of another model.
    """
    if is_hf(path):
        load_hf(module, path, same_rotary=False)
    else:
        checkpoint.load_weights(checkpoint.find(Path(path)), module, group)


def check_hf(path: str | Path, model: ModelConfig) -> None:
    """Raise ValueError unless the folder of Hugging Face's holds the weights of ``model``, whatever its rotary
    embedding."""
    different = checkpoint.model_differences(vars(model_config_of(path)), vars(model))
    if different:
        raise ValueError(
            f"run.start_from={path}: another model: {', '.join(different)}; moba-cp import writes a config that fits"
        )


def remarks(path: str | Path, model: ModelConfig) -> list[str]:
    """What should be said before training goes on with the weights in ``path``."""
    if not is_hf(path):
        return []
    hf = describe(read_config(path), f"{path}/config.json")
    lines = [f"weights: {path}, {hf.model_type} of Hugging Face's"]
    if (hf.rope_base, hf.rope_scaling) != (model.rope_base, model.rope_scaling):
        lines.append(
            f"note: the rotary embedding is another one than that of the weights: rope_base {hf.rope_base:g} there, "
            f"{model.rope_base:g} here; rope_scaling {hf.rope_scaling} there, {model.rope_scaling} here"
        )
    return lines
