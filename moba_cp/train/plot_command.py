"""``moba-cp plot RUN...``: one picture of one or several runs, from their logs."""

import argparse
import itertools
from pathlib import Path

from ..outputs import output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--to", type=output_file(".png"), default="runs.png", metavar="FILE", help="the PNG (default: runs.png)"
    )
    parser.add_argument("--title", help="above the picture (default: none)")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    from .log import LOG, read_log

    folders = [Path(run) for run in arguments.runs]
    runs = {}
    for folder, name in zip(folders, _names(folders)):
        if not (folder / LOG).is_file():
            raise ValueError(f"{folder}: no {LOG} there; name the folder of a run")
        runs[name] = read_log(folder / LOG)
    draw(runs, arguments.to, arguments.title)
    for name, records in runs.items():
        print(_line(name, records))
    print(f"written: {arguments.to}")
    return 0


def axes_of(records: list[dict]) -> dict[str, list[float]]:
    """For each record, where it stands on each axis: ``steps``, ``tokens`` (with a label) and ``hours``, since the
    run's beginning."""
    sums = {"tokens": "labels", "hours": "seconds"}
    axes = {name: list(itertools.accumulate(record.get(key) or 0 for record in records)) for name, key in sums.items()}
    return {
        "steps": [record["step"] for record in records],
        "tokens": axes["tokens"],
        "hours": [seconds / 3600 for seconds in axes["hours"]],
    }


def draw(runs: dict[str, list[dict]], picture: Path, title: str | None = None) -> None:
    """Draw loss against steps, tokens and hours, and by position at the last validation, of ``runs`` (name -> log)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from .curve import save_picture, smoothed

    figure, panels = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for color, (name, records) in zip(itertools.cycle(f"C{i}" for i in range(10)), runs.items()):
        for panel, (axis, places) in zip(panels.flat, axes_of(records).items()):
            panel.set(xlabel=axis, ylabel="loss (nats per token)")
            training = [(x, r["loss"]) for x, r in zip(places, records) if r.get("loss") is not None]
            held_out = [(x, r["validation_loss"]) for x, r in zip(places, records) if r.get("validation_loss")]
            if training:
                panel.plot(*zip(*smoothed(training)), color=color, label=name)
            if held_out:
                label = None if training else name
                panel.plot(*zip(*held_out), color=color, marker="o", markersize=4, linestyle="--", label=label)
        rows = next((r["validation_by_position"] for r in reversed(records) if r.get("validation_by_position")), [])
        if rows:
            panels[1, 1].plot(
                [row["to"] + 1 for row in rows], [row["loss"] for row in rows], "o-", color=color, label=name
            )
    panels[1, 1].set(xlabel="position in the document, up to", ylabel="validation loss", xscale="log")
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    if title:
        figure.suptitle(title)
    save_picture(figure, picture, 110)


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    for depth in range(1, max(len(folder.absolute().parts) for folder in folders) + 1):
        names = ["/".join(folder.absolute().parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{folders[0]}: named twice")


def _line(name: str, records: list[dict]) -> str:
    last = next((record for record in reversed(records) if record.get("loss") is not None), {})
    held_out = next((record["validation_loss"] for record in reversed(records) if record.get("validation_loss")), None)
    axes = axes_of(records)
    said = [f"{name}: {last.get('step', 0)} steps", f"{axes['tokens'][-1]:,} tokens" if records else "nothing yet"]
    said += [f"{axes['hours'][-1]:.2f} hours"] if records else []
    said += [f"loss {last['loss']:.4f}"] if last else []
    return ", ".join([*said, *([f"validation {held_out:.4f}"] if held_out is not None else [])])
