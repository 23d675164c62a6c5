"""``moba-cp verify``: does this library compute rightly on these machines, for the shape of this config?

Attention by each way across ranks is held against one rank and against float64: selection, output and gradients. Then
two training steps of a small model are compared with the same steps on one rank. The config is scaled down: fewer
layers, heads and tokens, and blocks small enough that there is something to select.
"""

import argparse
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from .doctor.finding import WRONG
from .train.command import add_overrides

if TYPE_CHECKING:
    from .bench.cluster.check import Deviation
    from .bench.cluster.ranks import Ranks
    from .bench.shape import Shape
    from .train.config import TrainConfig

EXAMPLES = """examples:
  moba-cp verify demo                                              one process: kernels against float64
  torchrun --nproc-per-node 2 --no-python moba-cp verify demo      two ranks against one and float64
  torchrun --nproc-per-node 8 --no-python moba-cp verify configs/hybrid/llama_8b_1m.yaml --tokens 16384
  bash launchers/multinode.sh --nodes 2 --head 10.0.0.1 -m moba_cp verify demo

exit codes: 0 everything is near enough, 2 wrong options or config, 3 something is not"""
_TOKENS = {"cuda": 8192, "cpu": 1024}
_STEPS = 2
# Of a loss and a gradient's norm, relative to those of one rank. Rounding alone makes 1e-6 in float32; in bfloat16 some
# queries, whose scores are nearly equal, then select other blocks in later layers.
_STEP_ALLOWED = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a packaged one such as demo")
    add_overrides(parser)
    parser.add_argument("--tokens", type=int, help="T of the sequences (default: 8192 on GPUs, 1024 on CPUs, or less)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until a hanging collective ends it")
    parser.add_argument("--json", action="store_true", help="print the comparisons as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Compare, print the table; 0, or :data:`WRONG` where something is too far off, on every rank.

    Raises:
        ValueError, OSError: what the user should read.
    """
    from .bench.cluster.check import deviations
    from .bench.cluster.ranks import Ranks
    from .train.config import TrainConfig
    from .train.yaml_config import load

    if arguments.tokens is not None and arguments.tokens < 64:
        raise ValueError(f"tokens={arguments.tokens} is below 64; 1024 or more has something to select")
    config = load(TrainConfig, arguments.config, arguments.overrides)
    ranks = Ranks(config.run.device, arguments.timeout)
    try:
        shape, n_tokens = scaled_shape(config, ranks, arguments.tokens)
        small = scaled_config(config, shape, n_tokens, ranks.size)
        if not arguments.json:
            ranks.print(f"{ranks.size} ranks on {_device(ranks)}; {n_tokens} tokens, {shape}")
        found = deviations(shape, n_tokens, modes(config), (ranks.size,), ranks)
        ranks.say(f"{_STEPS} training steps on {ranks.size} ranks and on one")
        found += _steps(small, ranks)
        wrong = [one for one in found if not one.holds]
        if ranks.first and arguments.json:
            listed = [asdict(one) | {"holds": one.holds} for one in found]
            print(json.dumps({"passed": not wrong, "ranks": ranks.size, "comparisons": listed}, indent=1))
        elif ranks.first:
            print(*table(found), sep="\n", flush=True)
        ranks.barrier()
        return WRONG if wrong else 0
    finally:
        ranks.close()


def table(found: "list[Deviation]") -> list[str]:
    """The lines of the table of comparisons, and a verdict."""
    wide = max(len(one.what) for one in found)
    lines = [f"{'what':{wide}}  {'part':16}  {'error':>8}  {'allowed':>8}"]
    for one in found:
        verdict = "PASS" if one.holds else "FAIL"
        lines.append(f"{one.what:{wide}}  {one.part:16}  {one.error:8.1e}  {one.allowed:8.1e}  {verdict}")
    wrong = sum(not one.holds for one in found)
    verdict = f"{wrong} of {len(found)} comparisons fail" if wrong else f"all {len(found)} comparisons hold"
    return [*lines, verdict]


def modes(config: "TrainConfig") -> tuple[str, ...]:
    """The ways of MoBA across ranks that are compared: all of them, and the config's own with its options."""
    from .bench.cluster.modes import DEFAULT_MODES

    own = (
        config.exchange.mode + "-rounded" * (config.exchange.gradient_dtype == "input") + "-keep" * config.exchange.keep
    )
    return tuple(dict.fromkeys((*DEFAULT_MODES, own)))


def scaled_shape(config: "TrainConfig", ranks: "Ranks", tokens: int | None) -> "tuple[Shape, int]":
    """The config's attention with at most 2 KV heads and 8 query heads, and the number of tokens for it."""
    from .bench.shape import Shape

    model, attention = config.model, config.attention
    n_kv = model.n_kv_heads or model.n_heads
    kv_heads, group = min(n_kv, 2), min(model.n_heads // n_kv, 4)
    multiple = 2 * ranks.size
    wanted = tokens or min(_TOKENS[ranks.device.type], config.data.seq_len)
    n_tokens = -(-max(wanted, 16 * multiple) // multiple) * multiple
    # At least twice as many blocks as a query attends to.
    most = n_tokens // (2 * attention.top_k)
    block_size = max(16, min(attention.block_size, most) // 16 * 16)
    layout = "contiguous" if attention.layout == "contiguous" else "zigzag"
    head_dim = model.head_dim or model.hidden_size // model.n_heads
    moba = replace(attention.moba, block_size=block_size)
    return Shape(kv_heads * group, kv_heads, head_dim, moba, layout, "uniform"), n_tokens


def scaled_config(config: "TrainConfig", shape: "Shape", n_tokens: int, size: int) -> "TrainConfig":
    """The config with a model of at most two layers, one of each kind where it has both, on the standard library."""
    from .data.config import DataConfig
    from .train.mesh import context_size

    attention = config.attention.at(1, config.run.steps)
    full = attention.full_layer_numbers(config.model.n_layers)
    layers = min(2, config.model.n_layers)
    if attention.default == "full" or not full:
        named: str | tuple[int, ...] = "none"
    else:
        named = "last 1" if len(full) < config.model.n_layers else tuple(range(1, layers + 1))
    attention = replace(attention, block_size=shape.moba.block_size, full_layers=named)
    model = replace(
        config.model, n_layers=layers, n_heads=shape.heads, n_kv_heads=shape.kv_heads, head_dim=shape.dim,
        hidden_size=shape.heads * shape.dim, ffn_hidden_size=None, vocab_size=256,
    )  # fmt: skip
    sequences = size // context_size(config.run, size)
    data = DataConfig(seq_len=n_tokens, sequences_per_step=sequences, validation_share=0.0)
    run = replace(config.run, steps=_STEPS, directory="verify", start_from=None, selection_maps=False)
    optimizer = replace(config.optimizer, warmup_steps=0, schedule="cosine")
    return replace(config, model=model, attention=attention, data=data, run=run, optimizer=optimizer)


def _steps(config: "TrainConfig", ranks: "Ranks") -> "list[Deviation]":
    """Losses and norms of gradients of the first steps on all ranks, against those on one; the second step shows that
    the first changed the weights alike."""
    from .bench.cluster.check import Deviation, worst
    from .train.loop import Trainer
    from .train.mesh import open_mesh
    from .train.plan import plan_run

    if ranks.size == 1:
        return []
    mesh = open_mesh(config.run)
    try:
        trainer = Trainer(plan_run(config, ranks.size), mesh, None)
        together = [trainer.train_step() for _ in range(_STEPS)]
        del trainer
        alone_config = replace(config, run=replace(config.run, context_size=None))
        trainer = Trainer(plan_run(alone_config, 1), _mesh_of_one(ranks), None)
        alone = [trainer.train_step() for _ in range(_STEPS)]
    finally:
        mesh.heartbeat.close()
    what, found = f"training on {ranks.size} ranks, {config.run.dtype}", []
    for step in range(_STEPS):
        for name, allowed in zip(("loss", "gradient_norm"), _STEP_ALLOWED[config.run.dtype], strict=True):
            here, there = together[step][name], alone[step][name]
            part = f"{name.partition('_')[0]}, step {step + 1}"
            found.append(Deviation(what, part, abs(here - there) / max(abs(there), 1e-30), allowed))
    return worst(found, ranks)


def _mesh_of_one(ranks: "Ranks"):
    """A mesh of this rank alone, beside that of all; a collective call of all ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from .train.mesh import Mesh, backend_of

    groups = [dist.new_group([rank], backend=backend_of(ranks.device)) for rank in range(ranks.size)]
    own = groups[ranks.rank]
    return Mesh(
        rank=0, size=1, device=ranks.device, data_rank=0, data_size=1, context_group=own, context_size=1,
        shard_mesh=DeviceMesh.from_group(own, ranks.device.type, mesh_dim_names=("all",)), group=own,
    )  # fmt: skip


def _device(ranks: "Ranks") -> str:
    import torch

    return torch.cuda.get_device_name(ranks.device) if ranks.on_gpu else "CPUs"
