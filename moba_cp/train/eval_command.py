"""``moba-cp eval RUN``: loss, perplexity and bits per byte of a model, by position in the document."""

import argparse
import json
import math
from dataclasses import replace

from ..outputs import output_file
from .command import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint, or a folder of Hugging Face's")
    parser.add_argument("--data", metavar="PATH", help="text or PREFIX of tokens (default: what the run held out)")
    parser.add_argument("--seq-len", type=int, metavar="T", help="tokens of a sequence (default: the run's)")
    parser.add_argument("--sequences", type=int, metavar="N", help="how many (default: all there are)")
    parser.add_argument("--attention", choices=("as_trained", "moba", "full"), default="as_trained",
                        help="of the layers (default: as_trained, by the run's last step)")  # fmt: skip
    add_overrides(parser, "run's config")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the figures here too (.json)")


def main(arguments: argparse.Namespace) -> int:
    """Run the command, on all ranks that torchrun has started; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    from .evaluate import evaluate, run_of
    from .mesh import close_mesh

    if arguments.sequences is not None and arguments.sequences < 1:
        raise ValueError(f"--sequences={arguments.sequences} is below 1; use 1 or more, or leave it out for all")
    config, weights, step = run_of(arguments.model, arguments.overrides)
    data = config.data
    if arguments.data is not None:
        data = replace(data, path=arguments.data, corpora=(), pattern=None, validation_path=arguments.data)
    if arguments.seq_len is not None:
        data = replace(data, seq_len=arguments.seq_len)
    data = replace(data, validation_sequences=arguments.sequences or 2**62)
    if arguments.attention != "as_trained":
        config = replace(config, attention=replace(config.attention, default=arguments.attention, schedule=()))
    figures, mesh = evaluate(replace(config, data=data), weights, step)
    close_mesh(mesh)
    if mesh.first:
        print(*_lines(figures), sep="\n", flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _lines(figures: dict) -> list[str]:
    sequences = f"{figures['sequences']} sequence" + "s" * (figures["sequences"] != 1)
    lines = [
        f"{figures['model']}, {figures['attention']} attention, on {figures['data']}: {sequences} "
        f"of {figures['seq_len']:,} tokens",
        f"{'position':>23}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}  {'labels':>10}",
    ]
    for row in [*figures["by_position"], figures]:
        where = f"{row['from']:,} to {row['to']:,}" if "from" in row else "all"
        per_byte = row["bits_per_byte"]
        bits = f"{per_byte:9.4f}" if per_byte is not None else f"{'?':>9}"
        perplexity = math.exp(min(row["loss"], 700))
        lines.append(f"{where:>23}  {row['loss']:8.4f}  {perplexity:10.4g}  {bits}  {row['labels']:10,}")
    return lines
