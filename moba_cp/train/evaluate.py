"""A model on held-out data, without training."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..megatron.hf_config import model_config_of
from ..megatron.model import build_model
from ..model.attention import AttentionConfig
from . import checkpoint
from .batch import Batches
from .config import TrainConfig
from .loop import shard_weights
from .mesh import Mesh, launched_size, open_mesh
from .plan import plan_run
from .positions import LossByPosition
from .weights import is_hf, load_weights
from .yaml_config import build, override, to_dict


def run_of(model: str, overrides: list[str]) -> tuple[TrainConfig, Path, int]:
    """The config that a model was trained with, where its weights are, and the step they are of.

    Args:
        model: a run's folder, a checkpoint, or a folder of Hugging Face's, which attends fully.
        overrides: ``SECTION.KEY=VALUE``.
    """
    if is_hf(model):
        config, path, step = (
            TrainConfig(model=model_config_of(model), attention=AttentionConfig("full")),
            Path(model),
            0,
        )
    else:
        path = checkpoint.find(Path(model))
        meta = checkpoint.read_meta(path)
        config, step = build(TrainConfig, meta.config), meta.step
    values = to_dict(config)
    for text in overrides:
        override(TrainConfig, values, text)
    return build(TrainConfig, values), path, step


def model_with(weights: str | Path, config: TrainConfig, attention: AttentionConfig, mesh: Mesh) -> nn.Module:
    """The config's model with ``weights``, for evaluation; a collective call of the mesh's ranks.

    Args:
        weights: a run's folder, a checkpoint, or a folder of Hugging Face's.
        attention: of one phase, where the config has a schedule.
    """
    module = build_model(config.model, attention, cp_group=mesh.context_group, device="meta")
    module = shard_weights(module, mesh, getattr(torch, config.run.dtype))
    module.to_empty(device=mesh.device)
    load_weights(weights, module, mesh.group)
    return module.eval()


@torch.no_grad()
def evaluate(config: TrainConfig, weights: Path, step: int) -> tuple[dict[str, Any], Mesh]:
    """Loss and what follows from it; a collective call of all ranks that were launched.

    Args:
        config: whose validation data are used.
        weights: a checkpoint, or a folder of Hugging Face's.
        step: of the weights, which decides the attention where it has a schedule.

    Returns:
        the figures, the same on all ranks, and the ranks' mesh, which the caller closes.
    """
    attention = config.attention.at(max(step, 1), config.run.steps)
    plan = plan_run(replace(config, attention=attention), launched_size())
    if plan.validation_sequences is None:
        raise ValueError("data.validation_share=0: the run held nothing out; name data to evaluate on (--data PATH)")
    mesh = open_mesh(config.run)
    module = model_with(weights, config, attention, mesh)
    sums = LossByPosition(config.data.seq_len, mesh.device, config.run.position_range)
    batches = Batches(plan, mesh)
    for batch in batches.validation():
        loss = module(batch.tokens, batch.labels, batch.context)
        sums.add(loss, batch.labels, batch.context.document_positions)
    loss, by_position = sums.reduce(mesh.group)
    if loss is None:
        raise ValueError("the data have no token of which a loss could be taken (documents of one token, or a mask)")
    bytes_per_token = plan.corpus.validation[0].bytes_per_token if len(plan.corpus.validation) == 1 else None
    for row in by_position:
        row["bits_per_byte"] = _bits(row["loss"], bytes_per_token)
    figures = {
        "model": str(weights),
        "attention": attention.default,
        "data": config.data.validation_path or plan.corpus.source,
        "sequences": min(config.data.validation_sequences, plan.validation_sequences.per_epoch),
        "seq_len": config.data.seq_len,
        "loss": loss,
        "bits_per_byte": _bits(loss, bytes_per_token),
        "labels": sum(row["labels"] for row in by_position),
        "by_position": by_position,
    }
    return figures, mesh


def _bits(loss: float, bytes_per_token: float | None) -> float | None:
    return None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
