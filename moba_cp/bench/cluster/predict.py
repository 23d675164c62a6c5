"""What ``bench exchange`` predicts for the selection that a measured layer really makes."""

import argparse

import torch

from ...cp.options import ExchangeOptions
from .. import exchange
from .measure import MOBA, Layer, exchange_options
from .rows import Row


def predictions(layer: Layer, modes: list[str]) -> dict[str, exchange.Row]:
    """By candidate name, the rows of ``bench exchange`` for this layer; collective over its ranks."""
    from ... import moba_attention

    seen = []
    cp = layer.context(ExchangeOptions("allgather"), lambda name, chosen, n_kv, block_size: seen.append(chosen))
    with torch.no_grad():
        moba_attention(*layer.leaves, layer.shape.moba, cp=cp)
    args = _arguments(layer)
    geometry = cp.geometry(layer.shape.moba.block_size)
    per_node = min(args.ranks_per_node, layer.size)
    rows = {}
    for name in modes:
        options = exchange_options(name)
        args.row_weight, mode = options.row_weight, options.mode
        args.keep, args.gradient_dtype = options.keep, options.gradient_dtype
        args.copy_engines = options.copy_engines and layer.comm.peers() is not None
        asked = exchange.ask(cp.rank, seen[0], geometry, mode, per_node, args)
        asked.fetch = asked.fetch.cpu()
        everybody = layer.ranks.gathered(asked, layer.size)
        for one in everybody:
            one.fetch = one.fetch.to(geometry.owner.device)
        rows[f"{MOBA} {name}"] = exchange.predict(layer.size, mode, everybody, geometry, args)
    return rows


def add_prediction(row: Row, predicted: exchange.Row | None) -> None:
    """Put the prediction beside what was measured."""
    if predicted is not None:
        row.predicted_gb, row.predicted_ms = predicted.gb, predicted.layer_ms


def _arguments(layer: Layer) -> argparse.Namespace:
    """The options of ``bench exchange`` for this layer, with its defaults for the links."""
    parser = argparse.ArgumentParser()
    exchange.add_arguments(parser)
    args, shape = parser.parse_args([]), layer.shape
    args.tokens, args.heads, args.kv_heads, args.dim = layer.n_tokens, shape.heads, shape.kv_heads, shape.dim
    args.block_size, args.top_k, args.layout = shape.moba.block_size, shape.moba.top_k, shape.layout
    args.dtype = "bf16" if layer.ranks.on_gpu else "fp32"
    args.ranks_per_node = min(layer.ranks.per_node, layer.size)
    return args
