"""The reports of a run while it goes and when it ends: log, progress line, curve. Only rank 0 reports."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from .checkpoint import find
from .curve import draw
from .log import CURVE, LOG, Progress, RunLog, is_own
from .mesh import Mesh
from .plan import RunPlan
from .yaml_config import to_yaml


class Reporter:
    """Opens the run's folder on entering; closes the log and draws the curve on leaving, however the run ends."""

    def __init__(self, plan: RunPlan, mesh: Mesh, start_step: int, start: Path | None):
        self.plan, self.mesh, self.start_step = plan, mesh, start_step
        self.folder = Path(plan.config.run.directory)
        # A run resumed in another folder starts a log of its own there.
        self._kept_steps = start_step if is_own(self.folder, start) else 0
        self._log: RunLog | None = None
        self._progress: Progress | None = None
        self._attention: str | None = None

    def __enter__(self) -> "Reporter":
        if self.mesh.first:
            plan = self.plan
            facts = {"device": _device_name(self.mesh.device), "ranks": plan.size, "context_size": plan.context_size}
            self._log = RunLog(self.folder, self._kept_steps, to_yaml(plan.config), facts)
            self._progress = Progress(plan.config.run.steps, self.start_step)
        return self

    def note(self, *lines: str) -> None:
        """Show lines that stay."""
        if self._progress is not None:
            for line in lines:
                self._progress.note(line)

    def start(self, validation_loss: float) -> None:
        """Report the validation loss before the first step."""
        if self._log is not None:
            self._log.write({"step": 0, "validation_loss": validation_loss})
            self._progress.note(f"step 0/{self.plan.config.run.steps}  validation {validation_loss:.4f}")

    def report(self, record: dict[str, Any]) -> None:
        """Report one step; ``record`` becomes its line in the log."""
        if self._log is not None:
            self._log.write(record)
            if self._attention not in (None, record["attention"]):
                self._progress.note(f"step {record['step']}: attention is {record['attention']} from here on")
            self._attention = record["attention"]
            sent = record["exchange"]["sent_bytes"]
            self._progress.show(
                record["step"], record["loss"], record["tokens_per_second"], sent, record.get("validation_loss")
            )

    def draw(self) -> None:
        """Draw the curve of all steps so far, with each checkpoint: a run that is killed has one too."""
        if self._log is not None:
            draw(self.folder / LOG, self.folder / CURVE, f"{self.folder.name} on {self.plan.size} ranks")

    def __exit__(self, exception_type, exception, traceback) -> None:
        if self._log is None:
            return
        self._log.close()
        self._progress.close()
        # An error of drawing must not hide the error that ended the run.
        with contextlib.nullcontext() if exception_type is None else contextlib.suppress(Exception):
            self.draw()


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
