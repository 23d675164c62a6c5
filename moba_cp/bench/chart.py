"""Charts: panels of curves as a PNG. What a chart shows is data first, so that a test can look at it."""

from dataclasses import dataclass, field
from pathlib import Path

from .rows import short


@dataclass
class Curve:
    """One line of a panel. Points (x, y) may come in any order; they are drawn by growing x."""

    label: str
    points: list[tuple[float, float]]
    style: dict = field(default_factory=dict)
    """Arguments of matplotlib's ``plot``."""


@dataclass
class Panel:
    """One pair of axes; x is logarithmic."""

    x_label: str
    y_label: str
    curves: list[Curve]
    title: str = ""
    log_y: bool = True


def figure(panels: list[Panel], title: str):
    """A matplotlib figure of the panels, side by side."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2 + 5.2 * len(panels), 5.2), layout="constrained")
    for axis, panel in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in panel.curves:
            axis.plot(*zip(*sorted(curve.points), strict=True), label=curve.label, **{"marker": "o", **curve.style})
        ticks = sorted({x for curve in panel.curves for x, _ in curve.points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [short(x) for x in ticks])
        if panel.log_y:
            axis.set_yscale("log")
        axis.set_xlabel(panel.x_label)
        axis.set_ylabel(panel.y_label)
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, handlelength=4)
    drawn.suptitle(title, fontsize=9)
    return drawn


def draw(path: str | Path, panels: list[Panel], title: str) -> None:
    """Write the panels to ``path`` as a PNG."""
    figure(panels, title).savefig(path, dpi=150)
