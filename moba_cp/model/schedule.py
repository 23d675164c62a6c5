"""Hybrids by time: which kind of attention is used in which part of a training run."""

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["moba", "full"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Phase:
    """A part of training."""

    kind: Kind
    """``moba``: the layers attend as ``full_layers`` says; ``full``: every layer attends fully."""

    until: float | None = None
    """Where it ends, as a fraction of all steps; the last phase has none."""


def check_schedule(schedule: tuple[Phase, ...]) -> None:
    """Raise ValueError unless the phases follow one another to the end of training."""
    begin = 0.0
    for i, phase in enumerate(schedule):
        name = f"schedule[{i}]"
        if phase.kind not in KINDS:
            raise ValueError(f"{name}.kind={phase.kind!r} is not a kind of attention; use one of {', '.join(KINDS)}")
        last = i == len(schedule) - 1
        if last:
            if phase.until is not None:
                raise ValueError(f"{name}.until={phase.until} ends the last phase early; leave until out there")
            return
        if phase.until is None:
            raise ValueError(
                f"{name}.until is missing; only the last phase lasts to the end, so say such as until: 0.9"
            )
        if not begin < phase.until < 1:
            raise ValueError(f"{name}.until={phase.until} is not between {begin} and 1; phases follow one another")
        begin = phase.until


def phase_ends(schedule: tuple[Phase, ...], steps: int) -> list[int]:
    """The last step of each phase, steps being counted from 1.

    Raises:
        ValueError: a phase has no step at all.
    """
    ends = [steps if phase.until is None else int(phase.until * steps + 0.5) for phase in schedule]
    for i, (begin, end) in enumerate(zip([0, *ends], ends)):
        if end <= begin:
            raise ValueError(f"schedule[{i}] has none of {steps} steps; train longer or drop it")
    return ends


def phase_at(schedule: tuple[Phase, ...], step: int, steps: int) -> Phase:
    """The phase of ``step`` out of ``steps``, counted from 1."""
    ends = phase_ends(schedule, steps)
    return next(phase for phase, end in zip(schedule, ends) if step <= end)
