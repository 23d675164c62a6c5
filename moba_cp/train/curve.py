"""The loss curve of a run as a picture."""

from pathlib import Path

from .log import read_log


def draw(log: Path, picture: Path, title: str, unit: str = "token") -> None:
    """Draw training and validation loss by step from a JSONL ``log`` into the PNG ``picture``; tokens are ``unit``s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(log)
    # null stands for what was not finite.
    training, validation = (
        [(record["step"], record[name]) for record in records if record.get(name) is not None]
        for name in ("loss", "validation_loss")
    )
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if training:
        axes.plot(*zip(*training), color="tab:blue", alpha=0.35, linewidth=0.8, label="training")
        axes.plot(*zip(*smoothed(training)), color="tab:blue", label="training, running mean")
    if validation:
        axes.plot(*zip(*validation), color="tab:orange", marker="o", markersize=4, label="validation")
        step, loss = validation[-1]
        axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(-4, 8), ha="right")
    axes.set(xlabel="step", ylabel=f"loss (nats per {unit})", title=title)
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    save_picture(figure, picture, 120)


def save_picture(figure, picture: Path, dpi: int) -> None:
    """Write a figure of pyplot's as a PNG, whole or not at all, and close it."""
    from matplotlib import pyplot

    partial = picture.with_name(picture.name + ".partial")
    figure.savefig(partial, format="png", dpi=dpi)
    pyplot.close(figure)
    partial.replace(picture)


def smoothed(points: list[tuple[int, float]], decay: float = 0.9) -> list[tuple[int, float]]:
    """Exponential running mean, unbiased: each is a weighted mean of the values so far, with weights that sum to 1."""
    means, total, weight = [], 0.0, 0.0
    for step, value in points:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append((step, total / weight))
    return means
