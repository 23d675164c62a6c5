"""What a build made, as lines and as a picture."""

from pathlib import Path

import numpy as np

from .build import Report


def lines(report: Report, prefix: Path) -> list[str]:
    """The report for the terminal."""
    least, median, nine, ninety_nine, most = np.quantile(report.lengths, [0, 0.5, 0.9, 0.99, 1]).astype(int).tolist()
    said = [
        f"documents: {report.documents:,}, {report.tokens:,} tokens, {report.text_bytes:,} bytes of text, "
        f"{report.text_bytes / report.tokens:.2f} bytes per token",
        f"lengths in tokens: shortest {least:,}, median {median:,}, 90 % below {nine:,}, 99 % below {ninety_nine:,}, "
        f"longest {most:,}",
        f"time: {report.seconds:.1f} s, {report.text_bytes / 1e6 / max(report.seconds, 1e-9):.1f} MB/s of text",
        f"written: {prefix}.bin, .idx, .json, .lengths.png",
    ]
    if report.bad:
        counts = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
        said.append(f"left out: {report.bad:,} documents ({counts}); {prefix}.bad.txt names them, and first:")
        said += [f"  {line}" for line in report.named[:5]]
    return said


def draw_lengths(lengths: np.ndarray, picture: Path) -> None:
    """Draw how many documents and how many of all tokens are of which length, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = lengths[lengths > 0]
    edges = np.geomspace(1, max(int(lengths.max()), 2) + 1, 49)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for weights, name, color in ((None, "documents", "tab:blue"), (lengths, "tokens", "tab:orange")):
        shares = np.histogram(lengths, edges, weights=weights)[0] / (len(lengths) if weights is None else lengths.sum())
        axes.stairs(100 * shares, edges, label=name, color=color, fill=weights is None, alpha=0.6)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="share (%)", title=f"{len(lengths):,} documents")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = picture.with_name(picture.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    partial.replace(picture)
