"""Watching which blocks are selected: recording a model's selections, and drawing them.

Legend: T tokens, L local tokens, G heads of a selection (query heads, or KV heads whose groups share it), S selected
blocks per row, n blocks.
"""

from pathlib import Path

import torch
from torch import Tensor

from .calls import UNNAMED_LAYER
from .context import CPContext

# More document starts than this would hide what they mark.
MOST_DOCUMENTS = 64


class SelectionRecorder:
    """Keeps the selection of every MoBA layer in one forward pass over one sequence.

    Pass it as ``CPContext(..., observer=recorder)``, a new one for each pass. A model that gives its layers no names
    (``moba_attention`` called directly) has them recorded as ``layer 1``, ``layer 2``, ... in the order of the calls.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Tensor] = {}
        """layer -> [L, G, S] int32 on the CPU."""
        self.block_size = self.n_kv_heads = 0
        self._unnamed = 0

    def __call__(self, layer: str, selection: Tensor, n_kv_heads: int, block_size: int) -> None:
        # Activation checkpointing repeats a layer's forward within backward: it was recorded the first time.
        if torch._C._current_graph_task_id() != -1:
            return
        if layer == UNNAMED_LAYER:
            self._unnamed += 1
            layer = f"layer {self._unnamed}"
        self.layers[layer] = selection.cpu()
        self.block_size, self.n_kv_heads = block_size, n_kv_heads

    def whole(self, cp: CPContext) -> dict[str, Tensor]:
        """layer -> [T, G, S] of the whole sequence; a collective call."""
        return {layer: cp.unshard(selection.to(cp.device)).cpu() for layer, selection in self.layers.items()}

    def save(self, path: str | Path, cp: CPContext) -> None:
        """Write the selections of the whole sequence for ``moba-cp bench exchange --gate``, and beside them a drawing
        (.png); a collective call."""
        layers = self.whole(cp)
        if cp.rank == 0 and layers:
            shape = {"block_size": self.block_size, "n_kv_heads": self.n_kv_heads, "cu_seqlens": cp.cu_seqlens}
            # Whoever reads them while they are written anew finds the old ones.
            for target, write in (
                (Path(path), lambda partial: torch.save({"layers": layers, **shape}, partial)),
                (
                    Path(path).with_suffix(".png"),
                    lambda partial: draw_heat_maps(layers, cp.cu_seqlens, self.block_size, partial),
                ),
            ):
                partial = target.with_name(target.name + ".partial")
                write(partial)
                partial.replace(target)


def heat_map(selection: Tensor, n_blocks: int, chunks: int = 128) -> Tensor:
    """How often the queries of each chunk selected each block: [chunks, n] counts over heads.

    Args:
        selection: [T, G, S] int32 block ids, -1 for none.
        n_blocks: n.
        chunks: rows of the map; at most T.
    """
    n_tokens = selection.shape[0]
    chunks = min(chunks, n_tokens)
    chunk = torch.arange(n_tokens) * chunks // n_tokens
    index = chunk[:, None, None] * (n_blocks + 1) + torch.where(selection < 0, n_blocks, selection).long()
    counts = torch.bincount(index.flatten(), minlength=chunks * (n_blocks + 1))
    return counts.view(chunks, n_blocks + 1)[:, :n_blocks]


def draw_heat_maps(layers: dict[str, Tensor], cu_seqlens: Tensor, block_size: int, path: str | Path) -> None:
    """Draw :func:`heat_map` of every layer side by side, logarithmic, as a PNG.

    Args:
        layers: layer -> [T, G, S] int32 block ids, -1 for none.
        cu_seqlens: [n_docs + 1] int, document boundaries; where a document starts, thin lines are drawn.
        block_size: B.
        path: where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    lengths = cu_seqlens.diff()
    first_blocks = torch.cat([lengths.new_zeros(1), ((lengths + block_size - 1) // block_size).cumsum(0)])
    n_tokens, n_blocks = int(cu_seqlens[-1]), int(first_blocks[-1])
    maps = {layer: heat_map(selection, n_blocks) for layer, selection in layers.items()}
    scale = LogNorm(1, max(2, *(int(counts.max()) for counts in maps.values())))
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    size = (max(6, 3.2 * columns + 1), 3 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(layers) :]:
        axis.axis("off")
    for axis, (layer, counts) in zip(axes.flat, maps.items(), strict=False):
        # A block that no query of the chunk selected stays white.
        shown = counts.double().masked_fill(counts == 0, float("nan")).numpy()
        image = axis.imshow(
            shown, norm=scale, aspect="auto", interpolation="nearest", origin="upper", extent=(0, n_blocks, n_tokens, 0)
        )
        if 2 < len(cu_seqlens) <= MOST_DOCUMENTS:
            axis.hlines(cu_seqlens[1:-1].numpy(), 0, n_blocks, colors="tab:red", linewidth=0.4)
            axis.vlines(first_blocks[1:-1].numpy(), 0, n_tokens, colors="tab:red", linewidth=0.4)
        axis.set_title(layer, fontsize=9)
        axis.set_xlabel("key/value block", fontsize=8)
        axis.set_ylabel("query position (tokens)", fontsize=8)
    n_heads = next(iter(layers.values())).shape[1]
    lines = "; red: documents start" if 2 < len(cu_seqlens) <= MOST_DOCUMENTS else ""
    figure.suptitle(f"Blocks chosen: {n_tokens} tokens, blocks of {block_size}, {n_heads} heads{lines}", fontsize=10)
    chunk = n_tokens / next(iter(maps.values())).shape[0]
    figure.colorbar(image, ax=axes, label=f"times chosen by {chunk:.0f} tokens, all heads", shrink=0.9)
    figure.savefig(path, format="png", dpi=130)
    plt.close(figure)
