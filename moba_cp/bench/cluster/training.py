"""A training step of a small model, by the trainer's own code: Megatron-core, FSDP2 and AdamW on the first P ranks."""

import statistics
from dataclasses import replace
from importlib.util import find_spec

import torch

from .inputs import Shape
from .measure import PeerUse
from .ranks import Ranks
from .rows import Row

WARM_STEPS = 4


def missing() -> str | None:
    """Why no training step can be measured here; None if it can."""
    return None if find_spec("megatron") else "no training step is measured: megatron-core is not installed"


def measure_step(shape: Shape, kind: str, n_tokens: int, size: int, steps: int, ranks: Ranks) -> Row:
    """The row of a model whose layers all attend by ``kind`` (``moba`` or ``full``); collective over ``size`` ranks.

    The model has four layers of ``heads / 2`` heads of the shape; a step is one sequence of ``n_tokens`` bytes, spread
    over all ranks.
    """
    row = Row("training", n_tokens, size, kind)
    problem = None
    try:
        trainer = _trainer(shape, kind, n_tokens, size, ranks)
        shared = PeerUse(trainer.batches.comm.peers())
        records = [trainer.train_step() for _ in range(WARM_STEPS)]
        if ranks.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps):
            records.append(trainer.train_step())
            times.append(ranks.most(1e3 * records[-1]["seconds"], size))
        row.loss = records[-1]["loss"]
    except Exception as error:
        lines = str(error).strip().splitlines()
        problem = f"failed: {type(error).__name__}: {lines[0][:120] if lines else ''}"
    row.note = ranks.problem(problem, size) or ""
    if not row.note:
        row.both, row.both_spread, row.repeats = statistics.median(times), max(times) - min(times), steps
        row.received_gb = records[-1]["exchange"]["received_bytes"] / size / 1e9
        if ranks.on_gpu:
            row.peak_gib = ranks.most((torch.cuda.max_memory_allocated() + shared.nbytes) / 2**30, size)
    trainer = None
    if ranks.on_gpu:
        torch.cuda.empty_cache()
    return row


def _trainer(shape: Shape, kind: str, n_tokens: int, size: int, ranks: Ranks):
    from torch.distributed.device_mesh import DeviceMesh

    from ...megatron.config import ModelConfig
    from ...megatron.hybrid import AttentionConfig
    from ...train.config import RunConfig, TrainConfig
    from ...train.loop import Trainer
    from ...train.mesh import Mesh
    from ...train.plan import plan_run
    from ...train.text import DataConfig

    group = ranks.group(size)
    heads, kv_heads = max(1, shape.heads // 2), max(1, shape.kv_heads // 2)
    moba = shape.moba
    config = TrainConfig(
        model=ModelConfig(
            n_layers=4, hidden_size=heads * shape.dim, n_heads=heads, n_kv_heads=kv_heads, head_dim=shape.dim
        ),
        attention=AttentionConfig(default=kind, block_size=moba.block_size, top_k=moba.top_k, layout=shape.layout),
        data=DataConfig(seq_len=n_tokens, validation_share=0.0),
        run=replace(RunConfig(), steps=1000, dtype="bfloat16" if ranks.on_gpu else "float32"),
    )
    mesh = Mesh(
        rank=ranks.rank, size=size, device=ranks.device, data_rank=0, data_size=1, context_group=group,
        context_size=size, shard_mesh=DeviceMesh.from_group(group, ranks.device.type), group=group,
    )  # fmt: skip
    return Trainer(plan_run(config, size), mesh, None)
