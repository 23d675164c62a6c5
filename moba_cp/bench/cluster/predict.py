"""What ``bench exchange`` predicts for the selection that a measured layer really makes."""

from dataclasses import replace

import torch

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
        rows[f"{MOBA} {name}"] = exchange.predict(counted, everybody, geometry)
    return rows
