"""What the command measures: its parts, and exchange modes as it names them."""

from ...cp.options import GATHERING_MODES, MODES, ExchangeOptions
from ..shape import Shape

PARTS = ("attention", "overlap")
WITHOUT_COPIES = "-nccl"
VARIANTS = {WITHOUT_COPIES: {"copy_engines": False}, "-keep": {"keep": True}, "-rounded": {"gradient_dtype": "input"}}
"""What may follow the name of a mode, and the options that it stands for."""
DEFAULT_MODES = (*MODES, f"allgather{WITHOUT_COPIES}")


def exchange_options(mode: str, ranks_per_node: int | None = None) -> ExchangeOptions:
    """The options of a mode as the command names it.

    ``auto:2`` is ``auto`` with ``row_weight`` 2. Behind the name ``-rounded`` sends gradients in the inputs' dtype,
    ``-keep`` keeps for backward what was received, ``-nccl`` does without copy engines, ``-heads2`` exchanges tokens
    for heads between every 2 ranks.
    """
    name, _, weight = mode.partition(":")
    name, *endings = name.split("-")
    options = {}
    for ending in endings:
        if ending.startswith("heads") and ending[5:].isdecimal():
            options["head_ranks"] = int(ending[5:])
            continue
        if f"-{ending}" not in VARIANTS:
            raise ValueError(f"modes: {mode!r}: -{ending} is none of {', '.join(VARIANTS)}, -headsN")
        options |= VARIANTS[f"-{ending}"]
    if "copy_engines" in options and name in MODES and name not in (*GATHERING_MODES, "heads"):
        raise ValueError(
            f"modes: {mode!r}: {name} never uses copy engines; use {name}, or {WITHOUT_COPIES} behind "
            f"{', '.join(GATHERING_MODES)} or heads"
        )
    try:
        row_weight = float(weight) if weight else None
        return ExchangeOptions(name, row_weight=row_weight, ranks_per_node=ranks_per_node, **options)
    except ValueError as error:
        raise ValueError(f"modes: {mode!r}: {error}") from None


def shares_heads(mode: str, shape: Shape, size: int) -> bool:
    """Whether ``size`` ranks can serve a mode: where tokens are exchanged for heads, they have to divide the heads."""
    options = exchange_options(mode)
    h = size if options.mode == "heads" else options.head_ranks or 1
    return size % h == shape.heads % h == 0
