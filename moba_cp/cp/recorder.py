"""Watching which blocks are chosen: recording a model's selections, and drawing them.

Legend: T tokens, L local tokens, Hq query heads, Hkv key/value heads, S = k - 1 chosen blocks per row, n blocks.
"""

from pathlib import Path

import torch
from torch import Tensor

from .context import CPContext


class SelectionRecorder:
    """Keeps every MoBA layer's selection of one sequence; pass it as ``CPContext(..., observer=recorder)``."""

    def __init__(self):
        self.layers: dict[str, Tensor] = {}
        """layer -> [L, Hq, S] int32 on the CPU."""
        self.block_size = self.n_kv_heads = 0

    def __call__(self, layer: str, chosen: Tensor, n_kv_heads: int, block_size: int) -> None:
        self.layers[layer] = chosen.cpu()
        self.block_size, self.n_kv_heads = block_size, n_kv_heads

    def whole(self, cp: CPContext) -> dict[str, Tensor]:
        """layer -> [T, Hq, S] of the whole sequence; a collective call."""
        return {layer: cp.unshard(chosen.to(cp.device)).cpu() for layer, chosen in self.layers.items()}

    def save(self, path: str | Path, cp: CPContext) -> None:
        """Write the selections of the whole sequence for ``moba-cp bench exchange --gate``, and beside them a drawing
        (.png); a collective call."""
        layers = self.whole(cp)
        if cp.rank == 0 and layers:
            shape = {"block_size": self.block_size, "n_kv_heads": self.n_kv_heads, "cu_seqlens": cp.cu_seqlens}
            torch.save({"layers": layers, **shape}, path)
            draw_heat_maps(layers, cp.geometry(self.block_size).n_blocks, Path(path).with_suffix(".png"))


def heat_map(chosen: Tensor, n_blocks: int, chunks: int = 128) -> Tensor:
    """How often the queries of each chunk chose each block: [chunks, n] counts over heads.

    Args:
        chosen: [T, Hq, S] int32 block ids, -1 for none.
        n_blocks: n.
        chunks: rows of the map; at most T.
    """
    n_tokens = chosen.shape[0]
    chunks = min(chunks, n_tokens)
    chunk = torch.arange(n_tokens) * chunks // n_tokens
    index = chunk[:, None, None] * (n_blocks + 1) + torch.where(chosen < 0, n_blocks, chosen).long()
    counts = torch.bincount(index.flatten(), minlength=chunks * (n_blocks + 1))
    return counts.view(chunks, n_blocks + 1)[:, :n_blocks]


def draw_heat_maps(layers: dict[str, Tensor], n_blocks: int, path: str | Path) -> None:
    """Draw :func:`heat_map` of every layer side by side, logarithmic, as a PNG; ``n_blocks`` of all documents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3 * rows), squeeze=False)
    for place in axes.flat[len(layers) :]:
        place.axis("off")
    for place, (layer, chosen) in zip(axes.flat, layers.items(), strict=False):
        counts = heat_map(chosen, n_blocks)
        place.imshow(counts.log1p().numpy(), aspect="auto", interpolation="nearest", origin="upper")
        place.set_title(layer, fontsize=9)
        place.set_xlabel("key/value block", fontsize=8)
        place.set_ylabel("query chunk", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
