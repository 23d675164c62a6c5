import typing

import numpy as np
import pytest

from moba_cp import ExchangeOptions, MoBAConfig
from moba_cp.cp.layout import Layout, rank_segments
from moba_cp.model import AttentionConfig
from moba_cp.model.schedule import Phase, check_schedule


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(block_size=100, top_k=3), r"block_size=100 is not a positive multiple of 16; use 96 or 112"),
        (dict(block_size=0, top_k=3), r"block_size=0 .* use 16 or 32"),
        (dict(block_size=-16, top_k=3), r"block_size=-16 "),
        (dict(block_size="512", top_k=3), r"block_size='512' is not an integer"),
        (dict(block_size=512, top_k=0), r"top_k=0 is not between 1 and 64"),
        (dict(block_size=512, top_k=65), r"top_k=65 is not between 1 and 64"),
        (dict(block_size=512, top_k=True), r"top_k=True is not an integer; use a whole number such as 8"),
        (dict(block_size=512, top_k=3, deterministic="no"), r"deterministic='no' is not a bool"),
        (
            dict(block_size=512, top_k=3, shared_by_group="mean"),
            r"shared_by_group='mean' is unknown; use 'none', 'sum'",
        ),
        (dict(block_size=512, top_k=3, score="sum"), r"score='sum' is unknown; use 'mean', 'max'"),
        (dict(block_size=512, top_k=3, sink=1), r"sink=1 is not a bool"),
        (dict(block_size=512, top_k=1, sink=True), r"sink=True takes a block beside .* top_k=1; use top_k=2 or more"),
        (dict(block_size=512, top_k=3, min_recent=True), r"min_recent=True is not an integer"),
        (dict(block_size=512, top_k=3, min_recent=-1), r"min_recent=-1 is not between 0 and 2, what top_k=3 leaves"),
        (dict(block_size=512, top_k=3, min_recent=2, sink=True), r"min_recent=2 .* 0 and 1, .* own block and the sink"),
    ],
)
def test_bad_values_are_named(kwargs, says):
    with pytest.raises(ValueError, match=says):
        MoBAConfig(**kwargs)


def test_it_is_frozen_and_hashable():
    assert {MoBAConfig(512, 3): 1}[MoBAConfig(512, 3)] == 1


@pytest.mark.parametrize(
    "cls, field", [(ExchangeOptions, "mode"), (ExchangeOptions, "gradient_dtype"), (AttentionConfig, "default"),
                   (AttentionConfig, "layout")]
)  # fmt: skip
def test_types_say_which_words_are_taken(cls, field):
    words = typing.get_args(typing.get_type_hints(cls)[field])
    for word in words:
        assert getattr(cls(**{field: word}), field) == word
    assert len(words) > 1
    with pytest.raises(ValueError, match=f"{field}='none of these' is not .*{words[0]}.*{words[-1]}"):
        cls(**{field: "none of these"})


def test_types_of_layouts_and_phases_say_which_words_are_taken():
    for layout in typing.get_args(Layout):
        assert len(rank_segments(layout, 8, 2, np.array([0, 8]))) == 2
    for kind in typing.get_args(typing.get_type_hints(Phase)["kind"]):
        check_schedule((Phase("moba", 0.5), Phase(kind)))
