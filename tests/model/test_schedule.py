"""Hybrids by time: which step attends how, and what a schedule refuses."""

import re

import pytest

from moba_cp.megatron import AttentionConfig
from moba_cp.model.schedule import Phase

RECIPE = [Phase("moba", 0.9), Phase("full")]


@pytest.mark.parametrize("steps, first_full", [(160, 145), (10, 10), (15, 15), (1000, 901), (33, 31)])
def test_the_last_tenth_is_full(steps, first_full):
    attention = AttentionConfig(schedule=RECIPE, full_layers="last 1")
    kinds = [attention.at(step, steps).kind(1, 4) for step in range(1, steps + 1)]
    assert kinds == ["moba"] * (first_full - 1) + ["full"] * (steps - first_full + 1)
    assert {attention.at(step, steps).kind(4, 4) for step in range(1, steps + 1)} == {"full"}


def test_phases_may_alternate():
    attention = AttentionConfig(schedule=[Phase("full", 0.1), Phase("moba", 0.5), Phase("full")])
    assert [attention.at(step, 10).default for step in range(1, 11)] == ["full"] + ["moba"] * 4 + ["full"] * 5


def test_without_a_schedule_nothing_changes():
    attention = AttentionConfig(full_layers="last 1")
    assert attention.at(1, 10) is attention


@pytest.mark.parametrize(
    "schedule, message",
    [
        ([Phase("dense")], "schedule[0].kind='dense' is not a kind of attention; use one of moba, full"),
        ([Phase("moba", 0.9)], "schedule[0].until=0.9 ends the last phase early; leave until out there"),
        ([Phase("moba"), Phase("full")], "schedule[0].until is missing"),
        ([Phase("moba", 1.0), Phase("full")], "schedule[0].until=1.0 is not between 0.0 and 1"),
        ([Phase("moba", 90), Phase("full")], "schedule[0].until=90 is not between 0.0 and 1"),
        ([Phase("moba", 0.5), Phase("full", 0.5), Phase("moba")], "schedule[1].until=0.5 is not between 0.5 and 1"),
    ],
    ids=str,
)
def test_a_schedule_refuses(schedule, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AttentionConfig(schedule=schedule)


def test_a_schedule_beside_a_default_is_refused():
    with pytest.raises(ValueError, match="default='full' beside a schedule"):
        AttentionConfig(default="full", schedule=RECIPE)


def test_a_phase_without_steps_is_refused():
    with pytest.raises(ValueError, match=re.escape("schedule[1] has none of 4 steps; train longer or drop it")):
        AttentionConfig(schedule=RECIPE).at(1, 4)
