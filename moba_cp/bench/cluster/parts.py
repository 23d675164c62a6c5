"""The parts of the measurement, each over all lengths and numbers of ranks; collective over all ranks."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import training
from .inputs import Shape
from .measure import FULL, MOBA, WITHOUT_COPIES, Layer, Limits, dense_estimate, exchange_options, measure, overlap
from .predict import add_prediction, predictions
from .profile import write_profile
from .ranks import Ranks
from .rows import Report, Row
from .stand_in import stand_in

TRAINING_STEPS = 7


@dataclass
class Settings:
    """The command's options, checked."""

    shape: Shape
    tokens: tuple[int, ...]
    training_tokens: tuple[int, ...]
    check_tokens: int
    modes: tuple[str, ...]
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    stand_in: tuple[int, ...]
    """Numbers of ranks that two GPUs stand in for."""
    limits: Limits
    nodes: int
    profile: Path | None

    def described(self) -> dict:
        """Flat, for the report."""
        shape = asdict(self.shape)
        moba = shape.pop("moba")
        rest = {name: value for name, value in vars(self).items() if name not in ("shape", "limits", "profile")}
        return shape | {"block_size": moba["block_size"], "top_k": moba["top_k"]} | rest | asdict(self.limits)


def attention(settings: Settings, ranks: Ranks, report: Report) -> None:
    """MoBA in each mode, full attention, and PyTorch's; with the wire off too if that part is asked for."""
    for n_tokens in settings.tokens:
        for size in settings.sizes:
            _on(ranks, size, lambda: _attention(settings, ranks, report, n_tokens, size))


def _attention(settings: Settings, ranks: Ranks, report: Report, n_tokens: int, size: int) -> None:
    try:
        layer = Layer(settings.shape, n_tokens, size, ranks)
    except torch.OutOfMemoryError:
        layer = None
    if ranks.problem(None if layer else "out of memory", size):
        _add(ranks, report, [Row("attention", n_tokens, size, "inputs", note="out of memory")])
        return
    modes = [layer.moba(mode) for mode in settings.modes] if size > 1 else [layer.moba("auto", MOBA)]
    if "attention" in settings.parts:
        estimate = _estimate(settings, ranks, report, n_tokens, size)
        fast = measure(layer, "attention", modes, settings.limits, lambda name: 0.0)
        if size > 1:
            predicted = predictions(layer, list(settings.modes))
            for row in fast:
                add_prediction(row, predicted.get(row.name))
        _add(ranks, report, fast)
        full = [layer.full()]
        if any(estimate(c.name) <= settings.limits.most_ms for c in full):
            full += layer.peers()
        rows = measure(layer, "attention", full, settings.limits, estimate)
        for candidate, row in zip(full[1:], rows[1:], strict=True):
            if row.both is not None:
                row.note = layer.disagreement(full[0], candidate) or ""
        _add(ranks, report, rows)
    if "overlap" in settings.parts and size > 1:
        for candidate in modes:
            if not any(row.name == candidate.name and row.note for row in report.rows[-len(modes) :]):
                _add(ranks, report, [overlap(layer, candidate, settings.limits)])
    if settings.profile is not None:
        write_profile(settings.profile, layer, modes)


def _estimate(settings: Settings, ranks: Ranks, report: Report, n_tokens: int, size: int) -> Callable[[str], float]:
    """ms that a dense candidate may take: by the square of T from what it took before, or by its FLOPs."""

    def estimate(name: str) -> float:
        for row in reversed(report.rows):
            if (row.part, row.name, row.ranks) == ("attention", name, size) and row.both is not None:
                return row.both * (n_tokens / row.tokens) ** 2
        return dense_estimate(settings.shape, n_tokens, size, ranks.on_gpu)

    return lambda name: ranks.most(estimate(name) if ranks.first else 0.0, size)


def nodes(settings: Settings, ranks: Ranks, report: Report) -> None:
    """MoBA with and without the hierarchy of nodes, over sockets: bytes are real, times are an emulation's."""
    size = ranks.sizes[-1]

    def one(n_tokens: int) -> None:
        layer = Layer(settings.shape, n_tokens, size, ranks)
        # Between nodes no mode has copy engines.
        modes = dict.fromkeys(mode.replace(WITHOUT_COPIES, "") for mode in settings.modes)
        candidates = [layer.moba(mode, f"{MOBA} {mode} flat", ranks_per_node=1) for mode in modes]
        # All-gathering knows no nodes.
        planned = [mode for mode in modes if exchange_options(mode).mode != "allgather"]
        candidates += [layer.moba(mode, f"{MOBA} {mode} by node") for mode in planned]
        rows = measure(layer, "nodes", candidates, settings.limits, lambda name: 0.0)
        for row in rows:
            row.note = row.note or f"{settings.nodes} nodes emulated on one machine, over sockets"
        _add(ranks, report, rows)

    for n_tokens in settings.tokens:
        _on(ranks, size, lambda: one(n_tokens))


def training_step(settings: Settings, ranks: Ranks, report: Report) -> None:
    """A step of a small model, MoBA and full."""
    reason = training.missing()
    if reason:
        if ranks.first:
            print(reason, flush=True)
        return
    shape = settings.shape
    for n_tokens in settings.training_tokens:
        for size in settings.sizes:
            for kind in (MOBA, FULL):

                def one() -> None:
                    row = Row("training", n_tokens, size, kind)
                    # Four layers of half the heads.
                    expected = 2 * dense_estimate(shape, n_tokens, size, ranks.on_gpu)
                    if kind == FULL and expected > 2 * settings.limits.most_ms:
                        row.note = f"skipped: attention alone about {expected:.0f} ms"
                    else:
                        row = training.measure_step(shape, kind, n_tokens, size, TRAINING_STEPS, ranks)
                    _add(ranks, report, [row])

                _on(ranks, size, one)


def standing_in(settings: Settings, ranks: Ranks, report: Report) -> None:
    """MoBA on the first and the last of more ranks than there may be."""
    for n_tokens in settings.tokens:
        alone = report.find("attention", n_tokens, 1, MOBA)
        for size in settings.stand_in:

            def one() -> None:
                for row in stand_in(settings.shape, n_tokens, size, settings.modes, settings.limits, ranks):
                    if alone and row.both:
                        row.note = row.note or f"two GPUs: {100 * row.efficiency(alone):.0f} % of {size} times one"
                    _add(ranks, report, [row])

            _on(ranks, 2, one)


def _on(ranks: Ranks, size: int, function: Callable[[], None]) -> None:
    """Run on the first ``size`` ranks while the others wait."""
    if ranks.rank < size:
        function()
        if ranks.on_gpu:
            torch.cuda.empty_cache()
    ranks.meet()


def _add(ranks: Ranks, report: Report, rows: list[Row]) -> None:
    for row in rows if ranks.first else ():
        report.add(row)


def _nothing(settings: Settings, ranks: Ranks, report: Report) -> None:
    """Overlap is measured with attention's inputs where both are asked for."""
    if "attention" not in settings.parts:
        attention(settings, ranks, report)


PARTS = {"attention": attention, "overlap": _nothing, "training": training_step, "nodes": nodes}
"""By name, in the order in which they run."""
