"""Pages of the experiments that ask trained models for keys: see :mod:`.retrieval`."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .charts import figure, finish, label_of, style
from .retrieval import MANY, VALUES
from .rows import Rows, TooFew, at_range, loss_of, of
from .runs import Run
from .training_report import training_losses

# Of the loss of who guesses: above it nothing is learned.
_GUESSING = 0.97


def retrieval_page(rows: Rows, folder: Path, picture: Path) -> list[str]:
    rows = [row for row in rows if "retrieval" in row]
    kinds = [kind for kind in ("full", "moba", "hybrid") if of(rows, kind=kind)]
    if "moba" not in kinds:
        raise TooFew("no MoBA model is done")
    drawn, axes = figure((3 * len(kinds) + 3.5, 5.5), [1] * len(kinds) + [1.2], rows=2)
    said = ["| | pass-key | of many keys | the longest, of many | all keys, fewest to most |", "|---|---|---|---|---|"]
    lengths = list(rows[0]["retrieval"]["pass-key"])
    recall = {}
    for column, kind in enumerate(kinds):
        its, shares_of = of(rows, kind=kind), {}
        for row, task in enumerate(("pass-key", "multi-key")):
            shares_of[task] = np.mean([[x["retrieval"][task][length] for length in lengths] for x in its], axis=0)
            here = axes[row * (len(kinds) + 1) + column]
            here.grid(False)
            here.imshow(shares_of[task].T, vmin=0, vmax=1, cmap="gray", aspect="auto")
            for i, j in np.ndindex(*shares_of[task].shape):
                shade = "black" if shares_of[task][i, j] > 0.5 else "white"
                here.text(i, j, f"{shares_of[task][i, j]:.2f}", ha="center", va="center", color=shade, fontsize=6)
            here.set_xticks(range(len(lengths)), [f"{int(n):,}" for n in lengths], fontsize=7)
            depths = shares_of[task].shape[1]
            here.set_yticks(range(depths), [f"{100 * (i + 0.5) / depths:.0f} %" for i in range(depths)], fontsize=7)
            here.set_title(f"{label_of(kind)}: {task}", fontsize=9)
            here.set_xlabel("length (tokens); the last was not trained on", fontsize=7)
        recall[kind] = {pairs: statistics.fmean(x["retrieval"]["recall"][pairs] for x in its)
                        for pairs in its[0]["retrieval"]["recall"]}  # fmt: skip
        ends = list(recall[kind].values())
        numbers = [
            shares_of["pass-key"][:-1].mean(),
            shares_of["multi-key"][:-1].mean(),
            shares_of["multi-key"][-1].mean(),
        ]
        shares = " | ".join(f"{100 * number:.0f} %" for number in numbers)
        said.append(f"| {label_of(kind)} | {shares} | {100 * ends[0]:.0f} to {100 * ends[-1]:.0f} % |")
    axes[0].set_ylabel("depth of the asked key")
    line = axes[len(kinds)]
    for kind in kinds:
        line.plot([int(n) for n in recall[kind]], list(recall[kind].values()), label=label_of(kind), **style(kind))
    line.set(xscale="log", ylim=(0, 1.05), xlabel="pairs, all of them asked", ylabel="right answers")
    line.set_xticks([int(n) for n in recall["moba"]], list(recall["moba"]))
    line.minorticks_off()
    line.set_title(f"associative recall, {int(lengths[-2]):,} tokens", fontsize=9)
    line.legend(fontsize=7)
    axes[-1].axis("off")
    finish(drawn, picture)
    return said


def guessing_lines(runs: Iterable[Run], folder: Path) -> list[str]:
    """What is to be known of runs, those that they begin with included, that after half of their steps were no better
    than who guesses one of the values: charts of these say nothing about attention."""
    lines, once = [], {each.name: each for run in runs for each in run.lineage if each.finds_keys}
    for run in once.values():
        steps, losses = training_losses(run.name, folder)
        half = run.config.run.steps // 2
        by_then = losses[(steps > 0.8 * half) & (steps <= half)]
        if len(by_then) and steps[-1] >= half and by_then.mean() > _GUESSING * math.log(len(VALUES)):
            last = losses[-max(1, len(losses) // 20) :].mean()
            lines.append(
                f"- **{run.name} had learned nothing after half of its steps**: loss {by_then.mean():.3f}, where who "
                f"guesses a value has {math.log(len(VALUES)):.3f}; {last:.3f} in the end, at step {steps[-1]} of "
                f"{run.config.run.steps}."
            )
    return ["", *lines] if lines else []


def window_page(rows: Rows, folder: Path, picture: Path) -> list[str]:
    """Chart and table of MoBA beside a sliding window with a sink."""
    return _on_both_tasks(rows, ("full", "moba", "window"), picture)


def key_conv_page(rows: Rows, folder: Path, picture: Path) -> list[str]:
    """Chart and table of MoBA with and without a convolution over keys."""
    return _on_both_tasks(rows, ("full", "moba", "conv0", "conv3", "conv5"), picture)


def _on_both_tasks(rows: Rows, every: tuple[str, ...], picture: Path) -> list[str]:
    """The loss of long text by position, and the keys found again by length, of every kind that has both. One key of
    many is asked: where there is one alone, its value is the only one, and need not be found by its key."""
    trained, asked = [row for row in rows if "retrieval" not in row], [row for row in rows if "retrieval" in row]
    kinds = [kind for kind in every if of(trained, kind=kind) and of(asked, kind=kind)]
    if "moba" not in kinds or kinds[-1] in ("full", "moba"):
        raise TooFew("MoBA or what it is compared with is missing, trained on text or asked for keys")
    n = len(trained[0]["by_position"])
    ends = [position["to"] + 1 for position in trained[0]["by_position"]]
    lengths = list(asked[0]["retrieval"]["multi-key"])
    drawn, (text, found) = figure((10, 4), [1, 1])
    said = ["| | loss | first range | last range | " + " | ".join(f"a key, {int(x):,}" for x in lengths) + " |"]
    said.append("|---" * (4 + len(lengths)) + "|")
    for kind in kinds:
        its = of(trained, kind=kind)
        by_position = [statistics.fmean(at_range(i)(row) for row in its) for i in range(n)]
        text.plot(ends, by_position, label=label_of(kind), **style(kind))
        right = [statistics.fmean(np.mean(row["retrieval"]["multi-key"][x]) for row in of(asked, kind=kind))
                 for x in lengths]  # fmt: skip
        found.plot([int(x) for x in lengths], right, label=label_of(kind), **style(kind))
        losses = [statistics.fmean(map(loss_of, its)), by_position[0], by_position[-1]]
        cells = [label_of(kind), *(f"{x:.4f}" for x in losses), *(f"{100 * x:.0f} %" for x in right)]
        said.append(f"| {' | '.join(cells)} |")
    facts = of(trained, kind="moba")[0]["facts"]
    name = f"{facts['top_k']} blocks of {facts['block_size']:,} in {trained[0]['length']:,}"
    text.set(xlabel="position, up to", ylabel="validation loss (nats per token)", title=name)
    found.set(xscale="log", ylim=(0, 1.05), xlabel="length (tokens); the last was not trained on")
    found.set_xticks([int(x) for x in lengths], [f"{int(x):,}" for x in lengths])
    found.minorticks_off()
    found.set(ylabel="right answers", title=f"one of {MANY} keys, mean over depths")
    for axes in (text, found):
        axes.legend(fontsize=8)
    finish(drawn, picture)
    return said
