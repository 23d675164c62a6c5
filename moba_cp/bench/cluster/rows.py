"""What is measured: rows, their lines in the table, and the JSON file that grows with them."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Row:
    """One measurement on the first P ranks. Times are ms: medians over repeats, of the slowest rank of each."""

    part: str
    """``attention``, ``overlap``, ``nodes``, ``training`` or ``stand-in``."""
    tokens: int
    ranks: int
    name: str
    forward: float | None = None
    forward_spread: float | None = None
    """Largest minus smallest."""
    both: float | None = None
    """Forward and backward; of ``training``: a step."""
    both_spread: float | None = None
    repeats: int = 0
    received_gb: float | None = None
    """GB that a rank received from others in forward and backward, mean over ranks."""
    between_gb: float | None = None
    """The part of it that came from other nodes."""
    peak_gib: float | None = None
    """Most memory of forward and backward above the inputs, of the rank that needs most; what it has given for others
    to read included."""
    predicted_gb: float | None = None
    """What ``bench exchange`` counts for the same selection."""
    predicted_ms: float | None = None
    """Time of the layer that ``bench exchange`` predicts."""
    off_forward: float | None = None
    """The same with the wire off."""
    off_both: float | None = None
    off_error: float | None = None
    """Largest difference between results with the wire off and on, over the largest value."""
    loss: float | None = None
    note: str = ""
    """Why there are no times, or what is to be said of them."""

    def efficiency(self, alone: "Row") -> float:
        """t(1) / (P t(P)) of forward and backward, ``alone`` being the row on one rank."""
        return alone.both / (self.ranks * self.both)

    def line(self) -> str:
        """The row as a line of the table."""
        return "".join(text.rjust(width) for (_, width), text in zip(COLUMNS, self._cells(), strict=True)) + (
            f"  {self.note}" if self.note else ""
        )

    def _cells(self) -> list[str]:
        off = [_ratio(self.forward, self.off_forward), _ratio(self.both, self.off_both)]
        return [
            self.part, _tokens(self.tokens), str(self.ranks), self.name, _number(self.forward, 2),
            _number(self.both, 2), _number(self.both_spread, 2), _number(self.received_gb, 3),
            _number(self.predicted_gb, 3), _number(self.between_gb, 3), _number(self.predicted_ms, 2),
            _number(self.peak_gib, 2), *off,
        ]  # fmt: skip


COLUMNS = (
    ("part", 9), ("T", 6), ("P", 3), ("what", 28), ("fwd ms", 10), ("fwd+bwd", 10), ("spread", 8), ("GB", 8),
    ("pred GB", 9), ("far GB", 8), ("pred ms", 9), ("GiB", 7), ("on/off f", 10), ("f+b", 7),
)  # fmt: skip


def header() -> str:
    """The head of the table."""
    return "".join(name.rjust(width) for name, width in COLUMNS)


def _tokens(n: int) -> str:
    if n % 2**20 == 0:
        return f"{n >> 20}M"
    return f"{n >> 10}K" if n % 1024 == 0 else str(n)


def _number(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def _ratio(on: float | None, off: float | None) -> str:
    return f"{on / off:.3f}" if on and off else ""


@dataclass
class Report:
    """All rows so far; written anew with every row, so that whatever happens later loses none."""

    environment: dict
    settings: dict
    path: Path | None
    rows: list[Row] = field(default_factory=list)
    goals: list[dict] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Print and keep a row."""
        self.rows.append(row)
        print(row.line(), flush=True)
        self.write()

    def write(self) -> None:
        """Replace the file in one step."""
        if self.path is None:
            return
        content = {
            "environment": self.environment,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "goals": self.goals,
        }
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(beside, self.path)

    def find(self, part: str, tokens: int, ranks: int, name: str) -> Row | None:
        """The row with times of this measurement, if there is one."""
        for row in self.rows:
            if (row.part, row.tokens, row.ranks, row.name) == (part, tokens, ranks, name) and row.both is not None:
                return row
        return None
