"""Limits of what is packed into integers, on shapes alone."""

import pytest

from moba_cp.cp.exchange.tables import PAIR, pair_unit


def test_pairs_of_ten_million_tokens_fit():
    """10M tokens in blocks of 64, 32 KV heads, 8 ranks: what one rank can ask for, and be asked for by seven others."""
    n_blocks = 10_000_000 // 64
    n_pairs = 32 * (n_blocks * 7 // 8 + n_blocks // 8 * 7)
    n_tokens = n_pairs * 64
    assert n_pairs > 2**63 // PAIR, "too many for the usual unit"
    unit = pair_unit(n_pairs, n_tokens)
    assert unit > n_tokens and n_pairs * unit + n_tokens < 2**63


def test_units_stay_as_they_are_where_they_fit():
    assert pair_unit(2**63 // PAIR - 1, PAIR - 1) == pair_unit(0, 0) == PAIR


def test_too_many_pairs_are_named():
    with pytest.raises(ValueError, match="4294967296 .KV head, block. pairs with 4294967296 tokens .* larger blocks"):
        pair_unit(2**32, 2**32)
