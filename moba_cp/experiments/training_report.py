"""How models of the scaling law learned: when MoBA's loss and full attention's part, and where they meet again."""

import itertools
from pathlib import Path

import numpy as np

from ..train.log import LOG, read_log
from .charts import figure, finish, label_of, style
from .rows import Rows, at_range, of

# Parts of a training whose mean losses are drawn: losses of single steps differ more than those of two models.
_PARTS = 40


def training_losses(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and training losses [n] of the run of that name; n is 0 where its log is not there."""
    records = read_log(folder / "runs" / name / LOG)
    losses = {record["step"]: record["loss"] for record in records if record.get("loss") is not None}
    return np.array(list(losses), int), np.array(list(losses.values()), float)


def draw_training(rows: Rows, folder: Path, picture: Path) -> list[str]:
    """Draw the first seed's pairs of MoBA and full attention that have logs; returns a table of their gaps, empty if
    there is no such pair."""
    pairs = list(_pairs(rows, folder))
    if not pairs:
        return []
    drawn, (losses, gaps, positions) = figure((12, 4), [1, 1, 1])
    shades = itertools.cycle(["0.75", "0.6", "0.45", "0.3", "0.0"])
    markers = itertools.cycle("osv^D")
    said = ["| model | at a quarter of the steps | half | three quarters | the end | first range | last range |"]
    said.append("|---" * 7 + "|")
    for full, moba, steps, by_kind in pairs:
        size, share = full["facts"]["size"], steps / steps[-1]
        for kind, values in by_kind.items():
            label = label_of(kind) if full is pairs[0][0] else None
            losses.plot(steps, values, label=label, **style(kind, marker=False))
        losses.annotate(size, (steps[-1], by_kind["full"][-1]), fontsize=7, xytext=(3, -2), textcoords="offset points")
        gap = 100 * (by_kind["moba"] / by_kind["full"] - 1)
        shade = {"color": next(shades), "marker": next(markers), "markersize": 3.5, "linewidth": 1}
        gaps.plot(share, gap, label=size, **shade)
        ends = [position["to"] + 1 for position in full["by_position"]]
        by_position = [100 * (at_range(i)(moba) / at_range(i)(full) - 1) for i in range(len(ends))]
        positions.plot(ends, by_position, label=size, **shade)
        cells = [gap[max(0, round(len(gap) * part) - 1)] for part in (0.25, 0.5, 0.75, 1.0)]
        cells += [by_position[0], by_position[-1]]
        said.append(f"| {size} | " + " | ".join(f"{cell:+.1f} %" for cell in cells) + " |")
    losses.set(xlabel="step", ylabel="training loss (nats per token)", yscale="log", title="training")
    losses.legend(fontsize=8)
    gaps.set(xlabel="share of the steps", ylabel="MoBA's loss over full's, less 1 (%)", title="training")
    positions.set(
        xlabel="position, up to", ylabel="MoBA's loss over full's, less 1 (%)", title="validation, at the end"
    )
    for axes in (gaps, positions):
        axes.axhline(0, color="black", linewidth=0.6)
    gaps.legend(fontsize=7)
    finish(drawn, picture)
    return said


def _pairs(rows: Rows, folder: Path):
    """Summaries of full attention and of MoBA of one size, the least compute first, with the last steps [n] of equal
    parts of the training and the mean losses [n] of these by kind."""
    seed = min((row["facts"]["seed"] for row in rows), default=0)
    for full in sorted(of(rows, kind="full", seed=seed), key=lambda row: row["pflops_days"]):
        for moba in of(rows, kind="moba", seed=seed, size=full["facts"]["size"]):
            logs = {row["facts"]["kind"]: training_losses(row["name"], folder) for row in (full, moba)}
            n = min(len(steps) for steps, _ in logs.values())
            if moba["pflops_days"] == full["pflops_days"] and n:
                parts = np.array_split(np.arange(n), min(n, _PARTS))
                steps = np.array([logs["full"][0][part[-1]] for part in parts])
                yield (
                    full,
                    moba,
                    steps,
                    {kind: np.array([losses[part].mean() for part in parts]) for kind, (_, losses) in logs.items()},
                )
