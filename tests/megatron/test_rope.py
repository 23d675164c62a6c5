"""Rotary angles follow a token's position in its document, in every layout."""

import math

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import CPContext
from moba_cp.megatron import ContextRotaryEmbedding
from tests.helpers.distributed import run_threads

BOUNDS = torch.tensor([0, 16, 16, 28, 48])


def _local_angles(communicator, layout):
    context = CPContext(communicator, layout=layout, seq_len=48, cu_seqlens=BOUNDS)
    return context.positions, ContextRotaryEmbedding(8)(context.document_positions)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_per_document"])
def test_every_layout_gives_a_token_the_angles_of_its_document_position(layout):
    position = torch.cat([torch.arange(16), torch.arange(12), torch.arange(20)])
    expected = ContextRotaryEmbedding(8)(position)
    seen = []
    for where, angles in run_threads(2, _local_angles, layout):
        assert torch.equal(angles, expected[where])
        seen.append(where)
    assert sorted(torch.cat(seen).tolist()) == list(range(48))


def test_rotation_is_megatrons():
    """The first half of a head turns with the second, by position * base ** (-2i / D)."""
    x = torch.randn(40, 1, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True)
    angles = ContextRotaryEmbedding(8, base=500.0)(torch.arange(40))
    turned = apply_rotary_pos_emb(x, angles, config=config, cp_group=object())
    for position in (0, 1, 39):
        for i in range(4):
            angle = position * 500.0 ** (-2 * i / 8)
            first, second = x[position, 0, 1, i].item(), x[position, 0, 1, i + 4].item()
            expected = complex(first, second) * complex(math.cos(angle), math.sin(angle))
            assert turned[position, 0, 1, i].item() == pytest.approx(expected.real, abs=1e-6)
            assert turned[position, 0, 1, i + 4].item() == pytest.approx(expected.imag, abs=1e-6)


def test_positions_of_millions_keep_their_angles():
    position = 10_000_019
    angles = ContextRotaryEmbedding(64, base=1e6)(torch.tensor([position]))[0, 0, 0].double()
    exact = torch.tensor([math.remainder(position * 1e6 ** (-2 * i / 64), 2 * math.pi) for i in range(32)] * 2).double()
    assert (torch.remainder(angles - exact + math.pi, 2 * math.pi) - math.pi).abs().max() < 1e-5
