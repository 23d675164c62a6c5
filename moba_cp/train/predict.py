"""What a training step takes: time, bytes between ranks and memory, by arithmetic on shapes and a few measured rates.

The rates are those of the trainer's trace and of ``bench attention`` on H100s (docs/choosing.md has predicted beside
measured figures); for another GPU they are scaled by its peak.

Legend: L tokens of a sequence on a rank, P ranks that share it, N ranks in all, D head dim, B block size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..cp.allgather.costs import COPY_RATE, forward_seconds
from ..model.attention import AttentionConfig
from ..model.config import ModelConfig
from ..model.layer import LayerMemory
from .config import TrainConfig
from .memory import GIB, NCCL_BYTES, MemoryPlan, StepShape, choose_layers, plan_layers
from .plan import check_ranks
from .trace import PEAKS


@dataclass(frozen=True)
class GPU:
    """One kind of device."""

    name: str
    peak: float
    """Dense bf16 FLOP/s."""
    gib: float
    """Memory that a program gets."""
    host_gib: float
    """Host memory beside it that may be locked; a common machine's."""
    per_node: int = 8
    """Of a machine; a common one's."""
    measured: bool = False
    """Whether rates below were measured on it."""


GPUS = {
    "h100": GPU("H100 80GB", PEAKS["H100"], 79.0, 100.0, measured=True),
    "h200": GPU("H200", PEAKS["H200"], 139.5, 100.0, measured=True),
    "a100": GPU("A100 80GB", PEAKS["A100"], 79.0, 100.0),
    "b200": GPU("B200", PEAKS["B200"], 178.0, 200.0),
}
# Of an H100: FLOP/s of linear layers; of full attention, forward and backward; of the scores that select blocks.
_LINEAR, _FULL_FORWARD, _FULL_BACKWARD, _SELECTION = 7.1e14, 5.6e14, 5.1e14, 2e14
# Seconds of MoBA's backward pass per visit of a row to a block and element of D, by block size.
_BACKWARD_BLOCKS, _BACKWARD_SECONDS = (128, 512, 4096), (4.52e-12, 13.8e-12, 76.3e-12)
# Seconds per token, layer and element of what is done element by element; per parameter of the optimizer.
_ELEMENTWISE, _OPTIMIZER = 1.8e-12, 1.5e-11
# Of attention's kernels with each doubling of the ranks that share a sequence: blocks have fewer rows.
_THINNER = 0.08
# Bytes per second of a rank between nodes, and the share of an all-gather that the exchange moves there: of a
# concentrated gate and of a uniform one (docs/exchange.md).
_BETWEEN_NODES, _EXCHANGED = 4.8e10, (0.13, 0.49)


@dataclass(frozen=True)
class Forecast:
    """A step on one rank."""

    config: TrainConfig
    ranks: int
    context: int
    """P."""
    memory: MemoryPlan | None
    """None: it does not fit."""
    seconds: dict[str, float]
    """By part; parts that overlap are not all of the step."""
    bytes: dict[str, float]
    """That a rank receives in a step, by way."""

    @property
    def step_seconds(self) -> float:
        """Of the whole step: what computes, or what moves if that takes longer."""
        computing = sum(self.seconds[name] for name in self.seconds if not name.startswith("moving"))
        return max(computing, *(self.seconds[name] for name in self.seconds if name.startswith("moving")))

    @property
    def limit(self) -> str:
        """What takes most of the step."""
        computing = {name: x for name, x in self.seconds.items() if not name.startswith("moving")}
        moving = {name: x for name, x in self.seconds.items() if name.startswith("moving")}
        slowest = max(moving, key=moving.get)
        return slowest if moving[slowest] > sum(computing.values()) else max(computing, key=computing.get)

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.config.data.seq_len * self.config.data.sequences_per_step / self.step_seconds


def forecast(
    config: TrainConfig,
    ranks: int,
    gpu: GPU,
    per_node: int | None = None,
    host_gib: float | None = None,
    layers: Sequence[LayerMemory] | None = None,
    gathered: bool = False,
) -> Forecast:
    """What a step of ``config`` takes on ``ranks`` devices.

    Args:
        per_node: devices of a machine; None: the usual.
        host_gib: host memory of a rank; None: the usual.
        layers: what each keeps for backward; None: what fits and computes least again.
        gathered: of ``layers``, whether their weights stay gathered between the passes.

    Raises:
        ValueError: what a run on so many ranks would refuse.
    """
    config, context = check_ranks(config, ranks)
    per_node = gpu.per_node if per_node is None else per_node
    groups = ranks // context
    model, attention = config.model, config.attention.at(config.run.steps, config.run.steps)
    local = -(-config.data.seq_len // context)
    itemsize = getattr(torch, config.run.dtype).itemsize
    state, exchange = (config.optimizer.moments, config.memory.state), config.exchange
    if exchange.ranks_per_node is None and context > per_node:
        exchange = replace(exchange, ranks_per_node=per_node)
    shape = StepShape(model, attention, local, ranks, itemsize, *state, context, exchange)
    device = (config.memory.device_gib or gpu.gib) * GIB - NCCL_BYTES * (ranks > 1)
    host = (config.memory.host_gib or (gpu.host_gib if host_gib is None else host_gib)) * GIB
    if layers is not None:
        plan = plan_layers(shape, layers, gathered)
    else:
        plan = choose_layers(shape, model.recompute, config.memory.offload, device, host)
    sequences = config.data.sequences_per_step // groups
    seconds = _computing(config, attention, local, context, plan, gpu, sequences) | {
        "optimizer": _OPTIMIZER * shape.n_parameters / ranks
    }
    gathers = 1 if plan is not None and plan.gathered else 2
    moved = _moving(model, attention, config, ranks, context, per_node, sequences, gathers)
    # Weights and K and V go over the same links.
    rates = {"within a node": COPY_RATE, "between nodes": _BETWEEN_NODES}
    for where, rate in rates.items():
        seconds[f"moving {where}"] = sum(n for name, n in moved.items() if name.endswith(where)) / rate
    return Forecast(config, ranks, context, plan, seconds, moved)


def longest(
    config: TrainConfig, ranks: int, gpu: GPU, per_node: int | None = None, host_gib: float | None = None
) -> int:
    """Tokens of the longest sequence that fits on ``ranks`` that share it, to a part in 64; 0 if none does, or if the
    config does not let so many share one."""
    shared = replace(config, run=replace(config.run, context_size=None))
    unit = 2 * ranks * config.attention.block_size

    def fits(n: int) -> bool:
        data = replace(config.data, seq_len=n * unit, sequences_per_step=1, gradient_accumulation=None, overlap=0)
        return forecast(replace(shared, data=data), ranks, gpu, per_node, host_gib).memory is not None

    try:
        fits(1)
    except ValueError:
        return 0
    low, high = 0, 1
    while fits(high) and high * unit < 2**31:
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def candidates(
    config: TrainConfig, ranks: int, gpu: GPU, per_node: int | None, host_gib: float | None
) -> list[Forecast]:
    """Forecasts that fit, for every number of ranks that may share a sequence, the fastest first."""
    found = []
    for context in (n for n in range(1, ranks + 1) if ranks % n == 0):
        tried = replace(config, run=replace(config.run, context_size=context))
        try:
            found.append(forecast(tried, ranks, gpu, per_node, host_gib))
        except ValueError:
            # A run would refuse so many.
            continue
    return sorted((x for x in found if x.memory is not None), key=lambda x: x.step_seconds)


def _computing(
    config: TrainConfig,
    attention: AttentionConfig,
    local: int,
    context: int,
    plan: MemoryPlan | None,
    gpu: GPU,
    sequences: int,
) -> dict[str, float]:
    """Seconds of all sequences of a rank, by part."""
    model = config.model
    scale = sequences * PEAKS["H100"] / gpu.peak
    n = model.n_layers
    policies = [layer.recompute for layer in plan.layers] if plan is not None else ["full"] * n
    redone, again = sum(policy != "none" for policy in policies) / n, sum(policy == "full" for policy in policies) / n
    of_layers = n * model.layer_matrices
    output = model.vocab_size * model.hidden_size
    # Forward, two products in backward, and what is redone; of logits always.
    linear = 2 * local * ((3 + redone) * of_layers + 4 * output) / _LINEAR
    full = len(attention.full_layer_numbers(n))
    forward, backward = moba_layer(model, attention, config.data.seq_len, context)
    full_forward, full_backward = _full_layer(model, config.data.seq_len, local)
    heads = model.n_heads + 2 * model.n_kv_heads
    width = 6 * model.hidden_size + 4 * model.ffn_hidden_size + 2 * model.head_dim * heads
    return {
        "linear layers": scale * linear,
        "MoBA": scale * (n - full) * ((1 + again) * forward + backward),
        "full attention": scale * full * ((1 + again) * full_forward + full_backward),
        "element by element": scale * _ELEMENTWISE * local * n * width * (1 + redone / 3),
    }


def moba_layer(model: ModelConfig, attention: AttentionConfig, seq_len: int, context: int) -> tuple[float, float]:
    """Seconds that attention of a MoBA layer takes an H100, forward and backward, for one document on ``context``
    ranks."""
    local, thinner = -(-seq_len // context), 1 + _THINNER * np.log2(context)
    top_k = min(attention.top_k, -(-seq_len // attention.block_size))
    rows, dim, block = local * model.n_heads, model.head_dim, attention.block_size
    # 2 FLOP each, of the half that is earlier, by a mean or by every key.
    scores = rows * dim * (seq_len / block if attention.score == "mean" else seq_len)
    forward = forward_seconds(rows, dim, block, top_k) + scores / _SELECTION
    backward = rows * top_k * dim * float(np.interp(block, _BACKWARD_BLOCKS, _BACKWARD_SECONDS))
    return thinner * forward, thinner * backward


def _full_layer(model: ModelConfig, seq_len: int, local: int) -> tuple[float, float]:
    products = 2 * local * seq_len * model.n_heads * model.head_dim
    return products / _FULL_FORWARD, 2.5 * products / _FULL_BACKWARD


def _moving(
    model: ModelConfig,
    attention: AttentionConfig,
    config: TrainConfig,
    ranks: int,
    context: int,
    per_node: int,
    sequences: int,
    gathers: int,
) -> dict[str, float]:
    """Bytes that a rank receives in a step."""
    moved = {}
    # Weights are gathered in 16 bits and their gradients summed in 32, for each sequence.
    weights = sequences * (2 * gathers + 4) * model.n_parameters_with(attention) * (ranks - 1) / ranks
    moved[f"weights, {'between nodes' if ranks > per_node else 'within a node'}"] = weights
    # K and V of what a rank can see, twice, and their gradients: three quarters of it in zigzag.
    token = 2 * model.n_kv_heads * model.head_dim * 2
    gathered = sequences * 3 * 0.75 * token * config.data.seq_len * (context - 1) / context
    full = len(attention.full_layer_numbers(model.n_layers))
    where = "between nodes" if context > per_node else "within a node"
    share = _EXCHANGED[1] if context > per_node else 1.0
    moved[f"MoBA layers, {where}"] = share * gathered * (model.n_layers - full)
    moved[f"full layers, {where}"] = gathered * full
    # Attention's keys come once more for what index branches learn from.
    branches = sum(attention.has_index(layer, model.n_layers) for layer in range(1, model.n_layers + 1))
    keys = sequences * token / 2 * config.data.seq_len * (context - 1) / context
    moved[f"index branches, {where}"] = keys * branches
    return {name: n for name, n in moved.items() if n}
