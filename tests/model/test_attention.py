"""Which layers are full, and what the configurations refuse."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moba_cp.model import AttentionConfig, ModelConfig
from moba_cp.model.config import moba_keys_per_query


@pytest.mark.parametrize(
    "fields, full",
    [
        ({}, []),
        ({"full_layers": "none"}, []),
        ({"full_layers": "last 1"}, [5]),
        ({"full_layers": "last 3"}, [3, 4, 5]),
        ({"full_layers": "last 5"}, [1, 2, 3, 4, 5]),
        ({"full_layers": [1, 4]}, [1, 4]),
        ({"full_layers": ()}, []),
        ({"default": "full"}, [1, 2, 3, 4, 5]),
        ({"default": "full", "full_layers": "last 2"}, [1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_layers_are_picked_by_number_from_one(fields, full):
    attention = AttentionConfig(**fields)
    assert sorted(attention.full_layer_numbers(5)) == full
    assert [n for n in range(1, 6) if attention.kind(n, 5) == "full"] == full


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"default": "dense"}, "default='dense' is not a kind of attention; use one of moba, full"),
        ({"full_layers": "last"}, "full_layers='last' is not understood; use 'none', 'last N'"),
        ({"full_layers": "last 0"}, "full_layers='last 0' is not understood"),
        ({"full_layers": "first 2"}, "full_layers='first 2' is not understood"),
        ({"full_layers": 2}, "full_layers=2 is not understood"),
        ({"full_layers": [0, 1]}, "full_layers=[0, 1] is not understood"),
        ({"full_layers": [2, 2]}, "full_layers=[2, 2] is not understood"),
        ({"full_layers": [True]}, "full_layers=[True] is not understood"),
        ({"full_layers": ["1"]}, "full_layers=['1'] is not understood"),
        ({"layout": "striped"}, "layout='striped' is not a layout"),
        ({"block_size": 40}, "block_size=40 is not a positive multiple of 16; use 32 or 48"),
        ({"top_k": 0}, "top_k=0 is not between 1 and 64"),
    ],
    ids=str,
)
def test_attention_config_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionConfig(**fields)


@pytest.mark.parametrize(
    "full_layers, message",
    [
        ("last 5", "full_layers='last 5' asks for 5 of 4 layers; use 'last 4' or fewer"),
        ([2, 7], "full_layers=[2, 7] names layer 7, but the model has 4 layers; use numbers from 1 to 4"),
    ],
)
def test_layers_that_the_model_has_not_are_refused(full_layers, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionConfig(full_layers=full_layers).full_layer_numbers(4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_layers": 0}, "n_layers=0 is not a positive integer"),
        ({"vocab_size": 2.5}, "vocab_size=2.5 is not a positive integer"),
        (
            {"n_heads": 6, "n_kv_heads": 4, "hidden_size": 96},
            "n_kv_heads=4 does not divide n_heads=6; use one of 1, 2, 3, 6",
        ),
        ({"hidden_size": 100, "n_heads": 6}, "hidden_size=100 is not divisible by n_heads=6; use 102 or set head_dim"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"rope_base": 0}, "rope_base=0 is not a positive number"),
        ({"init_std": float("nan")}, "init_std=nan is not a positive number"),
        ({"tie_embeddings": "yes"}, "tie_embeddings='yes' is not a bool"),
        (
            {"recompute": "selective"},
            "recompute='selective' is not understood; use one of auto, none,",
        ),
    ],
    ids=str,
)
def test_model_config_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**fields)


@given(seq_len=st.integers(1, 200), block_size=st.integers(1, 40), top_k=st.integers(1, 9))
def test_keys_per_query_equal_a_count(seq_len, block_size, top_k):
    count = sum(p % block_size + 1 + min(p // block_size, top_k - 1) * block_size for p in range(seq_len))
    assert moba_keys_per_query(seq_len, block_size, top_k) == pytest.approx(count / seq_len)


def test_flops_of_a_hybrid_lie_between_moba_and_full():
    model = ModelConfig(n_layers=4, hidden_size=128, n_heads=4)
    flops = [
        model.flops_per_token(4096, AttentionConfig(block_size=64, top_k=2, full_layers=full))
        for full in ("none", "last 1", "last 4")
    ]
    assert flops[0] < flops[1] < flops[2]
    norms = 9 * 128
    attention_flops = 12 * 128 * 4 * 4097 / 2
    assert flops[2] == pytest.approx(6 * (model.n_parameters() - norms + 256 * 128) + attention_flops)
