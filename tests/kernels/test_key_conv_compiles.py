"""The convolution over keys compiled for Hopper without a GPU: what makes it fast there, and keeps rows to the bit."""

import re

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moba_cp import kernels
from tests.kernels.test_hopper_compiles import Hopper


@pytest.fixture
def ptx(monkeypatch):
    """Code of the kernels by name, as calls ask for it."""
    done = {}

    def compile_only(self, grid):
        def launch(**options):
            kernel = self.run(grid=grid, warmup=True, **options)
            assert not kernel.metadata.enable_fp_fusion
            done[self.fn.__name__] = kernel.asm["ptx"]

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    return done


def convolve(dtype, width, dim):
    k, weight = torch.zeros(100, 5, dim, dtype=dtype), torch.zeros(5 * dim // 2, width, dtype=dtype)
    inside = torch.zeros(100, dtype=torch.uint8)
    kernels.convolve(k, weight, inside)
    kernels.convolve_backward(k, k.clone(), weight, inside)


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loads_are_wide_and_nothing_is_rounded_together(dtype, width, ptx):
    convolve(dtype, width, 64)
    assert set(ptx) == {"_convolve_kernel", "_convolve_backward_kernel"}
    for name, code in ptx.items():
        assert "mul" in code and not re.search(r"\bfma\.", code), name
        assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code and ".local" not in code, name


@pytest.mark.parametrize("dim", [2, 22, 256])
def test_other_head_dims_compile(dim, ptx):
    convolve(torch.bfloat16, 5, dim)
    assert len(ptx) == 2 and not any(re.search(r"\bfma\.|\.local", code) for code in ptx.values())
