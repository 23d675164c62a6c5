"""What came out of an experiment: a table (CSV), the chart as the paper draws it (PNG), and a page (Markdown)."""

import csv
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from . import paper
from .charts import LABELS, PAPER, draw_paper_law, figure, finish, label_of, style
from .fit import PowerLaw, fit_power_law
from .grid import summary_of
from .retrieval_report import guessing_lines, key_conv_page, retrieval_page, window_page
from .rows import Rows, TooFew, at_range, loss_of, means, of
from .runs import Run
from .tokens import width_lines
from .training_report import draw_training, training_losses

_KINDS = ("full", "moba")


def write(name: str, runs: list[Run], folder: Path) -> list[str]:
    """Write ``NAME.csv``, ``NAME.png`` and ``NAME.md`` into ``folder``; returns lines for the terminal."""
    rows = [found for run in runs if (found := summary_of(run)) is not None]
    if not rows:
        return [f"{name}: nothing is done yet"]
    _table(folder / f"{name}.csv", rows)
    compared = _comparable(runs, rows, ("seed", "size") if name in ("scaling-law", "position-loss") else ("seed",))
    try:
        said = _EXPERIMENTS[name](compared, folder, folder / f"{name}.png")
    except TooFew as missing:
        head = f"{name}: {len(rows)} of {len(runs)} runs are done; no chart yet: {missing}"
        return [head, *guessing_lines(runs, folder)]
    said = [*said, *guessing_lines(runs, folder)]
    texts = {row["corpus"] for row in rows} - {None}
    hours = sum(row["seconds"] for row in rows) / 3600
    head = [
        f"# {name}",
        "",
        f"{len(rows)} of {len(runs)} runs are done, {hours:.2f} hours of a process in all"
        + (f"; text {', '.join(sorted(texts))}" if texts else "")
        + (". **Not all runs have seen the same text.**" if len(texts) > 1 else "."),
        *_seed_lines(compared, len(rows) - len(compared)),
        "",
        f"![{name}]({name}.png)",
        "",
        *width_lines(rows),
        *_convolved_lines(rows),
    ]
    (folder / f"{name}.md").write_text("\n".join([*head, *said]) + "\n", encoding="utf-8")
    return [f"{name}: {len(rows)} of {len(runs)} runs; {folder / name}.md, .csv, .png", *said]


def _comparable(runs: list[Run], rows: Rows, facts: tuple[str, ...]) -> Rows:
    """Those of the groups of runs with equal ``facts`` that are done as a whole, all where none is. Seeds differ more
    than what is compared does: means over other seeds would say nothing."""
    group = lambda x: tuple(x[fact] for fact in facts)
    there = {row["name"] for row in rows}
    undone = {group(run.facts) for run in runs if run.name not in there}
    return [row for row in rows if group(row["facts"]) not in undone] or rows


def _seed_lines(rows: Rows, left_out: int) -> list[str]:
    seeds = len({row["facts"]["seed"] for row in rows})
    lines = [f"{seeds} seeds; ± is the standard deviation over them."] if seeds > 1 else []
    if left_out:
        lines.append(f"Left out: {left_out} of them, since others of their seed, to compare them with, are not done.")
    return ["", *lines] if lines else []


def _convolved_lines(rows: Rows) -> list[str]:
    """What convolution over keys the models have, where MoBA and full attention have one."""
    widths = {row["config"]["attention"]["key_conv"] for row in rows if row["facts"]["kind"] in _KINDS} - {0}
    if not widths:
        return []
    said = " or ".join(map(str, sorted(widths)))
    return [f"Where nothing else is said, keys are convolved over {said} tokens, of MoBA and full attention alike.", ""]


def _table(file: Path, rows: Rows) -> None:
    facts = list(dict.fromkeys(key for row in rows for key in row["facts"]))
    plain = ("name", "length", "parameters", "tokens", "pflops_days", "validation_loss", "training_loss", "seconds")
    per_byte = "validation loss per byte"
    ends = sorted({position["to"] + 1 for row in rows for position in row["by_position"]})
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*plain, per_byte, *facts, *(f"loss up to {end}" for end in ends)])
        for row in rows:
            losses = {position["to"] + 1: position["loss"] for position in row["by_position"]}
            writer.writerow(
                [row[key] for key in plain]
                + [row["validation_loss"] / row.get("bytes_per_token", 1.0)]
                + [row["facts"].get(key) for key in facts]
                + [losses.get(end) for end in ends]
            )


def _fits(rows: Rows, value: Callable[[dict], float] = loss_of) -> dict[str, PowerLaw]:
    fits = {}
    for kind in _KINDS:
        its = of(rows, kind=kind)
        if len({row["pflops_days"] for row in its}) < 2:
            raise TooFew(f"fewer than 2 sizes of {label_of(kind)}")
        fits[kind] = fit_power_law([row["pflops_days"] for row in its], [value(row) for row in its])
    return fits


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" ({bounds[0]:.4f} to {bounds[1]:.4f})"


def _fit_lines(fits: dict[str, PowerLaw], published: dict[str, PowerLaw]) -> list[str]:
    lines = ["| | a (95 % interval) | b (95 % interval) | the paper's, other data |", "|---|---|---|---|"]
    for kind, law in fits.items():
        lines.append(
            f"| {label_of(kind)} | {law.a:.4f}{_interval(law.a_interval)} | {law.b:.4f}{_interval(law.b_interval)} | "
            f"{published[kind]} |"
        )
    return lines


def _draw_law(axes, rows: Rows, fits: dict[str, PowerLaw], value: Callable[[dict], float] = loss_of) -> None:
    for kind, law in fits.items():
        its = of(rows, kind=kind)
        compute = np.array([row["pflops_days"] for row in its])
        axes.plot(compute, [value(row) for row in its], linestyle="none", **style(kind, line=False))
        ends = np.geomspace(compute.min() / 1.5, compute.max() * 1.5, 50)
        axes.plot(ends, law(ends), label=f"{label_of(kind)}: {law}", **style(kind, marker=False))
    axes.set(xscale="log", yscale="log", xlabel="compute, 6 N D (PFLOP/s-days)")


def _gaps(rows: Rows, value: Callable[[dict], float] = loss_of) -> dict[float, tuple[float, float]]:
    """MoBA's loss over full attention's, less 1, by compute: mean and deviation over the seeds that have both."""
    by_place = {(row["facts"]["kind"], row["pflops_days"], row["facts"]["seed"]): value(row) for row in rows}
    gaps = defaultdict(list)
    for (kind, compute, seed), loss in sorted(by_place.items()):
        if kind == "full" and ("moba", compute, seed) in by_place:
            gaps[compute].append(by_place["moba", compute, seed] / loss - 1)
    return {c: (statistics.fmean(x), statistics.stdev(x) if len(x) > 1 else 0.0) for c, x in gaps.items()}


def _percent(gap: tuple[float, float]) -> str:
    return f"{100 * gap[0]:+.2f} %" + (f" (± {100 * gap[1]:.2f})" if gap[1] else "")


def _scaling_law(rows: Rows, folder: Path, picture: Path) -> list[str]:
    fits = _fits(rows)
    drawn, (axes, beside) = figure((9, 4), [3, 2])
    _draw_law(axes, rows, fits)
    axes.set(ylabel="validation loss (nats per token)", title=f"documents of {rows[0]['length']:,} tokens")
    axes.legend(fontsize=8)
    draw_paper_law(beside, paper.SCALING_LAW)
    finish(drawn, picture)
    compute = np.array(sorted({row["pflops_days"] for row in rows}))
    apart = fits["moba"](compute) / fits["full"](compute) - 1
    names = {row["pflops_days"]: (row["facts"]["size"], row["parameters"]) for row in rows}
    sizes = [
        f"| {names[c][0]} | {names[c][1] / 1e6:.2f} M | {c:.2e} | {_percent(gap)} |" for c, gap in _gaps(rows).items()
    ]
    return [
        *_fit_lines(fits, paper.SCALING_LAW),
        "",
        f"MoBA's fitted line lies {100 * apart[0]:+.2f} % from full attention's at the least compute and "
        f"{100 * apart[-1]:+.2f} % at the most.",
        "",
        "| model | parameters | PFLOP/s-days | MoBA's loss over full attention's |",
        "|---|---|---|---|",
        *sizes,
        *_training_lines(rows, folder, picture),
    ]


def _training_lines(rows: Rows, folder: Path, picture: Path) -> list[str]:
    beside = picture.with_name(f"{picture.stem}-training.png")
    table = draw_training(rows, folder, beside)
    head = [
        "",
        "MoBA's loss over full attention's on the same batches while they were trained, and by position at the end:",
    ]
    return [*head, "", f"![training]({beside.name})", "", *table] if table else []


def _range_name(row: dict, index: int) -> str:
    at = row["by_position"][index]
    return f"{at['from']:,} to {at['to'] + 1:,}"


def _position_loss(rows: Rows, folder: Path, picture: Path) -> list[str]:
    n = len(rows[0]["by_position"])
    fits = [_fits(rows, at_range(i)) for i in range(n)]
    drawn, (early, late, by_position, gaps) = figure((11, 8), [1, 1], rows=2)
    for axes, index in ((early, 0), (late, n - 1)):
        _draw_law(axes, rows, fits[index], at_range(index))
        axes.set(ylabel="validation loss (nats per token)", title=f"positions {_range_name(rows[0], index)}")
        axes.legend(fontsize=8)
    ends = [position["to"] + 1 for position in rows[0]["by_position"]]
    computes = sorted(_gaps(rows))
    if not computes:
        raise TooFew("no size of both MoBA and full attention")
    for kind in _KINDS:
        its = [row for row in of(rows, kind=kind) if row["pflops_days"] == computes[-1]]
        by_position.plot(
            ends, [statistics.fmean(at_range(i)(row) for row in its) for i in range(n)], label=label_of(kind),
            **style(kind),
        )  # fmt: skip
    largest = next(row["facts"]["size"] for row in rows if row["pflops_days"] == computes[-1])
    by_position.set(xlabel="position, up to", ylabel="validation loss (nats per token)", title=f"model {largest}")
    by_position.legend(fontsize=8)
    shades = itertools.cycle(["0.75", "0.6", "0.45", "0.3", "0.0"])
    markers = itertools.cycle("osv^D")
    table = []
    relative = [_gaps(rows, at_range(i)) for i in range(n)]
    for compute in computes:
        name = next(row["facts"]["size"] for row in rows if row["pflops_days"] == compute)
        shade = {"color": next(shades), "marker": next(markers), "markersize": 3.5, "linewidth": 1}
        gaps.plot(ends, [100 * gap[compute][0] for gap in relative], label=f"{name}, {compute:.1e}", **shade)
        table.append(f"| {name} | " + " | ".join(_percent(relative[i][compute]) for i in (0, n // 2, n - 1)) + " |")
    gaps.axhline(0, color="black", linewidth=0.6)
    gaps.set(xlabel="position, up to", ylabel="MoBA's loss over full's, less 1 (%)", title="by size, PFLOP/s-days")
    gaps.legend(fontsize=7)
    finish(drawn, picture)
    lines = ["| positions | MoBA | full attention | the paper's MoBA | the paper's full |", "|---|---|---|---|---|"]
    for i, fit in enumerate(fits):
        published = paper.BY_POSITION[i] if n == len(paper.BY_POSITION) else {}
        said = [str(fit["moba"]), str(fit["full"]), *(str(published.get(kind, "")) for kind in ("moba", "full"))]
        lines.append(f"| {_range_name(rows[0], i)} | " + " | ".join(said) + " |")
    heads = " | ".join(_range_name(rows[0], i) for i in (0, n // 2, n - 1))
    return [*lines, "", "MoBA's loss over full attention's:", "", f"| model | {heads} |", "|---|---|---|---|", *table]


def _granularity(rows: Rows, folder: Path, picture: Path) -> list[str]:
    full, length = {row["facts"]["seed"]: loss_of(row) for row in of(rows, kind="full")}, rows[0]["length"]
    place_of = lambda row: (length // row["facts"]["block_size"], row["facts"]["top_k"])
    by_blocks = means(of(rows, kind="moba"), place_of, loss_of)
    if len(by_blocks) < 2:
        raise TooFew("fewer than 2 block sizes")
    places = sorted(by_blocks)
    names = [f"{top_k}/{blocks}" for blocks, top_k in places]
    drawn, (axes, beside) = figure((9, 4), [3, 2])
    axes.plot(names, [by_blocks[p][0] for p in places], label=LABELS["moba"], **style("moba"))
    seeds = sorted({row["facts"]["seed"] for row in rows})
    for seed in seeds if len(seeds) > 1 else ():
        its = sorted((place_of(row), loss_of(row)) for row in of(rows, kind="moba", seed=seed))
        axes.plot([names[places.index(place)] for place, _ in its], [loss for _, loss in its], alpha=0.35,
                  **style("moba") | {"linewidth": 0.8, "markersize": 3})  # fmt: skip
        if seed in full:
            axes.axhline(full[seed], alpha=0.35, **style("full", marker=False) | {"linewidth": 0.8})
    said = ["| blocks attended to / all | block | loss | over full attention's of the same seed |", "|---|---|---|---|"]
    base = statistics.fmean(full.values()) if full else None
    if base is not None:
        axes.axhline(base, label=LABELS["full"], **style("full", marker=False))
    paired = [row for row in of(rows, kind="moba") if row["facts"]["seed"] in full]
    over = means(paired, place_of, lambda row: loss_of(row) / full[row["facts"]["seed"]] - 1)
    for place, name in zip(places, names):
        gap = _percent(over[place]) if place in over else ""
        said.append(f"| {name} | {length // place[0]:,} | {by_blocks[place][0]:.4f} | {gap} |")
    axes.set(xlabel="blocks attended to / blocks in all", ylabel="validation loss (nats per token)")
    thin = "; thin: each seed" if len(seeds) > 1 else ""
    axes.set_title(f"documents of {length:,} tokens, equal sparsity{thin}", fontsize=10)
    axes.legend(fontsize=8)
    beside.plot(list(paper.GRANULARITY), list(paper.GRANULARITY.values()), "o-", color=PAPER, label="MoBA")
    beside.axhline(paper.GRANULARITY_FULL, color=PAPER, linestyle="--", label="full attention")
    beside.set(xlabel="blocks attended to / blocks in all", title="the paper's (1.5B, other data)")
    beside.legend(fontsize=8)
    finish(drawn, picture)
    return said if base is None else [*said, "", f"Full attention: {base:.4f}."]


def _layerwise_hybrid(rows: Rows, folder: Path, picture: Path) -> list[str]:
    tuned = means(of(rows, tuned=True), lambda row: row["facts"]["full_layers"], loss_of)
    counts = sorted(tuned)
    if len(counts) < 3:
        raise TooFew("fewer than 3 fine-tuned models")
    every = next(row["config"]["model"]["n_layers"] for row in of(rows, tuned=True))
    drawn, (axes, beside) = figure((9, 4), [3, 2])
    hybrids = [count for count in counts if 0 < count < every]
    axes.errorbar(
        hybrids, [tuned[c][0] for c in hybrids], [tuned[c][1] for c in hybrids], capsize=3, label="hybrid",
        **style("switch"),
    )  # fmt: skip
    for count, kind in ((0, "moba"), (every, "full")):
        if count in tuned:
            axes.axhline(tuned[count][0], label=f"{LABELS[kind]} in all layers", **style(kind, marker=False))
    axes.set(xlabel="last layers with full attention", ylabel="validation loss of labelled tokens (nats)")
    axes.set_xticks(hybrids)
    axes.set_title(f"fine-tuning of a MoBA model of {every} layers")
    axes.legend(fontsize=8)
    beside.plot(list(paper.LAYERWISE), list(paper.LAYERWISE.values()), "o-", color=PAPER)
    beside.set(xlabel="last layers with full attention", title="the paper's (20 layers, other data)")
    finish(drawn, picture)
    said = ["| last layers with full attention | loss |", "|---|---|"]
    for count in counts:
        mean, deviation = tuned[count]
        said.append(f"| {count} of {every} | {mean:.4f}" + (f" ± {deviation:.4f}" if deviation else "") + " |")
    return said


def _training_hybrid(rows: Rows, folder: Path, picture: Path) -> list[str]:
    kinds = [kind for kind in ("full", "moba", "switch") if of(rows, kind=kind)]
    if len(kinds) < 3:
        raise TooFew("MoBA, full attention or the switch is missing")
    n = len(rows[0]["by_position"])
    ends = [position["to"] + 1 for position in rows[0]["by_position"]]
    drawn, (by_position, near) = figure((10, 4), [1, 1])
    for kind in kinds:
        its = of(rows, kind=kind)
        by_position.plot(
            ends, [statistics.fmean(at_range(i)(row) for row in its) for i in range(n)], label=label_of(kind),
            **style(kind),
        )  # fmt: skip
    by_position.set(xlabel="position, up to", ylabel="validation loss (nats per token)", title="at the end")
    by_position.legend(fontsize=8)
    # Losses differ more between batches than between runs: draw the difference to full attention on the same batch.
    seed = min(row["facts"]["seed"] for row in of(rows, kind="switch"))
    losses = {}
    for kind in kinds:
        for row in of(rows, kind=kind, seed=seed):
            losses[kind] = dict(zip(*(x.tolist() for x in training_losses(row["name"], folder))))
    lines = []
    if all(losses.get(kind) for kind in ("full", "moba", "switch")):
        steps = max(losses["switch"])
        until = of(rows, kind="switch")[0]["config"]["attention"]["schedule"][0]["until"]
        first = int(until * steps + 0.5) + 1
        shown = [step for step in losses["switch"] if step >= max(1, steps - 3 * (steps - first + 1))]
        for kind in ("moba", "switch"):
            less = [losses[kind][step] - losses["full"][step] for step in shown]
            near.plot(shown, less, label=label_of(kind), **style(kind, marker=False))
        near.axhline(0, color="black", linewidth=0.6)
        near.axvline(first - 0.5, color="0.5", linestyle=":")
        near.set(xlabel="step", ylabel="training loss less full attention's", title="around the switch (dotted)")
        near.legend(fontsize=8)
        behind = [losses["switch"][step] - losses["moba"][step] for step in range(first, steps + 1)]
        lines = [
            "",
            f"From the switch (step {first} of {steps}) on the loss lies at most {max(behind):+.4f} nats above that of "
            f"MoBA on the same batch, {statistics.fmean(behind):+.4f} in the mean.",
        ]
    finish(drawn, picture)
    said = ["| | loss | first range | last range |", "|---|---|---|---|"]
    for kind in kinds:
        its = of(rows, kind=kind)
        values = [statistics.fmean(map(value, its)) for value in (loss_of, at_range(0), at_range(n - 1))]
        said.append(f"| {label_of(kind)} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    return [*said, *lines]


def _block_size(rows: Rows, folder: Path, picture: Path) -> list[str]:
    losses = means(of(rows, kind="moba"), lambda row: row["facts"]["block_size"], loss_of)
    if len(losses) < 2:
        raise TooFew("fewer than 2 block sizes")
    full, length, sizes = of(rows, kind="full"), rows[0]["length"], sorted(losses)
    facts = of(rows, kind="moba")[-1]["facts"]
    keys = facts["block_size"] * facts["top_k"]
    drawn, (axes, beside) = figure((9, 4), [1, 1])
    axes.errorbar(
        sizes, [losses[s][0] for s in sizes], [losses[s][1] for s in sizes], capsize=3, label=LABELS["moba"],
        **style("moba"),
    )  # fmt: skip
    if full:
        axes.axhline(statistics.fmean(map(loss_of, full)), label=LABELS["full"], **style("full", marker=False))
    axes.set(xlabel="tokens of a block", ylabel="validation loss (nats per token)")
    axes.set_title(f"{keys:,} of {length:,} keys for each query", fontsize=10)
    axes.legend(fontsize=8)
    weighed = [row["mass"] for row in full if row.get("mass")]
    shades, markers = itertools.cycle(["0.7", "0.55", "0.4", "0.2", "0.0"]), itertools.cycle("osv^D")
    for top_k in weighed[0][str(sizes[0])] if weighed else ():
        at = [int(size) for size in weighed[0] if int(size) * int(top_k) <= length]
        mass = [statistics.fmean(one[str(size)][top_k] for one in weighed) for size in at]
        name = "1 block" if top_k == "1" else f"{top_k} blocks"
        beside.plot(at, mass, color=next(shades), marker=next(markers), markersize=4, label=name)
    beside.set(xlabel="tokens of a block", ylabel="share of full attention's weights inside", ylim=(0, 1.02))
    beside.set_title("in the model with full attention", fontsize=10)
    if weighed:
        beside.legend(fontsize=8)
    for one in (axes, beside):
        one.set_xscale("log", base=2)
    finish(drawn, picture)
    said = ["| block | blocks | loss | share of full attention's weights inside |", "|---|---|---|---|"]
    for size in sizes:
        number = keys // size
        found = [one[str(size)][str(number)] for one in weighed if str(number) in one.get(str(size), {})]
        spread = f" ± {losses[size][1]:.4f}" if losses[size][1] else ""
        share = f"{100 * statistics.fmean(found):.1f} %" if found else ""
        said.append(f"| {size:,} | {number} | {losses[size][0]:.4f}{spread} | {share} |")
    if full:
        said += ["", f"Full attention: {statistics.fmean(map(loss_of, full)):.4f}."]
    return said


_EXPERIMENTS: dict[str, Callable[[Rows, Path, Path], Iterable[str]]] = {
    "scaling-law": _scaling_law,
    "position-loss": _position_loss,
    "granularity": _granularity,
    "layerwise-hybrid": _layerwise_hybrid,
    "training-hybrid": _training_hybrid,
    "retrieval": retrieval_page,
    "sliding-window": window_page,
    "key-conv": key_conv_page,
    "block-size": _block_size,
}
