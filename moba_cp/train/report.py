"""The reports of a run while it goes and when it ends: log, progress line, curve. Only rank 0 reports."""

import collections
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..cp.heads.choice import news
from .checkpoint import find
from .curve import draw
from .log import CURVE, LOG, Progress, RunLog, is_own
from .memory import MemoryPlan
from .mesh import Mesh
from .plan import RunPlan
from .sinks import open_sinks, scalars
from .yaml_config import to_yaml

_SPIKE_STEPS = 32


class Reporter:
    """Opens the run's folder on entering; closes the log and draws the curve on leaving, however the run ends."""

    def __init__(self, plan: RunPlan, mesh: Mesh, start_step: int, start: Path | None, memory: MemoryPlan):
        self.plan, self.mesh, self.start_step, self._memory = plan, mesh, start_step, memory
        self.folder = Path(plan.config.run.directory)
        # A run resumed in another folder starts a log of its own there.
        self._kept_steps = start_step if is_own(self.folder, start) else 0
        self._log: RunLog | None = None
        self._sinks: list = []
        self._progress: Progress | None = None
        self._attention: str | None = None
        self._late = False
        """Whether lines of the log wait to be written."""
        self._spikes = {"loss": _Spikes(1.5), "gradient_norm": _Spikes(10.0)}

    def __enter__(self) -> "Reporter":
        if self.mesh.first:
            plan = self.plan
            facts = {"device": _device_name(self.mesh.device), "ranks": plan.size, "context_size": plan.context_size}
            # What `moba-cp plan --measured` needs.
            facts["layers"] = [asdict(layer) for layer in self._memory.layers]
            facts["weights_gathered"] = self._memory.gathered
            self._log = RunLog(
                self.folder, self._kept_steps, to_yaml(plan.config), facts, plan.config.run.failed_save == "go_on"
            )
            self._progress = Progress(plan.config.run.steps, self.start_step)
            self._sinks = open_sinks(plan.config, self.folder, self._kept_steps)
        return self

    def note(self, *lines: str) -> None:
        """Show lines that stay."""
        if self._progress is not None:
            for line in lines:
                self._progress.note(line)

    def start(self, validation_loss: float, beside: dict[str, Any] | None = None) -> None:
        """Report the validation loss before the first step, and what was measured ``beside`` it."""
        if self._log is not None:
            self._write({"step": 0, "validation_loss": validation_loss} | (beside or {}))
            self._progress.note(f"step 0/{self.plan.config.run.steps}  validation {validation_loss:.4f}")

    def report(self, record: dict[str, Any]) -> None:
        """Report one step; ``record`` becomes its line in the log."""
        if self._log is not None:
            self._write(record)
            if self._attention not in (None, record["attention"]):
                self._progress.note(f"step {record['step']}: attention is {record['attention']} from here on")
            self._attention = record["attention"]
            self.note(*news())
            for remark in self._remarks(record):
                self._progress.note(f"step {record['step']}: {remark}")
            sent = record["exchange"]["sent_bytes"]
            self._progress.show(
                record["step"], record["loss"], record["tokens_per_second"], sent, record.get("validation_loss")
            )

    def _write(self, record: dict[str, Any]) -> None:
        problem = self._log.write(record)
        if problem and not self._late:
            self.note(f"step {record['step']}: {problem}; its lines wait for room")
        self._late = problem is not None
        if self._sinks:
            values = scalars(record)
            self._sinks = [sink for sink in self._sinks if self._shown(lambda: sink.write(record["step"], values))]

    def _shown(self, report: Callable[[], None]) -> bool:
        """Whether charts took a report; ones that do not end no run, and get no more."""
        try:
            report()
        except Exception as error:
            self.note(f"reports beside the log end here: {type(error).__name__}: {error}")
            return False
        return True

    def _remarks(self, record: dict[str, Any]) -> list[str]:
        """What a reader should know of this step: that it was left out, or that it stands out."""
        if record.get("skipped"):
            return [f"loss {record['loss']}, gradient norm {record['gradient_norm']}: left out, no weight was changed"]
        return [
            f"{name} {record[name]:.4g} is {record[name] / usual:.1f} times its median of {_SPIKE_STEPS} steps"
            for name, spikes in self._spikes.items()
            if name in record and (usual := spikes.seen(record[name]))
        ]

    def draw(self) -> None:
        """Draw the curve of all steps so far, with each checkpoint: a run that is killed has one too. A picture that
        cannot be drawn ends no run."""
        if self._log is not None:
            name = self.folder.absolute().name
            try:
                unit = self.plan.corpus.unit.removesuffix("s")
                draw(self.folder / LOG, self.folder / CURVE, f"{name} on {self.plan.size} ranks", unit)
            except Exception as error:
                self.note(f"{self.folder / CURVE} could not be drawn: {type(error).__name__}: {error}")

    def __exit__(self, exception_type, exception, traceback) -> None:
        if self._log is None:
            return
        if problem := self._log.close():
            self.note(f"{problem}; its last lines are lost")
        self._progress.close()
        for sink in self._sinks:
            self._shown(sink.close)
        self.draw()


class _Spikes:
    """Values that stand out from those before: more than ``ratio`` times the median."""

    def __init__(self, ratio: float):
        self.ratio, self._recent = ratio, collections.deque(maxlen=_SPIKE_STEPS)

    def seen(self, value: float) -> float | None:
        """Take the next value; the median of those before if it stands out from a full window of them, else None."""
        full, usual = len(self._recent) == _SPIKE_STEPS, statistics.median(self._recent or (value,))
        self._recent.append(value)
        return usual if full and 0 < usual < value / self.ratio else None


def closing_lines(folder: Path) -> list[str]:
    """Where everything of a finished run is."""
    folder = folder.absolute()
    return [
        f"curve:      {folder / CURVE}",
        f"log:        {folder / LOG}",
        f"checkpoint: {find(folder)}",
    ]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
