"""What the measurements should show, and whether they do."""

from collections.abc import Iterator

from .rows import Report

AUTO, FULL = "moba auto", "full"
ALL_GATHER = "moba allgather", "moba allgather-nccl"
NOISE = 1.03
"""Times that differ by less count as equal."""


def efficiency(report: Report, tokens: int, ranks: int, name: str, one: str) -> float | None:
    """Of attention; ``one`` is the row on one rank."""
    alone, row = report.find("attention", tokens, 1, one), report.find("attention", tokens, ranks, name)
    return row.efficiency(alone) if alone and row else None


def judge(report: Report) -> list[dict]:
    """``goal``, ``measured``, ``met`` for every goal; ``met`` is None where it was not measured."""
    return [
        {"goal": goal, "measured": measured or "not measured", "met": met if measured else None}
        for goal, measured, met in _goals(report)
    ]


def lines(goals: list[dict]) -> list[str]:
    """The goals as a table."""
    words = {True: "met", False: "missed", None: "-"}
    wide = [max(len(g[key]) for g in goals) for key in ("goal", "measured")]
    return [f"{g['goal']:{wide[0]}}  {g['measured']:{wide[1]}}  {words[g['met']]}" for g in goals]


def _goals(report: Report) -> Iterator[tuple[str, str | None, bool]]:
    row = report.find("attention", 131072, 2, FULL)
    yield (
        "full attention, T=131072 on 2 ranks, forward + backward <= 230 ms",
        row and f"{row.both:.1f} ms",
        bool(row and row.both <= 230),
    )
    one, two = report.find("attention", 524288, 1, "moba"), report.find("attention", 524288, 2, AUTO)
    speed = one.both / two.both if one and two else 0.0
    yield "MoBA, T=524288, 2 ranks >= 1.8 times one", speed and f"{speed:.2f} times", speed >= 1.8
    for ranks, least in ((4, 0.85), (8, 0.80)):
        share = efficiency(report, 524288, ranks, AUTO, "moba")
        yield (
            f"MoBA, T=524288, efficiency on {ranks} ranks >= {least:.0%}",
            share and f"{share:.1%}",
            bool(share and share >= least),
        )
    pairs = [
        (row.both / min(other.both for other in others), row)
        for row in report.rows
        if row.part == "attention" and row.name == AUTO and row.both
        if (others := list(filter(None, (report.find("attention", row.tokens, row.ranks, n) for n in ALL_GATHER))))
    ]
    yield f"MoBA auto never slower than the fastest all-gather (times {NOISE} for noise)", *_worst(pairs, NOISE)
    pairs = [
        (row.both / row.off_both, row)
        for row in report.rows
        if row.part == "overlap" and row.name == AUTO and row.off_both and row.tokens >= 262144
    ]
    yield "MoBA auto, wire on <= 1.1 times wire off, T >= 262144", *_worst(pairs, 1.1)


def _worst(pairs: list, most: float) -> tuple[str | None, bool]:
    if not pairs:
        return None, False
    ratio, row = max(pairs, key=lambda pair: pair[0])
    return f"worst {ratio:.3f} (T={row.tokens}, {row.ranks} ranks)", ratio <= most
