"""Index branches in Megatron's own training loop: they learn alike on ranks, and leave the rest as it is."""

from dataclasses import replace

import pytest
import torch

from moba_cp.index import IndexConfig
from moba_cp.megatron.index import IndexWeights
from moba_cp.megatron.layer import _refuse
from tests.helpers.distributed import run_ranks
from tests.helpers.megatron_trainer import HYBRID, Run, model_config, train

INDEX = IndexConfig(heads=2, dim=4)
SPARSE = replace(HYBRID, index=INDEX)
WARM_UP = replace(SPARSE, default="full")
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ON_ONE = {
    "sparse": Run(attention=SPARSE),
    "warm-up": Run(attention=WARM_UP),
    "full": Run(attention=replace(WARM_UP, index=None)),
    "recomputed": Run(attention=SPARSE, config=FULL_RECOMPUTE),
}
ON_TWO = {
    "cp2": Run(cp=2, attention=SPARSE),
    "cp2 warm-up": Run(cp=2, attention=WARM_UP),
    "pp2": Run(pp=2, attention=SPARSE),
}


def _train_all(rank, runs):
    return [train(run) for run in runs]


@pytest.fixture(scope="module")
def results():
    (one,), two = (
        run_ranks(1, _train_all, [*ON_ONE.values()]),
        run_ranks(2, _train_all, [*ON_TWO.values()], timeout=240),
    )
    return dict(zip(ON_ONE, one)) | dict(zip(ON_TWO, zip(*two)))


def of_index(grads):
    return {name: grad for name, grad in grads.items() if name.endswith(".index.weight")}


def test_branches_learn_and_leave_the_rest_as_it_is(results):
    warm, full, sparse = (results[name] for name in ("warm-up", "full", "sparse"))
    learned = of_index(warm["grads"])
    # The last layer is full for good.
    assert [name.split(".")[2] for name in learned] == ["0", "1", "2"]
    assert all(grad.abs().max() > 1e-5 for grad in (*learned.values(), *of_index(sparse["grads"]).values()))
    assert warm["losses"][0] == full["losses"][0] != sparse["losses"][0]
    for name, grad in full["grads"].items():
        assert torch.equal(warm["grads"][name], grad), name


def test_what_is_computed_again_learns_once(results):
    for name, grad in results["sparse"]["grads"].items():
        torch.testing.assert_close(results["recomputed"]["grads"][name], grad, msg=name)


@pytest.mark.parametrize("name, like", [("cp2", "sparse"), ("cp2 warm-up", "warm-up"), ("pp2", "sparse")])
def test_ranks_learn_alike(results, name, like):
    expected, found = results[like], {}
    for rank in results[name]:
        torch.testing.assert_close(rank["losses"], expected["losses"], rtol=1e-4, atol=1e-4)
        found |= rank["grads"]
    assert found.keys() == expected["grads"].keys()
    for parameter, grad in expected["grads"].items():
        torch.testing.assert_close(found[parameter], grad, rtol=1e-3, atol=1e-4, msg=parameter)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tensor_model_parallel_size": 2}, "attention.index with tensor_model_parallel_size=2"),
        ({"fp16": True}, "fp16=True with an index branch"),
    ],
)
def test_what_is_not_served_is_refused(fields, message):
    config = model_config(Run())
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        _refuse(config, SPARSE, False)
        IndexWeights(INDEX, config)
