"""What is measured or counted: rows, the table that is printed of them, and the JSON file that grows with them."""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Row:
    """One way to attend, for one layer. A field is None where nothing was measured or counted.

    Times are in ms: the median over the repeats, and across ranks the slowest rank of each repeat. A spread is the
    largest time minus the smallest.
    """

    part: str
    """``attention``, ``overlap`` or ``exchange``."""
    name: str
    """The way, such as ``moba``, ``moba kv`` or ``cudnn``; of ``exchange`` the mode."""
    tokens: int
    """T of the whole sequence."""
    ranks: int = 1
    shape: tuple[int | str, ...] = ()
    """Hq, Hkv, D, B, k, and ``sum`` or ``max`` where the heads of a group share their selection."""
    forward: float | None = None
    forward_spread: float | None = None
    both: float | None = None
    """Forward and backward."""
    both_spread: float | None = None
    repeats: int = 0
    peak_gib: float | None = None
    """Peak memory of a pass above the inputs, of the rank that needs most; memory that other GPUs map is included."""
    errors: dict[str, float] | None = None
    """Largest relative error against float64, by tensor."""
    received_gb: float | None = None
    """GB that a rank received from others in forward and backward, mean over the ranks."""
    predicted_gb: float | None = None
    """The same as ``bench exchange`` counts it: means and requests included, tails of straddling blocks not."""
    between_gb: float | None = None
    """The part of ``predicted_gb`` that crosses nodes, with each block once per node."""
    predicted_ms: float | None = None
    """Time of the layer that ``bench exchange`` predicts."""
    exposed_ms: float | None = None
    """The part of ``predicted_ms`` in which a GPU waits for the network."""
    of_ring: float | None = None
    """``predicted_gb`` over the bytes of a dense ring."""
    needed: float | None = None
    """Share of the (KV head, block) pairs of other ranks that could be selected and are needed."""
    busiest: float | None = None
    """Bytes that the busiest rank asks for over the mean."""
    off_forward: float | None = None
    """``forward`` with communication replayed from memory."""
    off_both: float | None = None
    off_error: float | None = None
    """Largest difference between results with and without communication, over the largest value."""
    note: str = ""
    """Why there are no times, or a remark about them."""

    def fill(self, forward: list[float], both: list[float]) -> None:
        """Enter the times of all repeats."""
        self.forward, self.both = statistics.median(forward), statistics.median(both)
        self.forward_spread, self.both_spread = max(forward) - min(forward), max(both) - min(both)
        self.repeats = len(both)


def find(rows: list[Row], part: str, tokens: int, ranks: int, name: str) -> Row | None:
    """The row with times of this measurement, if there is one."""
    wanted = part, tokens, ranks, name
    same = (row for row in rows if (row.part, row.tokens, row.ranks, row.name) == wanted and row.both is not None)
    return next(same, None)


@dataclass
class Table:
    """A table printed line by line: heading, width and content of each column."""

    columns: tuple[tuple[str, int, Callable[[Row], str]], ...]

    def header(self) -> str:
        """The headings."""
        return "".join(name.rjust(width) for name, width, _ in self.columns)

    def line(self, row: Row) -> str:
        """One row, with its note behind it."""
        cells = "".join(cell(row).rjust(width) for _, width, cell in self.columns)
        return f"{cells}  {row.note}" if row.note else cells


def number(name: str, digits: int = 2) -> Callable[[Row], str]:
    """The cell of a field that is a number; empty where it is None."""
    return lambda row: "" if getattr(row, name) is None else f"{getattr(row, name):.{digits}f}"


def ratio(above: str, below: str) -> Callable[[Row], str]:
    """The cell of the quotient of two fields; empty where one is None or 0."""
    return lambda row: f"{a / b:.3f}" if (a := getattr(row, above)) and (b := getattr(row, below)) else ""


def short(n: int) -> str:
    """A number of tokens or ranks in few characters: 131072 as 128K, 1048576 as 1M."""
    if n % 2**20 == 0:
        return f"{n >> 20}M"
    return f"{n >> 10}K" if n % 1024 == 0 else str(n)


@dataclass
class Report:
    """All rows so far. The file is written again with every row, so that a later failure loses none."""

    environment: dict
    settings: dict
    table: Table
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Print and keep a row."""
        self.rows.append(row)
        print(self.table.line(row), flush=True)
        self.write()

    def write(self) -> None:
        """Replace the file in one step."""
        if self.path is None:
            return
        rows = [{name: value for name, value in asdict(row).items() if value is not None} for row in self.rows]
        content = {"environment": self.environment, "settings": self.settings, "rows": rows}
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, self.path)
