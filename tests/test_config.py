import pytest

from moba_cp import MoBAConfig


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(block_size=100, top_k=3), r"block_size=100 is not a positive multiple of 16; use 96 or 112"),
        (dict(block_size=0, top_k=3), r"block_size=0 .* use 16 or 32"),
        (dict(block_size=-16, top_k=3), r"block_size=-16 "),
        (dict(block_size="512", top_k=3), r"block_size='512' is not an integer"),
        (dict(block_size=512, top_k=0), r"top_k=0 is not between 1 and 64"),
        (dict(block_size=512, top_k=65), r"top_k=65 is not between 1 and 64"),
        (dict(block_size=512, top_k=True), r"top_k=True is not an integer"),
        (dict(block_size=512, top_k=3, deterministic="no"), r"deterministic='no' is not a bool"),
    ],
)
def test_bad_values_are_named(kwargs, says):
    with pytest.raises(ValueError, match=says):
        MoBAConfig(**kwargs)


def test_it_is_frozen_and_hashable():
    assert {MoBAConfig(512, 3): 1}[MoBAConfig(512, 3)] == 1
