"""What a training step takes on each rank, and which layers keep what, and where, so that it fits.

Sizes follow from shapes, so they are known before anything runs; ``docs/long.md`` has them beside measured ones.

Legend: L tokens of a sequence on this rank, H hidden size, F width of the SwiGLU, V vocabulary, h query heads,
g key/value heads, D head dim, P ranks.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist

from ..cp.buffers import buffer_bytes, planned_team
from ..cp.heads.choice import Layer
from ..cp.heads.costs import HeadCosts
from ..cp.options import ExchangeOptions
from ..index.config import IndexConfig
from ..model.attention import AttentionConfig
from ..model.config import ModelConfig
from ..model.layer import SHORTEST_SLICE, SLICE_ELEMENTS, LayerMemory
from ..model.loss import MAX_LOGITS

GIB = 2**30
# Of the device's memory, for what the allocator cannot use again, and for workspaces of libraries.
_SLACK = 0.03
# Of each rank's device, for NCCL's groups, once their ranks have met: 2.1 GiB on four H200s.
NCCL_BYTES = 2 * GIB
# Of the host's free memory: the rest is for data, the page cache and everybody else.
_HOST_SHARE = 0.8
# Scratch of the attention kernels where queries are smaller; what one KV head may take before its rows are cut; what a
# row takes for each block that it visits, besides a row of D elements (kernels/work.py).
_FORWARD_SCRATCH, _BACKWARD_SCRATCH, _WHOLE_HEAD = 5 << 28, 3 << 28, 9 << 28
_FORWARD_VISIT, _BACKWARD_VISIT = 4, 20
# Of an index branch: a few tensors of as many float64 as eager/index_choice.py allows for; the kernels take less.
_INDEX_SCRATCH = 3 << 30
_MOMENT_BYTES = {"float32": 8, "bfloat16": 4}


@dataclass(frozen=True)
class MemoryConfig:
    """Where what waits for the backward pass is kept. What is computed again is ``model.recompute``."""

    offload: Literal["auto", "none", "all"] = "auto"
    """Which layers keep it in host memory: as many as need be, none, or all. On a CPU: none."""

    state: Literal["device", "host"] = "device"
    """Where weights, their gradients and the optimizer's moments are, in float32. ``host``: the CPU computes the
    optimizer's step, which takes longer and gives back 16 bytes of device memory for each parameter of the rank."""

    device_gib: float | None = None
    """Device memory that a rank may take, in GiB; null for what is free. A run that needs more ends before its first
    step."""

    host_gib: float | None = None
    """Host memory that a rank may lock for offloading, in GiB; null for its share of most of what is free."""

    def __post_init__(self):
        for name in ("device_gib", "host_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} is not above 0; use null for what is free")


@dataclass(frozen=True)
class StepShape:
    """What the memory of a step depends on, but for what layers keep."""

    model: ModelConfig
    attention: AttentionConfig
    n_tokens: int
    """L of the longest sequence."""
    size: int
    """P."""
    itemsize: int
    """Bytes of an element in forward and backward."""
    moments: str = "float32"
    """``optimizer.moments``."""
    state_on: str = "device"
    """``memory.state``."""
    context: int = 1
    """Ranks that share a sequence."""
    exchange: ExchangeOptions = ExchangeOptions()
    """What moves between these."""

    def _row(self, *widths: int) -> int:
        return self.n_tokens * sum(widths) * self.itemsize

    @property
    def _heads(self) -> tuple[int, int]:
        """Width of queries, and of keys and values together."""
        model = self.model
        assert model.head_dim and model.n_kv_heads
        return model.n_heads * model.head_dim, 2 * model.n_kv_heads * model.head_dim

    def kept(self, layer_number: int, recompute: str) -> int:
        """Bytes that a layer keeps for its backward pass."""
        queries, keys = self._heads
        hidden, moba, index = self.model.hidden_size, self._is_moba(layer_number), self._index_branch(layer_number)
        shares = index is not None or self.attention.moba.gate.shared
        choosers = (self.model.n_kv_heads or 1) if shares else self.model.n_heads
        selection = self.n_tokens * choosers * 4 * (self.attention.top_k - 1) * moba
        # The gradient of the index branch's weights is there from the forward pass on.
        of_index = index.width(self.model.n_kv_heads) * hidden * self.itemsize if index is not None else 0
        if recompute == "full":
            return self._row(hidden) + of_index + (selection if index is not None else 0)
        # lse and, of MoBA, the selection: 4 bytes each.
        small = self.n_tokens * self.model.n_heads * 4 + selection + of_index
        if recompute == "attention_kept":
            return self._row(hidden, queries) + small
        before = keys // 2 if self.attention.key_conv else 0
        return self._row(hidden, 2 * queries, keys, before) + self._ffn() + small + self._index(layer_number)

    def _index_branch(self, layer_number: int) -> IndexConfig | None:
        return self.attention.index if self.attention.has_index(layer_number, self.model.n_layers) else None

    @property
    def _index_pass(self) -> int:
        """What an index branch takes at the most while it learns: queries, keys, their gradients and scratch; across
        ranks that share a sequence attention's keys of all of them, one KV head's at a time, and, of a branch that
        reads every key, all its keys and their gradients."""
        index, model = self.attention.index, self.model
        if index is None:
            return 0
        of_scorer = self.n_tokens * model.n_kv_heads * (index.heads + 1) * index.dim
        here = of_scorer * (self.itemsize + 8) + _INDEX_SCRATCH
        if self.context == 1:
            return here
        # As they come and in order; gradients as each head's, together, as they leave and as they come.
        gathered = 2 * model.head_dim * self.itemsize
        if index.score == "max":
            gathered += model.n_kv_heads * index.dim * (self.itemsize + 4 * 4)
        return here + self.context * self.n_tokens * gathered

    @property
    def n_parameters(self) -> int:
        """Of the model, its index branches and its convolutions over keys, embeddings included."""
        return self.model.n_parameters_with(self.attention)

    def _is_moba(self, layer_number: int) -> bool:
        return self.attention.kind(layer_number, self.model.n_layers) == "moba"

    def _index(self, layer_number: int) -> int:
        """MoBA's routing index."""
        return self.n_tokens * self.model.n_heads * 4 * self.attention.top_k * self._is_moba(layer_number)

    def _ffn(self) -> int:
        """What a layer that redoes nothing keeps of its feed-forward network."""
        assert self.model.ffn_hidden_size
        return self._row(self.model.hidden_size, 2 * self.model.ffn_hidden_size)

    def _slice(self, *widths: int) -> int:
        """Of a slice of the sequence."""
        assert self.model.ffn_hidden_size
        rows = min(self.n_tokens, max(SHORTEST_SLICE, SLICE_ELEMENTS // (2 * self.model.ffn_hidden_size)))
        return rows * sum(widths) * self.itemsize

    def forward(self) -> int:
        """Bytes that exist at the most while one layer computes, beside what is kept of it."""
        queries, keys = self._heads
        hidden, ffn = self.model.hidden_size, self.model.ffn_hidden_size
        before = keys // 2 if self.attention.key_conv else 0
        attention = self._row(queries, keys, before) + self._scratch(_FORWARD_SCRATCH, _FORWARD_VISIT)
        learning = self._row(queries, keys) + self._row(queries) + self._index_pass
        return self._row(hidden) + max(attention, learning, self._slice(3 * ffn, 2 * hidden))

    def backward(self, layer_number: int, recompute: str) -> int:
        """Bytes that exist at the most while one layer's backward pass computes, beside what was kept of it."""
        queries, keys = self._heads
        hidden, ffn = self.model.hidden_size, self.model.ffn_hidden_size
        qkv, redo = self._row(queries, keys, keys // 2 if self.attention.key_conv else 0), recompute != "none"
        # What comes from behind, the gradient that goes on, and that of attention's output.
        grads = self._row(2 * hidden, queries)
        in_ffn = self._slice((4 + 2 * redo) * ffn, 3 * hidden)
        if recompute == "full":
            in_ffn += qkv + self._row(queries)
        index = redo * self._index(layer_number)
        in_attention = (1 + redo) * qkv + index + self._scratch(_BACKWARD_SCRATCH, _BACKWARD_VISIT)
        in_attention += self._row(queries) if recompute == "full" else -self._ffn() if not redo else 0
        return grads + max(in_ffn, in_attention)

    def _scratch(self, least: int, visit_bytes: int) -> int:
        """Of the attention kernels: as large as queries, or enough for one KV head's rows, of all ranks where these
        exchange tokens for heads."""
        scratch = max(least, self._row(self._heads[0]))
        assert self.model.head_dim
        head = self._visits * (self.model.head_dim * self.itemsize + visit_bytes)
        return max(scratch, head) if head <= max(scratch + scratch // 8, _WHOLE_HEAD) else scratch

    @cached_property
    def _visits(self) -> int:
        """Of blocks by one KV head's rows. Kept: a search for what fits asks for every layer of every plan."""
        layer = self._layer(True)
        costs = HeadCosts(planned_team(layer, self.exchange), *layer[1:-1], self.exchange)
        return costs.h * self.n_tokens * costs.unit * self.attention.top_k

    def loss(self) -> int:
        """Bytes that exist at the most in the loss: hidden states, their norm and its gradient, slices of logits."""
        model = self.model
        logits = min(self.n_tokens * model.vocab_size, MAX_LOGITS) * self.itemsize
        return self._row(4 * model.hidden_size) + 2 * logits + 6 * model.vocab_size * model.hidden_size

    def state(self, gathered: bool = False) -> dict[str, int]:
        """Bytes that stand through the whole step, by part; ``gathered``: weights of all layers among them."""
        model = self.model
        of_index = self.n_parameters - model.n_parameters(embeddings=True)
        layers = (model.n_parameters() + of_index) // model.n_layers
        embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
        # The embedding and the output layer stay gathered; of the layers all, or two at a time; one with its gradient.
        at_once = 1 + (max(2, model.n_layers) if gathered else 2)
        whole = self.itemsize * (2 * embeddings + at_once * layers) + 4 * (embeddings + layers)
        here = (self.state_on == "device") * self.n_parameters // self.size
        parts = {"weights": 4 * here, "moments": _MOMENT_BYTES[self.moments] * here, "gathered weights": whole}
        return parts | ({"buffers between ranks": self.buffers()} if self.context > 1 else {})

    def buffers(self) -> int:
        """Bytes in which rows of other ranks stand; layers of one kind after the other use the same."""
        kinds = {self._is_moba(number) for number in range(1, self.model.n_layers + 1)}
        return max(buffer_bytes(self._layer(kind), self.exchange) for kind in kinds)

    def _layer(self, is_moba: bool) -> Layer:
        """What ranks that share a sequence know of a layer."""
        model, moba = self.model, (self.attention.block_size, self.attention.top_k)
        assert model.head_dim and model.n_kv_heads
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.itemsize]
        heads = model.n_heads, model.n_kv_heads
        return Layer(self.context, self.n_tokens, heads, model.head_dim, dtype, moba if is_moba else None)

    def gradients(self, n_layers: int) -> int:
        """Bytes of the weights' gradients once the backward passes of the last ``n_layers`` are done."""
        share = n_layers / self.model.n_layers
        return int(share * 4 * (self.state_on == "device") * self.n_parameters / self.size)


@dataclass(frozen=True)
class MemoryPlan:
    """What each layer keeps, where, and what a step then takes on this rank, in bytes."""

    layers: tuple[LayerMemory, ...]
    parts: dict[str, int]
    """On the device, by part."""
    host: int
    """In host memory."""
    gathered: bool = False
    """Whether a layer's weights stay gathered from its forward to its backward pass."""

    @property
    def device(self) -> int:
        """On the device, in all."""
        return sum(self.parts.values())

    @property
    def kept(self) -> str:
        """How many layers keep what, in words."""
        names = (layer.recompute + (" in host memory" if layer.to_host else "") for layer in self.layers)
        return ", ".join(f"{count} x {name}" for name, count in Counter(names).items())

    def lines(self) -> list[str]:
        """For the terminal."""
        parts = ", ".join(f"{name} {nbytes / GIB:.2f}" for name, nbytes in self.parts.items())
        host = f"; {self.host / GIB:.2f} GiB in host memory" if self.host else ""
        again = ", weights stay gathered" if self.gathered else ""
        return [f"recompute: {self.kept}{again}", f"memory: {self.device / GIB:.2f} GiB a rank ({parts}){host}"]


def plan_layers(shape: StepShape, layers: Sequence[LayerMemory], gathered: bool = False) -> MemoryPlan:
    """What a step takes with these layers: by part at the moment when it takes most."""
    n, state = len(layers), shape.state(gathered)
    kept = [shape.kept(i, layer.recompute) for i, layer in enumerate(layers, 1)]
    here = [nbytes * (not layer.to_host) for nbytes, layer in zip(kept, layers, strict=True)]
    away = [nbytes * layer.to_host for nbytes, layer in zip(kept, layers, strict=True)]
    moments = [(sum(here), 0, shape.loss()), (0, shape.gradients(n), 0)]
    for i, layer in enumerate(layers):
        # What the layer before keeps is leaving; in backward, its own is back and that of the layer before comes.
        leaving = away[i - 1] if i else 0
        moments.append((sum(here[: i + 1]), 0, shape.forward() + leaving))
        behind = shape.backward(i + 1, layer.recompute) + away[i] + leaving
        moments.append((sum(here[: i + 1]), shape.gradients(n - i - 1), behind))
    standing, gradients, most = max(moments, key=sum)
    parts = state | {"gradients": gradients, "kept for backward": standing, "one layer": most}
    return MemoryPlan(tuple(layers), parts, sum(away), gathered)


def choose_layers(
    shape: StepShape, recompute: str, offload: str, device_bytes: float, host_bytes: float
) -> MemoryPlan | None:
    """The plan that computes least again and fits; None if none does.

    Layers that keep more come last: they are the first whose memory backward gives back. What goes to the host is that
    of the first layers, which has the longest way to come back.

    Args:
        recompute: ``auto``, or what all layers do.
        offload: see :class:`MemoryConfig`.
    """
    n = shape.model.n_layers
    if recompute in ("auto", "none") and offload != "all" and shape.state_on == "device":
        # Where memory is plenty weights need not be gathered again, either.
        plan = plan_layers(shape, [LayerMemory()] * n, gathered=True)
        if plan.device <= device_bytes * (1 - _SLACK):
            return plan
    for n_none in range(n, -1, -1):
        # How many layers keep attention, and how many their input alone.
        splits = range(n - n_none, -1, -1) if n_none == 0 else (n - n_none,)
        for n_attention in splits:
            policies = ["full"] * (n - n_none - n_attention) + ["attention_kept"] * n_attention + ["none"] * n_none
            if recompute != "auto" and set(policies) != {recompute}:
                continue
            # What a layer keeps that redoes nothing would take longer to move than the layer takes to compute.
            movable = n if recompute == "none" else n - n_none
            for n_host in (n,) if offload == "all" else (0,) if offload == "none" else range(movable + 1):
                layers = [LayerMemory(policy, i < n_host) for i, policy in enumerate(policies)]
                plan = plan_layers(shape, layers)
                if plan.host > host_bytes:
                    break
                if plan.device <= device_bytes * (1 - _SLACK):
                    return plan
    return None


def choose(
    config, size: int, n_tokens: int, device: torch.device, group: dist.ProcessGroup | None, context: int = 1
) -> MemoryPlan:
    """The plan of a run on its ranks, all of which choose alike; a collective call.

    Args:
        size: P, of all ranks.
        n_tokens: L.
        context: ranks that share a sequence.

    Raises:
        ValueError: the step does not fit; the message says what it needs, what there is, and what would make it fit.
    """
    memory, model = config.memory, config.model
    itemsize = getattr(torch, config.run.dtype).itemsize
    state, exchange = (config.optimizer.moments, memory.state), config.exchange
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if exchange.ranks_per_node is None and 0 < local < context and context % local == 0:
        # As the launcher says, and contexts will have it.
        exchange = replace(exchange, ranks_per_node=local)
    shape = StepShape(model, config.attention, n_tokens, size, itemsize, *state, context, exchange)
    recompute = model.recompute
    if device.type != "cuda" and memory.device_gib is None:
        # The operating system knows better what a CPU's memory can hold.
        layer = LayerMemory("none" if recompute == "auto" else recompute, memory.offload == "all")
        return plan_layers(shape, [layer] * model.n_layers, layer == LayerMemory() and memory.state == "device")
    there = torch.tensor([_device_bytes(memory, device), _host_bytes(memory)], dtype=torch.float64, device=device)
    dist.all_reduce(there, dist.ReduceOp.MIN, group=group)
    device_bytes, host_bytes = there.tolist()
    plan = choose_layers(shape, recompute, memory.offload, device_bytes, host_bytes)
    if plan is None:
        raise ValueError(_does_not_fit(config, shape, device_bytes, host_bytes))
    return plan


def _does_not_fit(config, shape: StepShape, device_bytes: float, host_bytes: float) -> str:
    """The message: the least that was possible with the given options, and options that would be enough."""
    recompute, offload = config.model.recompute, config.memory.offload
    layer = LayerMemory("full" if recompute == "auto" else recompute, offload != "none")
    least = plan_layers(shape, [layer] * config.model.n_layers)
    needs = [f"data.seq_len={config.data.seq_len} needs {least.device / GIB:.1f} GiB on the device of each rank"]
    if least.host:
        needs.append(f"and {least.host / GIB:.1f} GiB of its host memory")
    there = f"there are {device_bytes * (1 - _SLACK) / GIB:.1f} and {host_bytes / GIB:.1f}"
    # Of each kind of change the smallest that is enough. Heads may not divide among more ranks.
    pinned, any_number = config.run.context_size is not None, config.exchange.mode != "heads"
    kinds = [
        [("model.recompute: auto and memory.offload: auto", shape)],
        [("memory.state: host", replace(shape, state_on="host"))],
        [
            (
                f"{n * shape.size} ranks" + (f" and run.context_size: {n * shape.context}" if pinned else ""),
                replace(shape, size=n * shape.size, context=n * shape.context, n_tokens=-(-shape.n_tokens // n)),
            )
            for n in (2, 4, 8)
            if any_number or config.model.n_heads % (n * shape.context) == 0
        ],
        [
            (f"data.seq_len: {config.data.seq_len // part}", replace(shape, n_tokens=shape.n_tokens // part))
            for part in (2, 4, 8)
        ],
    ]
    fits = lambda changed: choose_layers(changed, "auto", "auto", device_bytes, host_bytes) is not None
    fixes = [fix for kind in kinds if (fix := next((text for text, changed in kind if fits(changed)), None))]
    return f"{' '.join(needs)}, but {there}; use {', or '.join(fixes or ['more ranks'])}"


def _device_bytes(memory: MemoryConfig, device: torch.device) -> float:
    """What this rank may take on its device, from before it has built anything."""
    if device.type != "cuda":
        return (memory.device_gib or 0) * GIB
    free, _ = torch.cuda.mem_get_info(device)
    free -= NCCL_BYTES * (dist.get_world_size() > 1)
    return min(free, memory.device_gib * GIB) if memory.device_gib is not None else free


def _host_bytes(memory: MemoryConfig) -> float:
    if memory.host_gib is not None:
        return memory.host_gib * GIB
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return _HOST_SHARE * min(psutil.virtual_memory().available, _control_group_bytes()) / local


def _control_group_bytes() -> float:
    """What a container's limit leaves; infinite without one."""
    for folder, names in (("", ("max", "current")), ("memory", ("limit_in_bytes", "usage_in_bytes"))):
        try:
            limit, used = (float(Path("/sys/fs/cgroup", folder, f"memory.{name}").read_text()) for name in names)
            return limit - used
        except (OSError, ValueError):
            # No such file, or "max".
            continue
    return float("inf")
