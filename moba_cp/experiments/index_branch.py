"""``moba-cp experiment index-branch``: what sparse attention loses against full attention, by who chooses the blocks.

Runs of one config see the same data in the same order: full attention throughout, and full attention followed by MoBA,
whose blocks are chosen by mean keys, or by index branches that have learned from full attention meanwhile.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ..train.config import TrainConfig
from ..train.curve import save_picture, smoothed
from ..train.log import LOG, check_folder, read_log
from ..train.loop import Trainer
from ..train.mesh import close_mesh, launched_rank, launched_size, open_mesh
from ..train.plan import plan_run
from ..train.yaml_config import load

LABELS = {"full": "full attention", "moba": "mean keys", "mean": "index branch, mean", "max": "index branch, maximum"}
VARIANTS = tuple(LABELS)
_COLORS = {"full": "tab:red", "moba": "tab:blue", "mean": "tab:green", "max": "tab:purple"}
_LINES = {"full": "--", "moba": "-.", "mean": "-", "max": ":"}


def main(args: argparse.Namespace) -> int:
    """Train the runs (or read their logs), draw them, and print their losses beside full attention's.

    Raises:
        ValueError: the config has no index branches, or no warm-up; or what a run's config would raise.
    """
    base, folder = load(TrainConfig, args.config, args.overrides), Path(args.directory)
    _check(base)
    runs = {name: variant(base, name, folder / name) for name in VARIANTS}
    if not args.redraw:
        plans = {name: plan_run(runs[name], launched_size()) for name in VARIANTS if name in args.only}
        for name in plans:
            check_folder(folder / name, False, args.overwrite)
        mesh = open_mesh(base.run)
        for name, plan in plans.items():
            if mesh.first:
                print(f"{LABELS[name]}:", *plan.summary(), sep="\n  ", flush=True)
            Trainer(plan, mesh, None).run()
        close_mesh(mesh)
    if launched_rank() == 0:
        logs = {name: log for name in VARIANTS if (log := read_log(folder / name / LOG))}
        if not logs:
            raise ValueError(f"{folder}: no run is logged there; train them first, without --redraw")
        picture = args.picture or folder / "index-branch.png"
        _draw(logs, picture)
        print(*verdict(logs), f"chart: {picture}", sep="\n")
    return 0


def variant(base: TrainConfig, name: str, folder: Path) -> TrainConfig:
    """The config of one run."""
    attention = base.attention
    if name == "full":
        attention = replace(attention, default="full", schedule=(), full_layers="none", index=None)
    elif name == "moba":
        attention = replace(attention, index=None)
    else:
        attention = replace(attention, index=replace(attention.index, score=name))
    return replace(base, attention=attention, run=replace(base.run, directory=str(folder)))


def _check(base: TrainConfig) -> None:
    if base.attention.index is None:
        raise ValueError("attention.index=null: the config has no index branches; try hybrid/index_branch")
    schedule = base.attention.schedule
    if [phase.kind for phase in schedule] != ["full", "moba"]:
        raise ValueError(
            f"attention.schedule has the kinds {[phase.kind for phase in schedule]}; index branches learn from full "
            "attention first: [{until: 0.3, kind: full}, {kind: moba}]"
        )


def verdict(logs: dict[str, list[dict]]) -> list[str]:
    """Lines for the terminal: validation losses at the last step that all runs have, and how far from full attention's
    they are; and what index branches have learned."""
    validation = {name: {x["step"]: x["validation_loss"] for x in _with(log, "validation_loss")}
                  for name, log in logs.items()}  # fmt: skip
    # Before the first step all are alike.
    common = set.intersection(*map(set, validation.values())) - {0} if validation else set()
    if not common:
        return ["no step at which all runs were validated"]
    lines = [f"validation loss at step {max(common)}, and over full attention's:"]
    ends = {name: losses[max(common)] for name, losses in validation.items()}
    for name, loss in ends.items():
        over = ""
        if "full" in ends and name != "full":
            gaps = [100 * (validation[name][step] / validation["full"][step] - 1) for step in sorted(common)]
            # How much the last one means shows in the others.
            over = f"  {gaps[-1]:+.2f} % (between {min(gaps):+.2f} and {max(gaps):+.2f} along the run)"
        lines.append(f"  {LABELS[name]:22} {loss:.4f}{over}")
    for name, log in logs.items():
        learned = [x["index_loss"] for x in _with(log, "index_loss") if x["attention"] == "full"]
        if learned:
            now = sum(learned[-8:]) / len(learned[-8:])
            lines.append(f"  {LABELS[name]}: divergence at most {max(learned):.4f}, {now:.4f} when it begins to choose")
    return lines


def _with(log: list[dict], name: str) -> list[dict]:
    return [record for record in log if record.get(name) is not None]


def _draw(logs: dict[str, list[dict]], picture: Path) -> None:
    from .charts import figure

    drawn, (whole, gap, divergence) = figure((13, 4), [1.0, 1.0, 1.0])
    points = lambda log, name: [(x["step"], x[name]) for x in _with(log, name)]
    validation = {name: dict(points(log, "validation_loss")) for name, log in logs.items()}
    for name, log in logs.items():
        style = {"color": _COLORS[name], "linestyle": _LINES[name], "label": LABELS[name], "linewidth": 1.3}
        whole.plot(*zip(*smoothed(points(log, "loss"))), **style)
        steps = [step for step in validation[name] if step and step in validation.get("full", {})]
        over = [100 * (validation[name][step] / validation["full"][step] - 1) for step in steps]
        gap.plot(steps, over, marker="o", markersize=3, **style)
        if learned := points(log, "index_loss"):
            divergence.plot(*zip(*smoothed(learned)), **style)
    sparse = [x["step"] for log in logs.values() for x in log if x.get("attention") == "moba"]
    for axes in (whole, gap, divergence):
        if sparse:
            axes.axvline(min(sparse) - 0.5, color="gray", linestyle="--", linewidth=0.8)
        axes.set(xlabel="step")
    whole.set(title="training loss, running mean", ylabel="nats per token")
    gap.set(title="validation loss over full attention's", ylabel="%")
    divergence.set(title="what index branches still have to learn", ylabel="divergence (nats), running mean")
    whole.legend(fontsize=8)
    save_picture(drawn, picture, 80)
