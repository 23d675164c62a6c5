"""``bench peer`` on gloo: our ways are right, and its verdicts tell right from wrong."""

import pytest
import torch

from moba_cp.bench import peer
from tests.helpers.distributed import run_ranks

CPU = torch.device("cpu")


def verdicts(rank):
    return [peer.verdict(way, bounds, CPU) for _, _, bounds, way in peer.our_ways()]


def test_our_ways_are_right():
    for said in run_ranks(2, verdicts):
        assert said == ["right"] * len(peer.our_ways())


def one_rank(*tensors_and_bounds):
    *tensors, bounds = tensors_and_bounds
    return peer._one_rank(tensors, bounds)


@pytest.mark.parametrize("wrong, name", list(enumerate(peer.NAMES)))
def test_what_is_wrong_is_named(wrong, name):
    def way(*inputs):
        results = one_rank(*inputs)
        results[wrong] = results[wrong] * 1.001
        return results

    assert peer.verdict(one_rank, peer.UNEVEN, CPU) == "right"
    assert peer.verdict(way, peer.UNEVEN, CPU).startswith(f"wrong: {name} is off by ")


def test_documents_that_see_one_another_are_wrong():
    assert peer.verdict(lambda *x: one_rank(*x[:4], peer.ONE), peer.UNEVEN, CPU).startswith("wrong: out is off by ")


def test_what_fails_is_told():
    def says(*_):
        raise RuntimeError("no masks here\nand more")

    def says_nothing(*_):
        raise AssertionError

    assert peer.verdict(says, peer.ONE, CPU) == "RuntimeError: no masks here"
    assert peer.verdict(says_nothing, peer.ONE, CPU).startswith("AssertionError: raise AssertionError")
