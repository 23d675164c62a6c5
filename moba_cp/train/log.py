"""What a run leaves behind and shows: the JSONL log, the resolved config, the versions, one line of progress.

Only rank 0 writes. In the run's folder: ``log.jsonl`` (one object per step), ``config.yaml``, ``versions.json``,
``checkpoints/``, and ``loss.png``, drawn anew with each checkpoint and at the end.
"""

import importlib.metadata
import json
import math
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from ..outputs import check_writable
from .checkpoint import any_in, copy_aside, set_aside, set_aside_after

LOG, CONFIG, VERSIONS, CHECKPOINTS, CURVE = "log.jsonl", "config.yaml", "versions.json", "checkpoints", "loss.png"
SELECTION = "selection.pt"
FLIGHT = "flight-rank"
"""What NCCL's flight recorder writes when a collective times out, with the rank's number."""
# What a run writes or replaces in its folder beside the log.
_WRITTEN = (CONFIG, VERSIONS, CHECKPOINTS, CURVE, SELECTION, str(Path(SELECTION).with_suffix(".png")))
_PACKAGES = ("moba-cp", "torch", "triton", "megatron-core", "numpy")


def is_own(folder: Path, checkpoint: Path | None) -> bool:
    """Whether ``checkpoint``, from which a run in ``folder`` starts, is one of that folder's own."""
    return checkpoint is not None and checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()


def check_folder(folder: Path, own: bool, overwrite: bool) -> None:
    """Raise ValueError if ``folder`` cannot take the run, or holds another that was not to be touched.

    Args:
        folder: the run's folder.
        own: the run goes on from one of the folder's own checkpoints.
        overwrite: what is there may be replaced.
    """
    check_writable("run.directory", folder)
    if (folder / LOG).exists() and not (own or overwrite):
        go_on = "; go on with it (--resume)," if any_in(folder / CHECKPOINTS) else " that has saved no checkpoint;"
        raise ValueError(
            f"run.directory={folder}: holds an earlier run{go_on} replace it (--overwrite) or name another folder"
        )
    foreign = [name for name in _WRITTEN if (folder / name).exists()]
    if foreign and not own and not (folder / LOG).exists():
        raise ValueError(
            f"run.directory={folder}: holds {', '.join(foreign)} but no {LOG}, so not of an earlier run; the run would "
            "replace it: name another folder"
        )


class RunLog:
    """The log of one run, open for the steps after ``start_step``.

    Args:
        folder: the run's folder; made if needed. What an earlier run left there is set aside until this one saves a
            checkpoint, but for the log and the checkpoints up to ``start_step`` of a run that is resumed in its own
            folder.
        start_step: steps that the resumed checkpoint has done; 0 for a new run and for one resumed from elsewhere.
        config: the resolved config as YAML.
        facts: written with the versions (device, ranks, ...).
        patient: a full disk ends no run: lines that could not be written go with a later one.
    """

    def __init__(self, folder: Path, start_step: int, config: str, facts: dict[str, Any], patient: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        before, checkpoints = read_log(folder / LOG), folder / CHECKPOINTS
        kept = [record for record in before if start_step and record["step"] <= start_step]
        checkpoints.mkdir(exist_ok=True)
        set_aside_after(checkpoints, start_step)
        if len(kept) < len(before):
            copy_aside(checkpoints, folder / LOG)
        for old in () if start_step else (CURVE, SELECTION, str(Path(SELECTION).with_suffix(".png"))):
            if (folder / old).exists():
                set_aside(checkpoints, folder / old)
        for old in (*folder.glob("error-rank*.txt"), *folder.glob(f"{FLIGHT}*")):
            old.unlink()
        _replace(folder / LOG, "".join(json.dumps(record) + "\n" for record in kept))
        _replace(folder / CONFIG, config)
        _replace(folder / VERSIONS, json.dumps(versions() | facts, indent=1) + "\n")
        # Unbuffered: a disk that becomes full takes a part of a line, and the rest of it must follow.
        self._file = open(folder / LOG, "ab", buffering=0)
        self._waiting, self._patient = b"", patient

    def write(self, record: dict[str, Any]) -> str | None:
        """Add one step's object; it is in the file when this returns. Null stands for NaN and infinity.

        Returns:
            Why it could not be written yet, of a log that is patient.
        """
        self._waiting += json.dumps(_without_nonfinite(record), allow_nan=False).encode() + b"\n"
        return self._flush()

    def close(self) -> str | None:
        """Close the log; why its last lines could not be written, of a log that is patient."""
        problem = self._flush()
        self._file.close()
        return problem

    def _flush(self) -> str | None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._patient:
                raise
            return f"{self.folder / LOG}: could not be written: {error.strerror}"
        return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL log, [] without one. A last line that a killed run left incomplete is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path}: not a log of this library ({error})") from None


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, Any]:
    """Versions of what computes; null for what is not installed."""
    found: dict[str, Any] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"python": platform.python_version(), "platform": platform.platform(), "cuda": torch.version.cuda}


class Progress:
    """One line that follows the run: rewritten in place on a terminal, else a new line every few seconds.

    A line with a validation loss stays. A line is never wider than the terminal, or 80 columns where it is no terminal:
    a wrapped line could not be rewritten.
    """

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, steps: int, start_step: int, stream: TextIO | None = None):
        self.steps, self.first, self.stream = steps, start_step, stream or sys.stderr
        self.started = time.monotonic()
        self.shown, self.width = -self.SECONDS_BETWEEN_LINES, 0
        self.terminal = self.stream.isatty()

    def show(
        self, step: int, loss: float, tokens_per_second: float, sent: float, validation: float | None = None
    ) -> None:
        """Show the state after ``step``; ``sent`` is the bytes that all ranks sent in it."""
        now = time.monotonic()
        left = (now - self.started) / max(1, step - self.first) * (self.steps - step)
        line = _fit(
            [
                f"step {step}/{self.steps}",
                f"loss {loss:.4f}",
                f"validation {validation:.4f}" if validation is not None else "",
                human(tokens_per_second, "tokens/s"),
                f"{human(sent, 'B', 1024)} sent",
                f"{_minutes(left)} left",
            ],
            self._columns() - 1,
        )
        stays = validation is not None
        if self.terminal:
            self.stream.write("\r" + line.ljust(min(self.width, self._columns() - 1)) + ("\n" if stays else ""))
            self.width = 0 if stays else len(line)
        elif now - self.shown >= self.SECONDS_BETWEEN_LINES or step == self.steps or stays:
            self.stream.write(line + "\n")
            self.shown = now
        self.stream.flush()

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self.close()
        self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Leave the line as it is and go to the next."""
        if self.terminal and self.width:
            self.stream.write("\n")
            self.stream.flush()
        self.width = 0

    def _columns(self) -> int:
        return shutil.get_terminal_size((80, 24)).columns if self.terminal else 80


def _fit(parts: list[str], width: int) -> str:
    """``parts`` in one line of at most ``width`` characters; where they are too long, bytes and speed go first."""
    for left_out in ((), (4,), (3, 4), (3, 4, 5)):
        line = "  ".join(part for i, part in enumerate(parts) if part and i not in left_out)
        if len(line) <= width:
            break
    return line[:width]


def human(number: float, unit: str, base: int = 1000) -> str:
    """``number`` with a prefixed unit: "12.3 k tokens", "1.50 MiB" (base 1024 and a one-letter unit)."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti"]
    while abs(number) >= base and len(prefixes) > 1:
        number /= base
        prefixes.pop(0)
    prefix = prefixes[0]
    digits = 0 if not prefix else 1 if abs(number) >= 10 else 2
    gap = " " if prefix and len(unit) > 1 else ""
    return f"{number:.{digits}f} {prefix}{gap}{unit}"


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
