"""What the command measures: its parts, and exchange modes as it names them."""

from ...cp.options import GATHERING_MODES, MODES, SEQUENCE_MODES, ExchangeOptions

PARTS = ("attention", "overlap")
WITHOUT_COPIES = "-nccl"
VARIANTS = {WITHOUT_COPIES: {"copy_engines": False}, "-keep": {"keep": True}, "-rounded": {"gradient_dtype": "input"}}
"""What may follow the name of a mode, and the options that it stands for."""
DEFAULT_MODES = (*SEQUENCE_MODES, f"allgather{WITHOUT_COPIES}")


def exchange_options(mode: str, ranks_per_node: int | None = None) -> ExchangeOptions:
    """The options of a mode as the command names it.

    ``auto:2`` is ``auto`` with ``row_weight`` 2. Behind the name ``-rounded`` sends gradients in the inputs' dtype,
    ``-keep`` keeps for backward what was received, ``-nccl`` does without copy engines.
    """
    name, _, weight = mode.partition(":")
    name, *endings = name.split("-")
    options = {}
    for ending in endings:
        if f"-{ending}" not in VARIANTS:
            raise ValueError(f"modes: {mode!r}: -{ending} is none of {', '.join(VARIANTS)}")
        options |= VARIANTS[f"-{ending}"]
    if "copy_engines" in options and name in MODES and name not in GATHERING_MODES:
        raise ValueError(
            f"modes: {mode!r}: {name} never uses copy engines; use {name}, or {WITHOUT_COPIES} behind "
            f"{' or '.join(GATHERING_MODES)}"
        )
    try:
        row_weight = float(weight) if weight else None
        return ExchangeOptions(name, row_weight=row_weight, ranks_per_node=ranks_per_node, **options)
    except ValueError as error:
        raise ValueError(f"modes: {mode!r}: {error}") from None
