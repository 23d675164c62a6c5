"""Predicted times against measured ones, and that ``auto`` takes the faster way in each.

Four H200s with NVLink, PyTorch 2.11, Triton 3.6, commit adcc6c8, ``bench cluster``: D = 128, blocks of 512, top-8,
bf16, zigzag, uniform gate, forward and backward of one layer.
"""

import numpy as np
import pytest
import torch

from moba_cp import ExchangeOptions, MoBAConfig
from moba_cp.bench.cluster.predict import seconds_by_copies
from moba_cp.bench.exchange import Counted
from moba_cp.bench.shape import Shape
from moba_cp.cp.geometry import build_geometry
from moba_cp.cp.heads.choice import Layer, choose_team, pass_seconds, seconds_with, seconds_without
from moba_cp.cp.layout import rank_segments

# Tokens; ms of one GPU, and of four by heads and by all-gather; slices of rows into which these two then cut a KV head
# in the backward pass.
SIXTEEN = [
    (131072, 39.29, 13.86, 14.2, 1, 1),
    (262144, 79.94, 23.43, 27.08, 1, 1),
    (524288, 168.34, 49.7, 53.14, 2, 1),
    (1048576, 353.05, 104.5, 109.12, 3, 1),
]
EIGHT = [
    (262144, 163.24, 45.37, 41.37, 3, 1),
    (524288, 341.17, 93.32, 92.24, 6, 2),
    (1048576, 718.15, 200.28, 200.09, 12, 2),
]
CASES = [((16, 16), *row) for row in SIXTEEN] + [((32, 8), *row) for row in EIGHT]
MEMORY_RATE = 4e12
"""Bytes per second."""


def _layer(heads: tuple[int, int], n_tokens: int, size: int = 4) -> Layer:
    return Layer(size, n_tokens // size, heads, 128, torch.bfloat16, (512, 8))


def _cut_ms(n_tokens: int, n_kv: int, n_slices: int, rounded: bool) -> float:
    """What it took that rows were cut, of ``n_kv`` KV heads: sums of dK and dV were zeroed, each slice read and wrote
    them, and where a stage's gradients are ``rounded`` they were copied. Whole rows write what is final, once."""
    if n_slices == 1:
        return 0.0
    sums = n_tokens * 2 * 128 * 4
    passes = 1 + 2 * n_slices + 1.5 * rounded - (0.5 if rounded else 1)
    return 1e3 * n_kv * sums * passes / MEMORY_RATE


@pytest.mark.parametrize("heads, n_tokens, one, by_heads, by_gather, heads_cut, gather_cut", CASES)
def test_predictions_are_within_5_percent(heads, n_tokens, one, by_heads, by_gather, heads_cut, gather_cut):
    options, layer = ExchangeOptions(), _layer(heads, n_tokens)
    assert 1e3 * pass_seconds(_layer(heads, n_tokens, 1)) == pytest.approx(one, rel=0.05)
    cut = _cut_ms(n_tokens, heads[1] // 4, heads_cut, True)
    assert 1e3 * seconds_with(layer, 4, options) + cut == pytest.approx(by_heads, rel=0.05)
    cut = _cut_ms(n_tokens, heads[1], gather_cut, False)
    assert 1e3 * seconds_without(layer, options) + cut == pytest.approx(by_gather, rel=0.05)


@pytest.mark.parametrize("heads, n_tokens, one, by_heads, by_gather, heads_cut, gather_cut", CASES)
def test_auto_takes_what_was_faster(heads, n_tokens, one, by_heads, by_gather, heads_cut, gather_cut):
    assert choose_team(_layer(heads, n_tokens), ExchangeOptions()).h == (4 if by_heads < by_gather else 1)


def test_two_gpus_all_gather():
    """Half of all rows are a rank's own: 98.5 ms by heads and 93.4 by all-gather at 524,288 tokens, commit 66da215."""
    layer, options = _layer((16, 16), 524288, 2), ExchangeOptions()
    assert choose_team(layer, options).h == 1
    assert 1e3 * seconds_without(layer, options) == pytest.approx(93.4, rel=0.05)
    cut = _cut_ms(524288, 8, 2, True)
    assert 1e3 * seconds_with(layer, 2, options) + cut == pytest.approx(98.5, rel=0.05)


@pytest.mark.parametrize(
    "mode, options, way",
    [
        ("auto", {}, "the faster"),
        ("heads", {}, "heads"),
        ("allgather", {}, "all-gather"),
        ("kv", {}, None),
        ("allgather", {"copy_engines": False}, None),
        ("heads", {"ranks_per_node": 2}, None),
    ],
)
def test_the_bench_shows_what_auto_compares(mode, options, way):
    n_tokens, bounds = 524288, np.array([0, 524288])
    options = ExchangeOptions(mode, **({"ranks_per_node": 4} | options))
    geometry = build_geometry(rank_segments("zigzag", n_tokens, 4, bounds), 0, bounds, 512, "cpu")
    shown = {}
    for heads in ((16, 16), (32, 8)):
        shape, layer = Shape(*heads, 128, MoBAConfig(512, 8), "zigzag", "uniform"), _layer(heads, n_tokens)
        shown[heads] = seconds_by_copies(Counted(shape, n_tokens, torch.bfloat16, options), geometry)
        by_heads, by_gather = seconds_with(layer, 4, options), seconds_without(layer, options)
        expected = {"heads": by_heads, "all-gather": by_gather, "the faster": min(by_heads, by_gather)}
        assert shown[heads] == expected.get(way)
    assert way is None or shown[16, 16] < shown[32, 8]
