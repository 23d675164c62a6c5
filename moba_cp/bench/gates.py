"""Which blocks queries select: models of a trained gate, and recorded selections.

Legend: T tokens, Hq query heads, Hkv key/value heads, G = Hq // Hkv, B block size, S = k - 1 selected blocks per row.
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .shape import GATES

SEGMENT = 1024
RECENT = 32


class SyntheticGate:
    """A random gate over one document. It depends on positions alone, so it is equal for all numbers of ranks.

    ``uniform``: every row draws its S blocks uniformly from the earlier ones. ``concentrated``: each segment of 1,024
    queries and KV head has a pool of 4k blocks, half of them among the last 32 before the segment, half drawn by Zipf's
    law with exponent 1 over all earlier blocks, oldest first; each row draws its S from the pool.
    """

    def __init__(self, kind: str, n_heads: int, n_kv: int, block_size: int, top_k: int, seed: int = 0):
        if kind not in GATES:
            raise ValueError(f"gate={kind!r} is not one of {', '.join(GATES)} and not a file")
        self.kind, self.n_heads, self.n_kv = kind, n_heads, n_kv
        self.block_size, self.top_k, self.seed = block_size, top_k, seed

    def __call__(self, positions: np.ndarray) -> Tensor:
        """[L, Hq, S] int32 block ids for the given [L] positions, -1 where there are fewer candidates."""
        selection = np.full((len(positions), self.n_heads, self.top_k - 1), -1, np.int32)
        segment = positions // SEGMENT
        # Positions of a segment are contiguous in every layout.
        cuts = np.flatnonzero(np.diff(segment)) + 1
        for rows in np.split(np.arange(len(positions)), cuts):
            selection[rows] = self._segment(positions[rows])
        return torch.from_numpy(selection)

    def _segment(self, positions: np.ndarray) -> np.ndarray:
        index = int(positions[0]) // SEGMENT
        own = positions // self.block_size
        out = np.full((len(positions), self.n_heads, self.top_k - 1), -1, np.int32)
        group = self.n_heads // self.n_kv
        for kv_head in range(self.n_kv):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            # Rows have a generator of their own, so that a rank that holds half a segment draws what others draw.
            rng = np.random.default_rng([self.seed, index, kv_head, int(positions[0]) % SEGMENT])
            if self.kind == "uniform":
                out[:, heads] = _draw_below(rng, own[:, None].repeat(group, 1), self.top_k - 1)
                continue
            pool = self._pool(np.random.default_rng([self.seed, index, kv_head]), index * SEGMENT // self.block_size)
            picked = _draw_below(rng, np.full((len(positions), group), len(pool)), self.top_k - 1)
            if len(pool):
                out[:, heads] = np.where(picked >= 0, pool[picked], -1)
        return out

    def _pool(self, rng: np.random.Generator, n_earlier: int) -> np.ndarray:
        """The blocks that a segment and KV head look at, of the ``n_earlier`` before it."""
        half = 2 * self.top_k
        if n_earlier <= 2 * half:
            return np.arange(n_earlier)
        recent = n_earlier - 1 - rng.choice(min(RECENT, n_earlier), min(half, RECENT, n_earlier), replace=False)
        weight = 1 / np.arange(1, n_earlier + 1)
        weight[recent] = 0
        return np.concatenate([recent, rng.choice(n_earlier, half, replace=False, p=weight / weight.sum())])


def _draw_below(rng: np.random.Generator, below: np.ndarray, count: int) -> np.ndarray:
    """[..., count] distinct integers in ``[0, below)``, -1 where there are not enough."""
    out = np.full((*below.shape, count), -1, np.int64)
    for slot in range(count):
        # Floyd's algorithm: draw among the numbers that are left, then step over those taken.
        left = below - slot
        draw = (rng.random(below.shape) * left.clip(min=1)).astype(np.int64)
        for taken in np.sort(np.where(out[..., :slot] < 0, np.iinfo(np.int64).max, out[..., :slot]), -1).T:
            draw += draw >= taken.T
        out[..., slot] = np.where(left > 0, draw, -1)
    return out


class RecordedGate:
    """A selection that a model made, saved by :class:`moba_cp.cp.recorder.SelectionRecorder`."""

    def __init__(self, path: str | Path, layer: int | None = None):
        try:
            saved = torch.load(path, weights_only=True)
            self.layers, self.block_size = saved["layers"], int(saved["block_size"])
            self.n_kv, self.bounds = int(saved["n_kv_heads"]), saved["cu_seqlens"].long().numpy()
        except (OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"gate={str(path)!r} is no recorded selection: {error}") from None
        names = sorted(self.layers, key=_natural)
        ending = re.compile(rf"(?<!\d){layer}$")
        found = [names[len(names) // 2]] if layer is None else [name for name in names if ending.search(name)]
        if len(found) != 1:
            what = "more than one layer" if found else "not"
            raise ValueError(f"gate-layer={layer} is {what} in {path}; it has {', '.join(names)}")
        self.layer = found[0]
        self.selection = self.layers[self.layer]

    def __call__(self, positions: np.ndarray) -> Tensor:
        """[L, Hq, S] int32 block ids for the given [L] positions."""
        return self.selection[torch.from_numpy(positions)]


def _natural(name: str) -> list[str | int]:
    """Sorts names so that numbers within them count as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
