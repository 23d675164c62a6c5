"""Summaries of the runs that are done, as the pages of all experiments pick from them."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]
"""What each run's ``summary.json`` says."""


class TooFew(Exception):
    """There are not enough runs for a chart."""


def of(rows: Rows, **facts) -> Rows:
    """Those with these facts."""
    return [row for row in rows if all(row["facts"].get(key) == value for key, value in facts.items())]


def means(rows: Rows, key: Callable[[dict], Any], value: Callable[[dict], float]) -> dict[Any, tuple[float, float]]:
    """Mean and standard deviation (0 of one) over the seeds, by ``key``."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(value(row))
    return {at: (statistics.fmean(x), statistics.stdev(x) if len(x) > 1 else 0.0) for at, x in groups.items()}


def loss_of(row: dict) -> float:
    """At the end, of all that is held out."""
    return row["validation_loss"]


def at_range(index: int) -> Callable[[dict], float]:
    """The loss of a range of positions."""
    return lambda row: row["by_position"][index]["loss"]
