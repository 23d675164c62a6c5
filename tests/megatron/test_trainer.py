"""Megatron's own training loop with our spec: every way to spread it over ranks gives the numbers of one process.

Ranks import megatron-core, which takes seconds, so that all runs of a size share one set of them.
"""

import pytest
import torch
import torch.distributed as dist

from moba_cp.cp.options import ExchangeOptions
from moba_cp.megatron import AttentionConfig
from tests.helpers.distributed import run_ranks
from tests.helpers.megatron_trainer import HYBRID, Run, local_part, train

SP = {"sequence_parallel": True}
QK_NORM = {"qk_layernorm": True}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CORE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
DETERMINISTIC = AttentionConfig(block_size=16, top_k=2, deterministic=True)

ON_TWO = {
    "cp2": Run(cp=2),
    "tp2": Run(tp=2),
    "tp2 sequence parallel, norms of queries and keys": Run(tp=2, config={**SP, **QK_NORM}),
    "pp2": Run(pp=2),
    "cp2 packed": Run(cp=2, packed=True),
    "ep2": Run(ep=2, experts=True),
    "cp2, experts": Run(cp=2, experts=True),
}
MORE_ON_TWO = {
    "tp2 sequence parallel": Run(tp=2, config=SP),
    "pp2 vpp2": Run(pp=2, vpp=2),
    "dp2": Run(),
    "dp2 distributed optimizer": Run(distributed_optimizer=True),
    "tp2 packed": Run(tp=2, packed=True),
    "pp2 packed": Run(pp=2, packed=True),
    "cp2 full recompute": Run(cp=2, config=FULL_RECOMPUTE),
    "cp2 selective recompute": Run(cp=2, config=CORE_RECOMPUTE),
    "cp2 packed full recompute": Run(cp=2, packed=True, config=FULL_RECOMPUTE),
    "cp2 deterministic": Run(cp=2, attention=DETERMINISTIC),
    "cp2 rows move": Run(cp=2, exchange=ExchangeOptions("query")),
    "cp2 packed, blocks move": Run(cp=2, packed=True, exchange=ExchangeOptions("kv", ranks_per_node=2)),
}
ON_FOUR = {
    "tp2 cp2": Run(tp=2, cp=2),
    "tp2 cp2 sequence parallel": Run(tp=2, cp=2, config=SP),
    "pp2 cp2": Run(pp=2, cp=2),
    "pp2 vpp2 cp2": Run(pp=2, vpp=2, cp=2),
    "dp2 cp2": Run(cp=2),
    "dp2 cp2 distributed optimizer": Run(cp=2, distributed_optimizer=True),
    "tp4, fewer heads of keys than ranks": Run(tp=4),
    "pp2 cp2 packed": Run(pp=2, cp=2, packed=True),
    "tp2 cp2 packed": Run(tp=2, cp=2, packed=True),
    "ep2 cp2": Run(ep=2, cp=2, experts=True),
    "ep4 cp2": Run(ep=4, cp=2, experts=True),
    "tp2 ep2 sequence parallel": Run(tp=2, ep=2, experts=True, config=SP),
    "pp2 ep2": Run(pp=2, ep=2, experts=True),
}


def run_all(rank, runs):
    return {name: train(run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def one():
    """Results of one process, by what changes the numbers."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    known = {}

    def results(run: Run):
        key = run.packed, run.attention, run.experts, run.config.get("qk_layernorm", False)
        if key not in known:
            config = QK_NORM if key[-1] else {}
            known[key] = train(Run(packed=run.packed, attention=run.attention, experts=run.experts, config=config))
        return known[key]

    return results


@pytest.fixture(scope="module")
def two():
    return run_ranks(2, run_all, ON_TWO)


@pytest.fixture(scope="module")
def more_on_two():
    return run_ranks(2, run_all, MORE_ON_TWO, timeout=600)


@pytest.fixture(scope="module")
def four():
    return run_ranks(4, run_all, ON_FOUR, timeout=600)


def check(name, runs, ranks, one):
    expected = one(runs[name])
    for results in ranks:
        assert results[name]["losses"] == pytest.approx(expected["losses"], rel=2e-5)
        assert results[name]["norms"] == pytest.approx(expected["norms"], rel=2e-4)
    kinds = [kind for results in ranks for kind in results[name]["kinds"]]
    assert ("full" in kinds) == (runs[name].attention is HYBRID) and "moba" in kinds


@pytest.mark.parametrize("name", ON_TWO)
def test_two_ranks_equal_one(name, two, one):
    check(name, ON_TWO, two, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_ON_TWO)
def test_two_ranks_equal_one_in_more_ways(name, more_on_two, one):
    check(name, MORE_ON_TWO, more_on_two, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_equal_one(name, four, one):
    check(name, ON_FOUR, four, one)


class _Split:
    tensor_model_parallel = True

    def __init__(self, name):
        self.partition_dim = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0


@pytest.mark.parametrize("name", ["cp2", "tp2", "tp2 sequence parallel, norms of queries and keys", "cp2 packed"])
def test_gradients_equal_those_of_one(name, two, one):
    expected, size = one(ON_TWO[name])["grads"], ON_TWO[name].tp
    assert len(expected) > 20
    for rank, results in enumerate(two):
        assert results[name]["grads"].keys() == expected.keys()
        for parameter, grad in results[name]["grads"].items():
            whole = expected[parameter]
            part = whole if grad.shape == whole.shape else local_part(whole, parameter, _Split(parameter), size, rank)
            assert (grad - part).abs().max() <= 2e-5 * whole.abs().max(), parameter


@pytest.mark.parametrize("name", ["ep2", "cp2, experts"])
def test_gradients_of_experts_equal_those_of_one(name, two, one):
    expected, size = one(ON_TWO[name])["grads"], ON_TWO[name].ep
    experts = [{x for x in results[name]["grads"] if ".local_experts." in x} for results in two]
    assert len(experts[0]) == len(experts[1]) == 16 // size and len(experts[0] | experts[1]) == 16
    for results, mine in zip(two, experts):
        for parameter in mine:
            whole = expected[parameter]
            assert (results[name]["grads"][parameter] - whole).abs().max() <= 2e-5 * whole.abs().max(), parameter


def test_sparsity_is_felt(one):
    full = one(Run(attention=AttentionConfig(default="full")))
    assert abs(one(Run())["losses"][0] - full["losses"][0]) > 1e-3
    assert abs(one(Run(packed=True))["losses"][0] - one(Run())["losses"][0]) > 1e-3


def test_training_is_training(one):
    losses = one(Run())["losses"]
    assert losses[-1] < losses[0] - 0.05 and torch.tensor(one(Run())["norms"]).isfinite().all()
