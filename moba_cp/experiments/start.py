"""What ``moba-cp experiment NAME...`` does: prepare the text, train, collect, draw."""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from ..train.config import TrainConfig
from ..train.log import human
from ..train.yaml_config import load
from . import report
from .corpus import build_corpora, corpus_lines, installed_sources
from .grid import Grid, Slot, estimate, flops, summary_of, take_over, write_config
from .retrieval import build_retrieval
from .runs import GRIDS, Maker, Run, retrieval_folder
from .scales import Scale, scale_called

# Tokens of documents to retrieve from; longer training goes through them several times.
_RETRIEVAL_TOKENS = 2**23
# Documents of each length to validate on: the shortest together are several sequences of a step.
_RETRIEVAL_HELD_OUT = 96


def start(arguments: argparse.Namespace, names: tuple[str, ...], folder: Path, started: float) -> int:
    """Run the experiments ``names`` in ``folder``; ``started`` is when the budget began (``time.monotonic()``).

    Raises:
        ValueError, OSError: what the user should read.
    """
    scale = scale_called(arguments.scale)
    if arguments.seeds is not None:
        scale = replace(scale, seeds=arguments.seeds)
    if scale.own_data and arguments.data:
        raise ValueError("--data with --scale paper: its documents are those of --set data.path=PREFIX")
    base = load(TrainConfig, f"experiments/{scale.name}", arguments.overrides)
    maker = Maker(scale, folder, base)
    grids = {name: list(GRIDS[name](maker)) for name in names}
    runs = in_order(grids)
    if arguments.dry_run:
        print(*cost(runs, arguments.gpus or 1), sep="\n")
        return 0
    failed = []
    if not arguments.redraw:
        if any(run.finds_keys for run in runs):
            tokens = min(scale.retrieval_size.tokens, _RETRIEVAL_TOKENS)
            for lengths in filter(None, (scale.retrieval_first, scale.retrieval_lengths)):
                sparse = bool(scale.retrieval_first) and lengths != scale.retrieval_first
                build_retrieval(retrieval_folder(folder, lengths), lengths, tokens, _RETRIEVAL_HELD_OUT, sparse)
        # Reading and tokenizing text takes the host a minute or more: GPUs learn to find keys meanwhile.
        with ThreadPoolExecutor(1) as beside:
            read = not scale.own_data and not all(run.finds_keys for run in runs)
            corpus = beside.submit(_corpus, scale, folder, arguments) if read else None
            if arguments.write_configs:
                print(*_written(runs, folder, None if corpus is None else corpus.result()), sep="\n")
                return 0
            slots = _slots(arguments.gpus, arguments.per_gpu)
            deadline = None if arguments.budget_seconds is None else started + arguments.budget_seconds
            say = lambda line: print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)
            failed = Grid(runs, folder, corpus, slots, deadline, say).execute()
    for name, its in grids.items():
        print(*report.write(name, its, folder), sep="\n")
    return 1 if failed else 0


def in_order(grids: dict[str, list[Run]]) -> list[Run]:
    """The runs of all experiments and those that they begin with, each once.

    All of the first seed come before the others', experiment by experiment; within one those first that others have
    to come after, the longest chain first. Then the cheap ones of several seeds come before one more seed of those
    that take long.
    """
    once = {each.name: each for runs in grids.values() for run in runs for each in run.lineage}
    first = {}
    for i, runs in enumerate(grids.values()):
        for run in runs:
            for each in run.lineage:
                first.setdefault(each.name, i)
    before = {run.name: sum(map(estimate, run.lineage)) for run in once.values()}
    until = dict(before)
    for run in once.values():
        for each in run.lineage:
            until[each.name] = max(until[each.name], before[run.name])
    remaining = {run.name: until[run.name] - before[run.name] + estimate(run) for run in once.values()}

    def place(run: Run) -> tuple[float, float, float]:
        seed = run.facts["seed"]
        return (0, first[run.name], -remaining[run.name]) if seed == 0 else (1, seed * before[run.name], 0)

    return sorted(once.values(), key=place)


def cost(runs: list[Run], gpus: int) -> list[str]:
    """What runs would take, a line each."""
    lines = [f"{'run':42} {'parameters':>12} {'tokens':>10} {'6 N D':>10} {'H100 s':>8}"]
    total, of_first, done = 0.0, 0.0, 0
    for run in runs:
        finished = summary_of(run) is not None
        seconds = 0.0 if finished else estimate(run)
        total, done = total + seconds, done + finished
        of_first += seconds if run.facts["seed"] == 0 else 0.0
        lines.append(
            f"{run.name:42} {human(run.n_parameters, ''):>12} {human(run.tokens, ''):>10} {flops(run):10.2e} "
            + (f"{'done':>8}" if finished else f"{seconds:8,.0f}")
        )
    lines.append(
        f"{len(runs) - done} of {len(runs)} runs to do: {total / 3600:.3g} GPU-hours of H100s, "
        f"{total / gpus / 3600:.3g} hours on {gpus} of them, the first seed {of_first / 3600:.3g} GPU-hours; estimated "
        "from rates of larger models, corrected by what is measured once it runs"
    )
    return lines


def _written(runs: list[Run], folder: Path, corpus: str | None) -> list[str]:
    """Write the configs of runs that are not done; returns a command for each."""
    lines = []
    for run in runs:
        if take_over(run, corpus):
            lines.append(f"{run.name}: taken over")
        elif summary_of(run) is None:
            lines.append(f"moba-cp train {write_config(run, folder)} --resume auto")
    return lines


def _corpus(scale: Scale, folder: Path, arguments: argparse.Namespace) -> str:
    """Build the text; returns its hash."""
    roots = installed_sources() if arguments.data is None else tuple(map(Path, arguments.data))
    lengths = [length for length in (scale.shared_length, scale.length, scale.long) if length is not None]
    facts = build_corpora(
        folder / "corpus", lengths, roots, arguments.pattern, scale.text_bytes, scale.held_out, scale.vocabulary
    )
    print(*corpus_lines(facts), sep="\n", flush=True)
    return facts["splits"]["training"]["hash"]


def _slots(gpus: int | None, per_gpu: int) -> list[Slot]:
    here = torch.cuda.device_count()
    if not here:
        return [Slot(i, None) for i in range((gpus or 1) * per_gpu)]
    if gpus is not None and gpus > here:
        raise ValueError(f"--gpus={gpus}: this machine has {here}")
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(i) for i in range(here)]
    n = gpus or here
    # MoBA and full attention of one size, one behind the other, go to different GPUs, and no GPU gets one kind alone.
    return [Slot(i, visible[(i // n + i) % n]) for i in range(n * per_gpu)]
