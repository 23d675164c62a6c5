"""The kernels for Hopper, which no interpreter runs, compiled for it where there is no GPU.

Calls go through :func:`moba_cp.kernels.attention` and its backward as on a GPU; instead of launching, kernels of Gluon
are compiled, and the others do nothing.
"""

import threading

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from moba_cp import kernels  # noqa: E402
from moba_cp.blocks import block_table, local_pages  # noqa: E402
from moba_cp.kernels import hopper, tuned  # noqa: E402
from moba_cp.kernels import hopper_check as check  # noqa: E402
from tests.kernels import sanitize  # noqa: E402

SHARED_BYTES = 227 << 10


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def launcher_cls(self, *args):
        return None


@pytest.fixture
def compiled(monkeypatch):
    """Compiled kernels by name, as calls ask for them."""
    done = {}

    def compile_only(self, grid):
        def launch(*args, **options):
            if self.is_gluon():
                done[self.fn.__name__] = self.run(*args, grid=grid, warmup=True, **options)

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    monkeypatch.setattr(driver, "_active", Hopper())
    return done


@pytest.mark.parametrize(
    "dim, block_size, names",
    [
        (128, 64, {"short_block", "dkdv_rows"}),
        (128, 128, {"short_block", "dkdv"}),
        (128, 512, {"long_block", "dkdv", "dq"}),
        (64, 128, {"dkdv"}),
        (64, 512, {"long_block", "dkdv"}),
    ],
    ids=["128-half", "128-short", "128-long", "64-short", "64-long"],
)
@pytest.mark.parametrize("shared", [False, True], ids=["each head", "shared"])
def test_compiles_within_shared_memory(compiled, dim, block_size, names, shared):
    n_tokens, n_heads = 2048, 32 if shared else 4
    q, k, v, dout = (torch.zeros(n_tokens, h, dim, dtype=torch.bfloat16) for h in (n_heads, 2, 2, n_heads))
    table = block_table(n_tokens, block_size, None, "cpu")
    chosen = torch.zeros(n_tokens, 2 if shared else n_heads, 2, dtype=torch.int32)
    args = q, local_pages(k, v, table), chosen, table.current_block, table.offset + 1, dim**-0.5
    _, lse = kernels.attend(*args, torch.bfloat16)
    kernels.attend_backward(*args, dout, lse, lse.clone(), local_dtype=torch.bfloat16)
    # Long blocks of shared selections are the portable kernels'.
    assert {name.removesuffix("_kernel") for name in compiled} == (set() if shared and block_size > 128 else names)
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= SHARED_BYTES, name
        assert "wgmma.mma_async" in kernel.asm["ptx"] and "setmaxnreg" in kernel.asm["ptx"], name


@pytest.mark.parametrize("dim, top_k", [(64, 8), (128, 16)])
def test_selection_compiles_without_spilling(compiled, dim, top_k):
    q, means = (torch.zeros(n, n_heads, dim, dtype=torch.bfloat16) for n, n_heads in ((100, 4), (9, 2)))
    first, own = torch.zeros(2, 100, dtype=torch.int32)
    kernels.select_blocks(q, means, first, own, top_k)
    kernel = compiled.pop("select_kernel")
    assert kernel.metadata.num_warps == 1 and ".local" not in kernel.asm["ptx"]
    kernels.select_blocks(q, means, first, own, hopper.MAX_SELECTED + 2)
    kernels.select_blocks(q.float(), means.float(), first, own, top_k)
    kernels.select_blocks(q[..., :48], means[..., :48], first, own, top_k)
    assert not compiled, "more than registers hold, float32 and other head dims are the other kernel's"


@pytest.mark.parametrize("is_hopper", [False, True], ids=["every GPU", "hopper"])
@pytest.mark.parametrize(
    "dim, heads, dtype", [(128, (16, 1), torch.bfloat16), (256, (6, 2), torch.float32)], ids=["bf16", "fp32"]
)
def test_other_gates_compile_within_shared_memory(compiled, monkeypatch, dim, heads, dtype, is_hopper):
    monkeypatch.setattr(tuned, "is_hopper", lambda device: is_hopper)

    def compile_only(self, grid):
        return lambda *args, **options: compiled.update(
            {len(compiled): self.run(*args, grid=grid, warmup=True, **options)}
        )

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    q, means, k = (torch.zeros(n, h, dim, dtype=dtype) for n, h in ((100, heads[0]), (9, heads[1]), (900, heads[1])))
    first, own = torch.zeros(2, 100, dtype=torch.int32)
    start = torch.zeros(9, dtype=torch.int64)
    kernels.select_blocks(q, means, first, own, 16, "max", 1, True)
    kernels.select_by_keys(q, k, start, first, own, 96, 16, "sum", 1, True)
    kernels.given_blocks(torch.zeros(100, heads[1], 15, dtype=torch.int32), first, own)
    assert len(compiled) == 5
    for kernel in compiled.values():
        # What every GPU has that the kernels run on is 99 KiB.
        limit = SHARED_BYTES if is_hopper else 99 << 10
        assert kernel.metadata.shared <= limit and ".local" not in kernel.asm["ptx"]


@pytest.mark.parametrize("dim, block_size, top_k", [(64, 512, 8), (128, 4096, 12), (256, 64, 64)])
def test_kernels_for_few_rows_compile_without_spilling(compiled, monkeypatch, dim, block_size, top_k):
    def compile_only(self, grid):
        return lambda *args, **options: compiled.update(
            {self.fn.__name__: self.run(*args, grid=grid, warmup=True, **options)}
        )

    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    q, k, v, means = (torch.zeros(n, h, dim, dtype=torch.bfloat16) for n, h in ((2, 4), (300, 2), (300, 2), (9, 2)))
    table = block_table(300, block_size, None, "cpu", 2)
    chosen = kernels.select_few(q, means, table.first, table.current_block, top_k)
    kernels.attend_few(q, local_pages(k, v, table), chosen, table.current_block, table.visible, dim**-0.5)
    assert len(compiled) == 4
    # Else the lanes that hold a score would not agree on it.
    assert "fma" not in compiled["_best_of_tile_kernel"].asm["ptx"]
    for name, kernel in compiled.items():
        assert ".local" not in kernel.asm["ptx"] and kernel.metadata.shared <= SHARED_BYTES, name


def test_serves_what_tma_can_fetch_and_nothing_else(monkeypatch):
    def serves(dtype=torch.bfloat16, dim=128, block_size=256, scale=0.1, offset=0, dout=None):
        n = 300
        size = n * 2 * dim
        q, k, v = (torch.zeros(size + 8, dtype=dtype)[offset:][:size].view(n, 2, dim) for _ in "qkv")
        return hopper.serves(q, local_pages(k, v, block_table(n, block_size, None, "cpu")), scale, dout)

    assert not serves(), "without a GPU"
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    assert serves() and serves(torch.float16) and serves(offset=8) and serves(block_size=128) and serves(dim=64)
    assert not any([serves(torch.float32), serves(dim=32), serves(dim=256), serves(block_size=192), serves(scale=-0.1)])
    assert not serves(offset=1), "rows that begin at odd places"
    assert not serves(torch.float16, dout=torch.zeros(300, 2, 128, dtype=torch.float16)), "partial dQ could overflow"
    assert not serves(dout=torch.zeros(300 * 256 + 8, dtype=torch.bfloat16)[1:][: 300 * 256].view(300, 2, 128))


@pytest.fixture
def examine(monkeypatch):
    """What is decided for a Hopper GPU with a version of Triton, the check done by ``compare``; and what is logged."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def examined(version, compare=lambda *_: pytest.fail("nothing is to be checked")):
        monkeypatch.setattr(hopper, "_verdicts", {})
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(hopper, "_compare", compare)
        return hopper.runs_on(gpu), kernels.serving(gpu)

    return examined


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.7.1+git1234"])
def test_measured_versions_serve_without_a_check(examine, version):
    serves, line = examine(version)
    assert serves and "kernels for Hopper" in line and version in line


def test_older_versions_do_not_serve(examine, caplog):
    serves, line = examine("3.5.1")
    assert not serves and "need Triton 3.6" in line
    assert [record.levelname for record in caplog.records] == ["WARNING"] and line in caplog.text


def test_newer_versions_serve_once_checked(examine, monkeypatch, caplog):
    checks = []

    def compare(device, forced):
        forced.serves = True
        assert hopper.runs_on(device), "the kernels under the check"
        forced.serves = False
        assert not hopper.runs_on(device), "those that they are compared with"
        checks.append(device)

    with caplog.at_level("INFO", logger=hopper.LOG.name):
        serves, line = examine("3.60.0", compare)
    assert serves and "checked" in line and hopper.runs_on(checks[0]) and len(checks) == 1
    assert [record.levelname for record in caplog.records] == ["INFO"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not examine("3.60.0")[0] and not hopper._verdicts, "decided later, when no graph is captured"


def test_newer_versions_that_fail_the_check_do_not_serve(examine, caplog):
    def compare(device, forced):
        forced.serves = True
        raise RuntimeError("no such instruction")

    serves, line = examine("4.0.0", compare)
    assert not serves and "Triton 4.0.0: RuntimeError: no such instruction" in line
    assert [record.levelname for record in caplog.records] == ["WARNING"] and line in caplog.text
    assert not hopper.runs_on(torch.device("cuda", 0)) and len(caplog.records) == 1, "remembered"


def test_other_devices_use_the_portable_kernels(monkeypatch):
    monkeypatch.setattr(hopper, "_verdicts", {})
    assert not hopper.runs_on(torch.device("cpu")) and "interpreter" in kernels.serving("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(hopper, "is_hopper", lambda device: False)
    assert not hopper.runs_on(torch.device("cuda", 1)) and "A100" in kernels.serving("cuda:1")


def test_the_check_asks_for_every_kernel(monkeypatch):
    """Nothing is compiled here, as the tests above do."""
    names, compiled = set(), set()
    note = lambda self, grid: lambda *args, **options: compiled.add(self.fn.__name__)
    monkeypatch.setattr(JITFunction, "__getitem__", note)
    monkeypatch.setattr(hopper, "runs_on", lambda device: True)
    for dim, block_size, dtype in check.CASES:
        compiled.clear()
        check.run(dim, block_size, dtype, torch.device("cpu"))
        kind = (
            "half" if block_size == 64 else "short" if block_size <= 128 else "long" if block_size <= 1024 else "longer"
        )
        ran = {"long_block_kernel": "forward", "short_block_kernel": "forward", "dq_kernel": "dq"}
        ran |= {"dkdv_kernel": "dkdv", "dkdv_rows_kernel": "dkdv"}
        names |= {(ran[name], dim, kind) for name in compiled if name in ran}
        assert "select_kernel" in compiled
    assert names == set(tuned.SPECIALIZED)


def test_the_check_refuses_what_differs(monkeypatch):
    forced, ours, wrong = threading.local(), torch.arange(3.0), {}
    results = {"selection": ours, "dQ": ours}
    monkeypatch.setattr(check, "CASES", [(64, 128, torch.bfloat16)])
    monkeypatch.setattr(check, "run", lambda *case: results | (wrong if forced.serves else {}))
    check.compare(torch.device("cpu"), forced)
    for name, value in (("selection", ours + 1), ("dQ", ours * 1.1), ("dQ", ours * torch.nan)):
        wrong.clear()
        wrong[name] = value
        with pytest.raises(RuntimeError, match="differs from the portable kernels"):
            check.compare(torch.device("cpu"), forced)


def test_tiles_of_the_other_kernels_where_these_do_not_serve():
    bf16, device = torch.bfloat16, torch.device("cpu")
    for tile in (tuned.forward_tile, tuned.dkdv_tile, tuned.dq_tile):
        assert tile(128, 512, bf16, device, specialized=True).producer_registers
        assert not tile(128, 512, bf16, device).producer_registers
        assert not tile(96, 512, bf16, device, specialized=True).producer_registers, "not in the table"
    # Atomics and a kernel of its own would both write dQ.
    assert tuned.dq_by_atomics(128, 512, bf16, device)
    assert not tuned.dq_by_atomics(128, 512, bf16, device, specialized=True)


def test_the_sanitizer_runs_every_kernel_of_the_folder():
    """By the names of their launches, which only a Hopper GPU would miss otherwise."""
    launches = {name.removeprefix("launch_") for name in vars(hopper) if name.startswith("launch_")} - {"options"}
    assert set.union(*(kernels for *_, kernels in sanitize.CALLS.values())) == launches
