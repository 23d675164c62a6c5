"""The kernels of index branches compiled for Hopper, where there is no GPU: products in float64 by tensor cores."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moba_cp import kernels
from tests.helpers.index_inputs import inputs
from tests.kernels.test_hopper_compiles import SHARED_BYTES, Hopper


@pytest.fixture
def done(monkeypatch):
    """Compiled kernels by name, and whether they are of chosen blocks."""
    done = {}

    def compile_only(self, grid):
        def launch(*args, **options):
            name = self.fn.__name__
            if name.startswith("_index"):
                done[name, options.get("S", 0) > 0] = self.run(*args, grid=grid, warmup=True, **options)

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    return done


def learn(x, score, chosen):
    lse = torch.zeros(x.q.shape[:2])
    kernels.index_loss(x.q, x.k, lse, 0.1, x.queries, x.weights, x.block_keys(score), x.table, score == "mean", chosen)


@pytest.mark.parametrize("score", ["mean", "max"])
def test_compiles_within_shared_memory(score, done):
    x = inputs([0, 256], m=4, dim=32, head_dim=64, block_size=64).to(torch.bfloat16)
    kernels.index_select(x.queries, x.weights, x.block_keys(score), x.table, score == "mean", 16, 1, True)
    for chosen in (None, torch.zeros(256, 2, 15, dtype=torch.int32)):
        learn(x, score, chosen)
    names = "score", "again", "masses", "rows", "keys"
    expected = {(f"_index_{name}_kernel", False) for name in names}
    assert set(done) == expected | {("_index_keys_kernel", True), ("_index_chosen_kernel", True)}
    for name, kernel in done.items():
        assert kernel.metadata.shared <= SHARED_BYTES and ".local" not in kernel.asm["ptx"], name
    assert "mma.sync.aligned.m16n8k16.row.col.f64" in done["_index_score_kernel", False].asm["ptx"]


@pytest.mark.parametrize("score", ["mean", "max"])
def test_one_query_compiles(score, done):
    """One query of the scorer: a size of 1, for which layouts are others."""
    x = inputs([0, 60], m=1, dim=22, n_kv=1, group=1, block_size=8).to(torch.float32)
    for chosen in (None, torch.zeros(60, 1, 3, dtype=torch.int32)):
        learn(x, score, chosen)
    assert {"_index_rows_kernel", "_index_chosen_kernel"} <= {name for name, _ in done}
