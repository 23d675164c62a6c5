"""What ``bench cluster`` draws: times of each way, and how efficient it is on several ranks."""

from ..chart import Curve, Panel
from ..rows import Row, find, short
from .measure import FULL, MOBA, TORCH

STYLES = {
    MOBA: {"color": "tab:blue"},
    "moba auto": {"color": "tab:blue"},
    "moba kv": {"color": "tab:cyan", "marker": "s"},
    "moba query": {"color": "tab:purple", "marker": "^"},
    "moba allgather": {"color": "tab:green", "marker": "v"},
    "moba heads": {"color": "tab:brown", "marker": "h"},
    "moba auto-nccl": {"color": "navy", "marker": "D"},
    "moba allgather-nccl": {"color": "tab:olive", "marker": "<"},
    FULL: {"color": "tab:orange", "marker": "P"},
    f"{FULL} heads": {"color": "goldenrod", "marker": "p"},
    f"{TORCH} cudnn": {"color": "tab:red", "marker": "X"},
    "torch allgather": {"color": "tab:red", "marker": "X"},
    "torch alltoall": {"color": "tab:pink", "marker": "*"},
}
ONE_RANK = {"linestyle": ":", "fillstyle": "none"}


def one_rank(rows: list[Row], row: Row) -> Row | None:
    """The fastest way to compute on one rank what ``row`` computes on several, at the same T."""
    names = (MOBA,) if row.name.split()[0] == MOBA else (FULL, f"{TORCH} cudnn")
    found = [one for name in names if (one := find(rows, "attention", row.tokens, 1, name))]
    return min(found, key=lambda one: one.both, default=None)


def efficiency(rows: list[Row], row: Row) -> float | None:
    """t(1) / (P t(P)) of forward and backward, by :func:`one_rank`; None where that was not measured."""
    one = one_rank(rows, row)
    return one.both / (row.ranks * row.both) if one else None


def panels(rows: list[Row]) -> list[Panel]:
    """ms of each way against T on one rank and on the most ranks, ms against P at the longest T that one rank served
    (if there are more than two P), and efficiency against T; forward and backward. Empty if nothing was measured both
    on one rank and on more."""
    rows = [row for row in rows if row.part == "attention" and row.both]
    several = [row for row in rows if row.ranks > 1 and one_rank(rows, row)]
    if not several:
        return []
    most = max(row.ranks for row in several)
    names = list(dict.fromkeys(row.name for row in rows))
    by_tokens, by_ranks, shares = [], [], []
    for name in names:
        for size, style in ((1, ONE_RANK), (most, {})):
            points = [(row.tokens, row.both) for row in rows if (row.name, row.ranks) == (name, size)]
            if points:
                label = f"{name}, {size} rank{'s' * (size > 1)}"
                by_tokens.append(Curve(label, points, STYLES.get(name, {}) | style))
        mine = [row for row in several if row.name == name]
        if not mine:
            continue
        longest = max(row.tokens for row in mine)
        points = [(row.ranks, row.both) for row in mine if row.tokens == longest]
        one = one_rank(rows, mine[0] if mine[0].tokens == longest else next(r for r in mine if r.tokens == longest))
        by_ranks.append(Curve(f"{name}, {short(longest)} tokens", [(1, one.both), *points], STYLES.get(name, {})))
        points = [(row.tokens, 100 * efficiency(rows, row)) for row in mine if row.ranks == most]
        shares.append(Curve(name, points, STYLES.get(name, {})))
    out = [
        Panel("tokens", "ms, forward + backward", by_tokens, f"1 and {most} ranks"),
        Panel("ranks", "ms, forward + backward", by_ranks, "the longest sequence that one rank was measured with"),
        Panel("tokens", "efficiency, %", shares, f"{most} ranks against the fastest on one rank", log_y=False),
    ]
    return out if len({row.ranks for row in rows}) > 2 else [out[0], out[2]]
