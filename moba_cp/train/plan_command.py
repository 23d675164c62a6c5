"""``moba-cp plan CONFIG --gpus N``: whether a run would fit, how fast it would be, and what to change. Needs no GPU.

``moba-cp plan --measured RUN...`` holds forecasts against runs.
"""

import argparse

from ..outputs import output_file
from .command import add_overrides

# What hosts take to launch one layer's attention, forward and backward (README: 8,192 tokens without a graph).
_LAUNCH_SECONDS = 2.6e-3
# The exit code of doctor and verify where something is wrong.
DOES_NOT_FIT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file, or the name of a packaged one")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many, in all machines together")
    parser.add_argument("--gpu", default="h100", metavar="KIND", help="h100, h200, a100 or b200 (default: h100)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="of a machine (default: 8)")
    parser.add_argument("--host-gib", type=float, metavar="GIB", help="host memory for each GPU (default: 100)")
    add_overrides(parser)
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the figures here too (.json)")
    parser.add_argument(
        "--measured",
        nargs="+",
        metavar="RUN",
        help="instead of CONFIG: folders of runs on GPUs; prints a table of predicted beside measured",
    )
    parser.add_argument("--chart", type=output_file(".png"), metavar="FILE",
                        help="with --measured: draw time and memory against tokens (.png)")  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 3 if the run would not fit.

    Raises:
        ValueError, OSError: what the user should read.
    """
    import json
    from pathlib import Path

    from . import predict
    from .config import TrainConfig
    from .measured import compare, draw, figures, table
    from .yaml_config import load

    if arguments.gpus_per_node is not None and arguments.gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node={arguments.gpus_per_node} is below 1; use 1 or more")
    if arguments.host_gib is not None and not arguments.host_gib > 0:
        raise ValueError(f"--host-gib={arguments.host_gib:g} is not above 0; use more, or leave it out")
    if arguments.measured is not None:
        if arguments.config is not None or arguments.gpus is not None or arguments.overrides:
            raise ValueError("--measured with CONFIG, --gpus or --set: a run has its own; leave them out")
        rows = [compare(Path(run), arguments.gpus_per_node, arguments.host_gib) for run in arguments.measured]
        print(*table(rows), sep="\n")
        if arguments.chart is not None:
            draw(rows, arguments.chart)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(figures(rows), indent=1) + "\n", encoding="utf-8")
        return 0
    if arguments.chart is not None:
        raise ValueError(f"--chart={arguments.chart} without --measured: there is nothing to draw; leave it out")
    if arguments.config is None or arguments.gpus is None:
        raise ValueError("plan needs CONFIG and --gpus N, or --measured RUN")
    if arguments.gpu.lower() not in predict.GPUS:
        raise ValueError(f"--gpu={arguments.gpu}: not known; use one of {', '.join(predict.GPUS)}")
    if arguments.gpus < 1:
        raise ValueError(f"--gpus={arguments.gpus} is below 1; use 1 or more")
    gpu = predict.GPUS[arguments.gpu.lower()]
    config = load(TrainConfig, arguments.config, arguments.overrides)
    where = gpu, arguments.gpus_per_node, arguments.host_gib
    made = predict.forecast(config, arguments.gpus, *where)
    others = predict.candidates(config, arguments.gpus, *where)
    reach = predict.longest(config, arguments.gpus, *where)
    print(*_lines(made, others, reach, *where), sep="\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_figures(made, reach), indent=1) + "\n", encoding="utf-8")
    return 0 if made.memory is not None else DOES_NOT_FIT


def _figures(made, reach: int) -> dict:
    memory = made.memory
    return {
        "fits": memory is not None,
        "device_bytes": memory.device if memory is not None else None,
        "host_bytes": memory.host if memory is not None else None,
        "memory": memory.parts if memory is not None else None,
        "seconds": made.seconds,
        "step_seconds": made.step_seconds,
        "tokens_per_second": made.tokens_per_second,
        "bytes": made.bytes,
        "longest": reach,
    }


def _lines(
    made, others: list, reach: int, gpu, per_node: int | None = None, host_gib: float | None = None
) -> list[str]:
    from .log import human

    config, data = made.config, made.config.data
    flops = config.model.flops_per_token(data.seq_len, config.attention.at(config.run.steps, config.run.steps))
    tokens = data.seq_len * data.sequences_per_step
    parameters = config.model.n_parameters_with(config.attention)
    mfu = flops * made.tokens_per_second / (gpu.peak * made.ranks)
    said = [
        f"model: {human(parameters, 'parameters')}; {made.ranks} x {gpu.name} = "
        f"{made.ranks // made.context} data x {made.context} context",
        f"step: {data.sequences_per_step} x {data.seq_len:,} tokens, {human(flops * tokens, 'FLOP')}",
        *(made.memory.lines() if made.memory is not None else [f"memory: does not fit into {gpu.gib:.0f} GiB"]),
        f"time: {made.step_seconds:.3g} s a step, {human(made.tokens_per_second, 'tokens/s')}, MFU {100 * mfu:.0f} %"
        + ("" if gpu.measured else f" (rates of an H100 scaled by the peak: not measured on {gpu.name})"),
        "  " + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in made.seconds.items() if seconds),
        f"limited by: {made.limit}",
    ]
    if made.step_seconds < _LAUNCH_SECONDS * config.model.n_layers:
        said.append("note: a step this short takes longer: what hosts take to launch kernels is not in the time")
    if config.attention.index is not None:
        said.append("note: what index branches compute is not in the time: no rate of it has been measured")
    if made.bytes:
        said.append("received by a rank in a step: " + ", ".join(f"{n} {human(x, 'B')}" for n, x in made.bytes.items()))
    longest = f"longest sequence that fits, shared by all: {reach:,} tokens"
    said.append(longest if reach else "no length fits that all share")
    if others and (others[0].context != made.context or made.memory is None):
        best, what = others[0], "faster" if made.memory is not None else "fits"
        said.append(f"{what}: run.context_size={best.context}, {best.step_seconds:.3g} s a step")
    elif made.memory is None:
        said.append("fits: " + _what_fits(made, reach, gpu, per_node, host_gib))
    hours = config.run.steps * made.step_seconds / 3600
    return [*said, f"run: {config.run.steps:,} steps, {hours:.3g} hours"]


def _what_fits(made, reach: int, gpu, per_node: int | None, host_gib: float | None) -> str:
    from dataclasses import replace

    from .predict import forecast

    options = [f"data.seq_len={reach}"] if 0 < reach < made.config.data.seq_len else []
    # The sequences of a step are counted by now: all share them one after the other.
    data = replace(made.config.data, gradient_accumulation=None)
    shared = replace(made.config, data=data, run=replace(made.config.run, context_size=None))
    for times in (2, 4, 8, 16):
        try:
            fits = forecast(shared, times * made.ranks, gpu, per_node, host_gib).memory is not None
        except ValueError:
            # A run would refuse so many.
            continue
        if fits:
            all_share = "" if made.config.run.context_size is None else " --set run.context_size=null"
            options.append(f"--gpus {times * made.ranks}{all_share}")
            break
    on_device = made.config.memory.state == "device"
    none = "no number of GPUs up to 16 times as many" + ("; set memory.state: host" if on_device else "")
    return ", or ".join(options) or none
