"""What ``bench exchange`` predicts for the selection that a measured layer really makes."""

from dataclasses import replace

import torch

from ...cp.geometry import BlockGeometry
from ...cp.heads.choice import seconds_with, seconds_without
from ...cp.options import ExchangeOptions
from .. import exchange
from ..rows import Row
from .measure import MOBA, Layer
from .modes import exchange_options


def predictions(layer: Layer, modes: list[str]) -> dict[str, Row]:
    """By candidate name, the rows of ``bench exchange`` for this layer; collective over its ranks."""
    from ... import moba_attention

    seen, shape = [], layer.shape
    cp = layer.context(ExchangeOptions("allgather"), lambda name, selection, n_kv, block_size: seen.append(selection))
    with torch.no_grad():
        moba_attention(*layer.leaves, shape.moba, cp=cp)
    geometry = cp.geometry(shape.moba.block_size)
    rows = {}
    for name in modes:
        options = exchange_options(name, layer.per_node)
        if options.head_ranks is not None:
            # What the ranks with the same heads ask of one another is known only to them.
            continue
        options = replace(options, copy_engines=options.copy_engines and layer.peers() is not None)
        counted = exchange.Counted(shape, layer.n_tokens, layer.dout.dtype, options)
        asked = exchange.ask(counted, cp.rank, seen[0], geometry)
        asked.fetch = asked.fetch.cpu()
        everybody = layer.ranks.gathered(asked, layer.size)
        for one in everybody:
            one.fetch = one.fetch.to(geometry.owner.device)
        row = exchange.predict(counted, everybody, geometry)
        seconds = seconds_by_copies(counted, geometry)
        rows[f"{MOBA} {name}"] = row if seconds is None else replace(row, predicted_ms=1e3 * seconds)
    return rows


def seconds_by_copies(counted: exchange.Counted, geometry: BlockGeometry) -> float | None:
    """What ``auto`` takes a pass to be where copy engines bring everything, or rows of heads; None where they do not.

    Args:
        geometry: of any rank.
    """
    options, size, shape = counted.options, len(geometry.owned), counted.shape
    if not options.may_copy(size):
        return None
    layer = counted.head_layer(size)
    if options.mode == "heads" or counted.exchanges_heads(size):
        return seconds_with(layer, size, options)
    at_once = counted.gather_costs(geometry).at_once(layer.n_local * shape.heads, shape.moba.top_k)
    return seconds_without(layer, options) if at_once else None
