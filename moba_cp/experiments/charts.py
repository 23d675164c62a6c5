"""How the charts look: kinds told apart by colour, line and marker, so that they can be told apart in grey too."""

from pathlib import Path

import numpy as np

from . import paper
from .fit import PowerLaw

LABELS = {
    "moba": "MoBA",
    "full": "full attention",
    "switch": "MoBA, then full",
    "hybrid": "MoBA, last layer full",
    "window": "window and sink",
    "conv0": "MoBA, keys not convolved",
    "conv3": "MoBA, keys convolved by 3",
    "conv5": "MoBA, keys convolved by 5",
}
PAPER = "0.55"
"""Grey: what the paper published."""
_COLORS = {"moba": "tab:blue", "full": "tab:red", "switch": "tab:green", "hybrid": "tab:green", "window": "tab:orange",
           "conv0": "tab:gray", "conv3": "tab:orange", "conv5": "tab:green"}  # fmt: skip
_LINES = {"moba": "-", "full": "--", "switch": "-.", "hybrid": "-.", "window": ":", "conv0": "--", "conv3": ":",
          "conv5": "-."}  # fmt: skip
_MARKERS = {"moba": "o", "full": "s", "switch": "^", "hybrid": "^", "window": "D", "conv0": "v", "conv3": "D",
            "conv5": "^"}  # fmt: skip


def label_of(kind: str) -> str:
    """What a kind of attention is called in a legend."""
    return LABELS[kind]


def style(kind: str, line: bool = True, marker: bool = True) -> dict:
    """Keyword arguments of matplotlib for the line and the markers of a kind."""
    kwargs = {"color": _COLORS[kind]}
    if line:
        kwargs |= {"linestyle": _LINES[kind], "linewidth": 1.3}
    if marker:
        kwargs |= {"marker": _MARKERS[kind], "markersize": 5}
    return kwargs


def figure(size: tuple[float, float], widths: list[float], rows: int = 1):
    """A figure and its axes, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(
        rows, len(widths), figsize=size, width_ratios=widths, layout="constrained", squeeze=False
    )
    for one in axes.flat:
        one.grid(alpha=0.3, which="both")
    return drawn, list(axes.flat)


def finish(drawn, picture: Path) -> None:
    """Write a figure as a PNG and close it; tick labels on logarithmic axes are plain numbers."""
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    from ..train.curve import save_picture

    for axes in drawn.axes:
        if axes.get_yscale() == "log":
            low, high = axes.get_ylim()
            ticks = FormatStrFormatter("%.3g")
            axes.yaxis.set_major_formatter(ticks)
            # Within less than a decade there may be no other ticks.
            axes.yaxis.set_minor_formatter(ticks if high < 4 * low else NullFormatter())
            axes.tick_params(axis="y", which="both", labelsize=7)
        if axes.get_xscale() == "log":
            axes.xaxis.set_minor_formatter(NullFormatter())
    save_picture(drawn, picture, 90)


def draw_paper_law(axes, published: dict[str, PowerLaw]) -> None:
    """The paper's power laws over the compute of its models, in grey."""
    compute = np.geomspace(*paper.COMPUTE, 20)
    for kind, law in published.items():
        line = "-" if kind == "moba" else "--"
        axes.plot(compute, law(compute), color=PAPER, linestyle=line, label=f"{label_of(kind)}: {law}")
    axes.set(xscale="log", yscale="log", xlabel="compute (PFLOP/s-days)", title="the paper's lines (other data)")
    axes.legend(fontsize=7)
