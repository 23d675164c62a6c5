"""``moba-cp plan --measured RUN...``: the forecast of each run beside what its log measured."""

import json
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..model.layer import LayerMemory
from .config import TrainConfig
from .curve import save_picture
from .log import CONFIG, LOG, VERSIONS, human, read_log
from .memory import GIB
from .predict import GPU, GPUS, forecast
from .yaml_config import load

# Kernels are compiled, and memory is first asked for, in a run's first steps.
_WARM_UP = 1


@dataclass(frozen=True)
class Comparison:
    """One run, predicted beside measured."""

    run: str
    device: str
    ranks: int
    context: int
    """P."""
    parameters: int
    seq_len: int
    sequences: int
    """Of a step."""
    attention: str
    kind: str
    """``MoBA``, ``full attention`` or ``hybrid``."""
    recompute: str
    """``model.recompute`` of the run."""
    layers: str
    """What they kept for backward."""
    steps: int
    """That were measured."""
    seconds: float
    """Median of a step."""
    predicted_seconds: float
    gib: float | None
    """Most that tensors took on the first rank's device; None if the log does not have it."""
    predicted_gib: float | None
    """None: it would not fit."""

    @property
    def time_ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_seconds / self.seconds

    @property
    def memory_ratio(self) -> float | None:
        """Predicted over measured."""
        return self.predicted_gib / self.gib if self.gib and self.predicted_gib else None


def compare(folder: Path, per_node: int | None = None, host_gib: float | None = None) -> Comparison:
    """The run in ``folder`` and its forecast.

    Args:
        folder: a run's, with its ``config.yaml``, ``versions.json`` and ``log.jsonl``.
        per_node: devices of a machine; None: the usual.
        host_gib: host memory of a rank; None: the usual.

    Raises:
        ValueError: no run, one on CPUs or on a GPU of which nothing is known, or too few steps.
    """
    for name in (CONFIG, VERSIONS, LOG):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name} there; name the folder of a run")
    config, facts = load(TrainConfig, folder / CONFIG, []), json.loads((folder / VERSIONS).read_text(encoding="utf-8"))
    gpu = _gpu(folder, facts.get("device", "unknown"))
    # Of a schedule, the last phase: that is what is predicted.
    records = [record for record in read_log(folder / LOG) if "seconds" in record]
    records = [record for record in records[_WARM_UP:] if record["step"] != config.run.trace_step]
    records = [record for record in records if record.get("attention") == records[-1].get("attention")]
    if not records:
        raise ValueError(f"{folder}: fewer than {_WARM_UP + 1} steps; the first is left out")
    layers = [LayerMemory(**layer) for layer in facts["layers"]] if "layers" in facts else None
    made = forecast(config, facts["ranks"], gpu, per_node, host_gib, layers, facts.get("weights_gathered", False))
    peaks = [record["peak_gib"] for record in records if "peak_gib" in record]
    attention = config.attention.at(config.run.steps, config.run.steps)
    full = len(attention.full_layer_numbers(config.model.n_layers))
    return Comparison(
        folder.name,
        facts["device"],
        made.ranks,
        made.context,
        config.model.n_parameters(embeddings=True),
        config.data.seq_len,
        made.config.data.sequences_per_step,
        f"{full} of {config.model.n_layers} full, blocks of {attention.block_size}, top-{attention.top_k}",
        "MoBA" if not full else "full attention" if full == config.model.n_layers else "hybrid",
        config.model.recompute,
        made.memory.kept if made.memory is not None else "does not fit",
        len(records),
        statistics.median(record["seconds"] for record in records),
        made.step_seconds,
        max(peaks, default=None),
        made.memory.device / GIB if made.memory is not None else None,
    )


def _gpu(folder: Path, device: str) -> GPU:
    for name, gpu in GPUS.items():
        if re.search(rf"\b{name}\b", device, re.IGNORECASE):
            return gpu
    raise ValueError(f"{folder}: ran on {device!r}; forecasts are for {', '.join(GPUS)}")


def table(rows: list[Comparison]) -> list[str]:
    """The rows in Markdown, and the spread of predicted over measured."""
    lines = [
        "| run | GPUs | parameters | tokens | attention | layers keep | s, measured | predicted | | GiB, measured "
        "| predicted | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gpus = f"{row.ranks} x {row.device.removeprefix('NVIDIA ')}" + (f", P = {row.context}" if row.ranks > 1 else "")
        tokens = f"{row.seq_len:,}" if row.sequences == 1 else f"{row.sequences} x {row.seq_len:,}"
        cells = [row.run, gpus, human(row.parameters, ""), tokens, row.attention, row.layers]
        cells += [f"{row.seconds:.3g}", f"{row.predicted_seconds:.3g}", f"{100 * (row.time_ratio - 1):+.1f} %"]
        cells += ["-" if x is None else f"{x:.1f}" for x in (row.gib, row.predicted_gib)]
        cells.append("-" if row.memory_ratio is None else f"{100 * (row.memory_ratio - 1):+.1f} %")
        lines.append(f"| {' | '.join(cells)} |")
    spread = {"time": [row.time_ratio for row in rows], "memory": [x for row in rows if (x := row.memory_ratio)]}
    lines += [
        "",
        *(
            f"predicted over measured, {name}: {min(x):.3f}, {statistics.median(x):.3f}, {max(x):.3f} "
            f"(minimum, median and maximum of {len(x)})"
            for name, x in spread.items()
            if x
        ),
    ]
    return lines


def figures(rows: list[Comparison]) -> list[dict]:
    """The rows for a JSON file."""
    return [asdict(row) | {"time_ratio": row.time_ratio, "memory_ratio": row.memory_ratio} for row in rows]


def draw(rows: list[Comparison], picture: Path) -> None:
    """Draw seconds and memory of a step against its tokens, as measured, one line per model, attention, recomputation
    and number of devices; full attention also up to the model's longest row, as ``a T + b T^2`` through its own two
    longest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple, list[Comparison]] = {}
    for row in sorted(rows, key=lambda row: (row.parameters, row.ranks, row.seq_len * row.sequences)):
        key = row.parameters, row.kind, row.ranks, row.device, row.attention, row.recompute
        lines.setdefault(key, []).append(row)
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for i, line in enumerate(lines.values()):
        first = line[0]
        gpus = f"{first.ranks} x {first.device.removeprefix('NVIDIA ')}"
        style = {
            "color": f"C{i}",
            "marker": "osD^v*"[i % 6],
            "label": f"{human(first.parameters, '')}: {first.kind}, {gpus}"
            + (f", recompute: {first.recompute}" if first.recompute != "auto" else ""),
        }
        time.plot([row.seq_len * row.sequences for row in line], [row.seconds for row in line], **style)
        known = [(row.seq_len * row.sequences, row.gib) for row in line if row.gib]
        if known:
            memory.plot(*zip(*known), **style)
        longest = max(row.seq_len for row in rows if row.parameters == first.parameters)
        if first.kind != "MoBA" and len(line) > 1 and line[-1].seq_len < longest:
            (t1, s1), (t2, s2) = ((row.seq_len, row.seconds) for row in line[-2:])
            b = (s2 / t2 - s1 / t1) / (t2 - t1)
            beyond = np.geomspace(t2, longest, 12)
            scaled = (s2 / t2 - b * t2) * beyond + b * beyond**2
            time.plot(beyond, scaled, "--", color=f"C{i}", label="the same, computed: a T + b T\u00b2")
    time.set(ylabel="seconds a step", yscale="log")
    memory.set(ylabel="GiB of device memory, at most", ylim=(0, None))
    ticks = sorted({row.seq_len * row.sequences for row in rows})
    for panel in (time, memory):
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{n // 1024}K" if n < 2**20 else f"{n / 2**20:g}M" for n in ticks])
        panel.set_xlabel("tokens a step")
        panel.grid(alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_picture(figure, picture, 110)
