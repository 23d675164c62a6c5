"""Checks of one device: ``python -m moba_cp.doctor.compute cuda:0`` prints them as JSON, in a process of its own.

Memory that nobody else holds, attention forward and backward against float64, whether the fast kernels serve, and how
fast it multiplies matrices and copies memory, against what such a GPU reaches.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from .. import MoBAConfig, moba_attention
from ..bench.judge import judge_moba
from ..ops import backend
from .finding import Finding, guarded

# Part of the GPU's name -> the least bf16 TFLOP/s of a product of 8192 x 8192 matrices, and the least GB/s of a copy
# (read and written): about two thirds of what healthy ones reach. The first that fits counts.
EXPECTED = (
    ("B200", 900.0, 4000.0),
    ("H200", 450.0, 2800.0),
    ("H100 PCIe", 300.0, 1200.0),
    ("H100", 450.0, 1900.0),
    ("A100", 170.0, 900.0),
)
FREE_SHARE = 0.9
MOBA = MoBAConfig(block_size=64, top_k=4)


def check_compute(device: str) -> list[Finding]:
    """All checks of ``device``."""
    checks = [("memory", memory), ("attention", attention), ("kernels", kernels), ("speed", speed)]
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        name = f"GPU {where.index} "
    else:
        checks, name = checks[1:], ""
    return [finding for part, check in checks for finding in guarded(name + part, lambda: check(where, name + part))]


def memory(device: torch.device, name: str) -> Finding:
    """Little of the GPU's memory is taken: a process that was left behind makes a run fail much later."""
    free, total = torch.cuda.mem_get_info(device)
    text = f"{free / 1024**3:.1f} of {total / 1024**3:.1f} GiB free"
    return Finding(name, free >= FREE_SHARE * total, text, "another process holds it: nvidia-smi names it; end it")


def attention(device: torch.device, name: str) -> Finding:
    """MoBA, forward and backward, as near to float64 as its precision allows."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(1)

    def draw(n_heads: int) -> torch.Tensor:
        return torch.randn(1000, n_heads, 64, generator=g, dtype=torch.float32, device=device).to(dtype)

    q, k, v, dout = draw(4), draw(2), draw(2), draw(4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = moba_attention(*leaves, MOBA, return_lse=True)
    out.backward(dout)
    inputs = [*(x.detach() for x in leaves), dout]
    errors, problem = judge_moba(inputs, [out.detach(), *(x.grad for x in leaves)], lse.detach(), MOBA)
    text = problem or f"forward and backward within {max(errors.values()):.1e} of float64"
    return Finding(name, problem is None, text, "kernels compute wrongly here: reinstall torch and triton, or the GPU")


def kernels(device: torch.device, name: str) -> Finding:
    """Which kernels serve; where the fast ones could and do not, that is a failure."""
    if device.type != "cuda":
        used = backend(torch.empty(1, 1, 64, dtype=torch.float32)).__name__.rpartition(".")[2]
        text = {"eager": "plain PyTorch, for the CPU"}.get(used, "Triton's interpreter (TRITON_INTERPRET), very slow")
        return Finding(name, used == "eager", text, "unset TRITON_INTERPRET")
    from ..kernels import serving

    line = serving(device)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    fast = not hopper or line.startswith("kernels for Hopper")
    return Finding(name, fast, line, "install the Triton of constraints.txt for the fast ones")


def speed(device: torch.device, name: str) -> Finding:
    """Matrix products and copies against what such a GPU reaches."""
    if device.type != "cuda":
        flops, _ = _rates(device, 512, 1 << 22, torch.float32)
        return Finding(name, True, f"{flops / 1e9:.0f} GFLOP/s in float32")
    flops, copied = _rates(device, 8192, 1 << 29, torch.bfloat16)
    tflops, gb, title = flops / 1e12, copied / 1e9, torch.cuda.get_device_name(device)
    text = f"{tflops:.0f} bf16 TFLOP/s, {gb:.0f} GB/s"
    least = next((numbers for part, *numbers in EXPECTED if part in title), None)
    if least is None:
        return Finding(name, True, f"{text} ({title}: nothing to compare with)")
    passed = tflops >= least[0] and gb >= least[1]
    return Finding(name, passed, text, f"a {title} reaches {least[0]:.0f} and {least[1]:.0f}: heat, power or a bad GPU")


def _rates(device: torch.device, n: int, nbytes: int, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of [n, n] products, bytes/s read and written by copies of ``nbytes``)."""
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = _seconds(lambda: torch.mm(a, b), device), _seconds(lambda: target.copy_(source), device)
    return 2 * n**3 / product, 2 * nbytes / copy


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """The time of one call, the mean of some in a row."""
    for warm_up in range(2):
        began = time.perf_counter()
        for _ in range(repeats if warm_up else 3):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    print(json.dumps([asdict(finding) for finding in check_compute(sys.argv[1])]))
