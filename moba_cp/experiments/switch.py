"""``moba-cp experiment switch``: MoBA throughout, full throughout, and MoBA followed by full attention.

The paper's training hybrid at small scale. Three runs of one config see the same data in the same order; only their
attention differs. The chart shows their losses, and their differences around the switch, where a spike would show.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ..model.schedule import Phase
from ..train.config import TrainConfig
from ..train.log import LOG, check_folder, read_log
from ..train.loop import Trainer
from ..train.mesh import close_mesh, launched_rank, launched_size, open_mesh
from ..train.plan import plan_run
from ..train.yaml_config import load

COLORS = {"moba": "tab:blue", "full": "tab:orange", "switch": "tab:green"}
LABELS = {"moba": "MoBA", "full": "full attention", "switch": "MoBA, then full"}
# Steps whose mean loss is compared before and after the switch.
WINDOW = 8


def main(args: argparse.Namespace) -> int:
    """Train the three runs (or read their logs), draw them, and print how the loss changes at the switch."""
    base = load(TrainConfig, args.config, args.overrides)
    folder = Path(args.directory)
    runs = {name: _variant(base, name, args.until, folder / name) for name in COLORS}
    plans = {name: plan_run(config, launched_size()) for name, config in runs.items()}
    if not args.redraw:
        for name in runs:
            check_folder(folder / name, False, args.overwrite)
        mesh = open_mesh(base.run)
        for name, plan in plans.items():
            if mesh.first:
                print(f"{LABELS[name]}:", *plan.summary(), sep="\n  ", flush=True)
            Trainer(plan, mesh, None).run()
        close_mesh(mesh)
    if launched_rank() == 0:
        logs = {name: read_log(folder / name / LOG) for name in runs}
        for name, log in logs.items():
            if not _losses(log):
                raise ValueError(f"{folder / name}: no step is logged there; train it first, without --redraw")
        first_full = _first_full_step(logs["switch"])
        picture = args.picture or folder / "switch.png"
        _draw(logs, first_full, picture)
        print(*_verdict(logs, first_full), f"chart: {picture}", sep="\n")
    return 0


def _variant(base: TrainConfig, name: str, until: float, folder: Path) -> TrainConfig:
    """The config of one run."""
    schedule = (Phase("moba", until), Phase("full")) if name == "switch" else ()
    kind = "full" if name == "full" else "moba"
    attention = replace(base.attention, default=kind, schedule=schedule)
    return replace(base, attention=attention, run=replace(base.run, directory=str(folder)))


def _first_full_step(log: list[dict]) -> int:
    """The first step with full attention."""
    return next(record["step"] for record in log if record.get("attention") == "full")


def _losses(log: list[dict], name: str = "loss") -> dict[int, float]:
    return {record["step"]: record[name] for record in log if record.get(name) is not None}


def rise(losses: dict[int, float], step: int, window: int = WINDOW) -> float:
    """Mean loss of ``window`` steps from ``step`` on, less that of the steps before."""
    after = [losses[s] for s in range(step, step + window) if s in losses]
    before = [losses[s] for s in range(step - window, step) if s in losses]
    return sum(after) / len(after) - sum(before) / len(before)


def _verdict(logs: dict[str, list[dict]], first_full: int) -> list[str]:
    lines = [f"mean loss of {WINDOW} steps from step {first_full} on, less that of {WINDOW} steps before:"]
    lines += [f"  {LABELS[name]:16} {rise(_losses(log), first_full):+.4f}" for name, log in logs.items()]
    lines.append("validation loss at the end:")
    for name, log in logs.items():
        validation = _losses(log, "validation_loss")
        lines.append(f"  {LABELS[name]:16} {validation[max(validation)]:.4f}")
    return lines


def _draw(logs: dict[str, list[dict]], first_full: int, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, near, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    last, base = max(_losses(logs["full"])), _losses(logs["moba"])
    width = max(2, (last - first_full) * 2)
    for name, log in logs.items():
        losses = _losses(log)
        style = {"color": COLORS[name], "label": LABELS[name], "linewidth": 1.1}
        whole.plot(list(losses), list(losses.values()), **style)
        # Losses differ more between batches than between runs: plot the difference to MoBA on the same batch.
        close = [step for step in losses if step >= first_full - width]
        near.plot(close, [losses[step] - base[step] for step in close], marker=".", **style)
        validation = _losses(log, "validation_loss")
        points = [step for step in validation if step >= last // 4]
        right.plot(points, [validation[step] for step in points], marker="o", markersize=4, **style)
    titles = (whole, "training loss"), (near, "training loss less MoBA's in the same step"), (right, "validation loss")
    for axes, title in titles:
        axes.axvline(first_full - 0.5, color="gray", linestyle="--", linewidth=0.8)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
    whole.set_ylabel("loss (nats per byte)")
    whole.legend()
    figure.savefig(picture, format="png", dpi=80)
    pyplot.close(figure)
