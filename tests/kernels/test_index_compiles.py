"""The kernels of index branches compiled for Hopper, where there is no GPU: products in float64 by tensor cores."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moba_cp import kernels
from tests.helpers.index_inputs import inputs
from tests.kernels.test_hopper_compiles import SHARED_BYTES, Hopper


@pytest.mark.parametrize("score", ["mean", "max"])
def test_compiles_within_shared_memory(score, monkeypatch):
    done = {}

    def compile_only(self, grid):
        def launch(*args, **options):
            name = self.fn.__name__
            if name.startswith("_index"):
                done[name, options.get("S", 0) > 0] = self.run(*args, grid=grid, warmup=True, **options)

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    x = inputs([0, 256], m=4, dim=32, head_dim=64, block_size=64).to(torch.bfloat16)
    keys, by_mean, lse = x.block_keys(score), score == "mean", torch.zeros(256, 6)
    kernels.index_select(x.queries, x.weights, keys, x.table, by_mean, 16, 1, True)
    for chosen in (None, torch.zeros(256, 2, 15, dtype=torch.int32)):
        kernels.index_loss(x.q, x.k, lse, 0.1, x.queries, x.weights, keys, x.table, by_mean, chosen)
    names = "score", "again", "masses", "rows", "keys"
    expected = {(f"_index_{name}_kernel", False) for name in names}
    assert set(done) == expected | {("_index_keys_kernel", True), ("_index_chosen_kernel", True)}
    for name, kernel in done.items():
        assert kernel.metadata.shared <= SHARED_BYTES and ".local" not in kernel.asm["ptx"], name
    assert "mma.sync.aligned.m16n8k16.row.col.f64" in done["_index_score_kernel", False].asm["ptx"]
