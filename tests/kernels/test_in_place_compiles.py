"""Kernels that overwrite what they have read, compiled for Hopper without a GPU: no thread reads what another has
overwritten.

The interpreter cannot tell: it has no threads. The compiler may load a small tensor once for every layout that it is
needed in, by warps that nothing orders, and one of these stores the result. Warps are microseconds apart where a
process gives the GPU to another between their first instructions.
"""

import re

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moba_cp.blocks import Pages
from moba_cp.kernels import merge, pages
from tests.helpers import skewed
from tests.kernels.test_hopper_compiles import Hopper

N, HEADS, SLOTS = 100, 4, 3
# What an address is computed by, from the argument on.
ADDRESSES = "splat", "addptr", "broadcast", "expand_dims", "convert_layout"


def unordered(kernel) -> list[str]:
    """Arguments that are loaded in another layout than they are stored in, with no barrier between the last load and
    the first store."""
    argument, layouts = {}, {}
    for line in kernel.asm["ttgir"].splitlines():
        values = re.findall(r"%\w+", line)
        if "tt.func" in line:
            argument = {x: x for x in re.findall(r"(%\w+): !tt.ptr", line)}
        elif (operation := re.search(r"(?:= |^ *)(?:tt|ttg)\.(\w+)", line)) is not None:
            name, is_store = operation[1], operation[1] == "store"
            of = next((argument[x] for x in values[not is_store :] if x in argument), None)
            if of is not None and name in ADDRESSES:
                argument[values[0]] = of
            elif of is not None and name in ("load", "store"):
                layout = re.search(r"!tt\.ptr<\w+>(?:, (#.*?>|#\w+))?>", line)
                layouts.setdefault(of, {}).setdefault(name, set()).add(layout and layout[1])
    code = [line for line in kernel.asm["ptx"].splitlines() if re.search(r"\b(ld|st)\.global|bar\.sync", line)]
    last = max(i for i, line in enumerate(code) if "ld.global" in line)
    first = min(i for i, line in enumerate(code) if "st.global" in line)
    if any("bar.sync" in line for line in code[last:first]):
        return []
    both = {of: x for of, x in layouts.items() if len(x) == 2}
    assert both, "an argument that is loaded and stored"
    return [of for of, x in both.items() if x["load"] != x["store"]]


@pytest.fixture
def compiled(monkeypatch):
    """Compiled kernels by name, as calls ask for them."""
    done = {}

    def compile_only(self, grid):
        return lambda **options: done.update({self.fn.__name__: self.run(grid=grid, warmup=True, **options)})

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    return done


@pytest.mark.parametrize("dim", [32, 128])
def test_all_have_read_before_one_writes(compiled, dim):
    out, lse = torch.zeros(N, HEADS, dim), torch.zeros(N, HEADS)
    part, part_lse = torch.zeros(N, HEADS, SLOTS, 1, dim), torch.zeros(N, HEADS, SLOTS, 1)
    index, row = torch.zeros(N, HEADS, SLOTS, dtype=torch.int32), torch.zeros(2, 7, dtype=torch.int64)
    merge.merge_visits(part, part_lse, out, lse, join=True)
    merge.merge_partial(out, lse, out.clone(), lse.clone())
    merge.merge_rows(out, lse, out[:, 0], lse[:, 0], index)
    merge.sum_visits(torch.zeros(2, N, 2, SLOTS, 1, dim), out, index, None, None, row, 1.0, add=True)
    merge.scale_rows(torch.zeros(2, N, 2, dim), out, 1.0, add=True)
    storage, pairs = Pages(out, out, row, row.int(), torch.zeros(7, dtype=torch.int32), 16), torch.zeros(3).long()
    pages.add_pages(out, out.clone(), storage, pairs, pairs, torch.zeros(48, 2, dim), 0, 48)
    names = {"merge_visits", "merge_partial", "merge_rows", "sum_visits", "scale_rows", "add"}
    assert set(compiled) == {f"_{name}_kernel" for name in names}
    assert {name: found for name, kernel in compiled.items() if (found := unordered(kernel))} == {}


@pytest.mark.parametrize("kind", skewed.KINDS)
def test_warps_apart_are_assembled(compiled, monkeypatch, tmp_path, kind):
    """What a test on GPUs compares with: ptxas takes it, and every barrier has its sleep."""
    from triton.backends.nvidia.compiler import CUDABackend

    make_ptx = CUDABackend.make_ptx
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CUDABackend, "make_ptx", lambda self, *args: skewed.skewed(make_ptx(self, *args), kind))
    merge._merge_rows_kernel.device_caches.clear()
    out, lse, index = torch.zeros(N, HEADS, 32), torch.zeros(N, HEADS), torch.zeros(N, HEADS, 2, dtype=torch.int32)
    merge.merge_rows(out, lse, out[:, 0], lse[:, 0], index)
    merge._merge_rows_kernel.device_caches.clear()
    ptx = compiled["_merge_rows_kernel"].asm["ptx"]
    assert ptx.count("nanosleep") == 1 + ptx.count("bar.sync") > 1 and compiled["_merge_rows_kernel"].asm["cubin"]
    assert ptx.index("nanosleep") < ptx.index("ld.global")
