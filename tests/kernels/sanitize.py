"""compute-sanitizer on small cases of the kernels for Hopper; needs such a GPU and the CUDA toolkit.

    python -m tests.kernels.sanitize

Runs memcheck and racecheck on calls that use all of these kernels, and racecheck on a control: a warpgroup passes
numbers to another, once correctly, and once signalling before they are stored, which must be reported.

Any other report is a failure, except *captures*: Triton passes captured values to the warpgroups of
``gl.warp_specialize`` through shared memory, between two barriers of all threads, which racecheck 2025.3 reports and
2026.3 does not. Such a report names no line of a body. It is excused if the correct control is reported for the same in
the same run.

Blocks of 64 keys are not among the calls: their gradients' consumers hand sums over behind a barrier of the warpgroup,
with one arrival for all its threads, which racecheck does not follow; memcheck was clean.

Racecheck does not follow stmatrix, TMA or wgmma, and so does not check what passes through them. Of mbarriers it knows
which threads arrive and wait, but not what is ordered by earlier barriers, nor that reads have finished: in the control
all threads arrive, and no buffer is used twice.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from moba_cp import MoBAConfig, moba_attention
from moba_cp.kernels import hopper
from moba_cp.kernels.hopper.shared import barrier

# (Hq, Hkv), D, B, k, tokens, deterministic, and the kernels that this must run. In those named "shared" the query heads
# of a KV head select together.
CALLS: dict[str, tuple[tuple[int, int], int, int, int, int, bool, set[str]]] = {
    "long": ((2, 1), 128, 256, 2, 600, False, {"select", "forward", "dkdv", "dq"}),
    "short": ((2, 2), 128, 128, 3, 600, False, {"select", "forward", "dkdv"}),
    "deterministic": ((2, 2), 128, 256, 2, 600, True, {"select", "forward", "dq"}),
    "longer": ((1, 1), 128, 1152, 2, 2404, False, {"select", "forward", "dkdv", "dq"}),
    "long64": ((2, 1), 64, 256, 2, 600, False, {"select", "forward", "dkdv"}),
    "short64": ((2, 2), 64, 128, 3, 600, False, {"select", "dkdv"}),
    "shared": ((32, 2), 128, 128, 3, 600, False, {"forward", "dkdv"}),
    # In float32: the kernels of every GPU.
    "portable": ((4, 2), 32, 16, 3, 600, True, set()),
}
PLACES, SIZE = gl.constexpr(4), gl.constexpr(128)
# Whether the control tells before it has stored.
CONTROLS = {"right": False, "wrong": True}
CAPTURES = ("def ", "gl.warp_specialize(")
ACCESS = re.compile(r"(Read|Write) access at (\w+)\+0x\w+ in (\w+\.py):(\d+)")


@gluon.jit
def _give(x, first, places, full, EARLY: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for i in range(PLACES):
        value = gl.load(x + first + i * SIZE + gl.arange(0, SIZE, layout=LAYOUT))
        if EARLY:
            _tell(full.index(i))
        places.index(i).store(value)
        if not EARLY:
            _tell(full.index(i))


@gluon.jit
def _tell(full):
    """All threads of a group arrive, and one again once they have met."""
    async_copy.mbarrier_arrive(full, increment_count=False)
    barrier()
    mbarrier.arrive(full, count=1)


@gluon.jit
def _take(out, first, places, full):
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    for i in range(PLACES):
        mbarrier.wait(full.index(i), 0)
        gl.store(out + first + i * SIZE + gl.arange(0, SIZE, layout=LAYOUT), places.index(i).load(LAYOUT))


@gluon.jit
def control_kernel(x, out, start, EARLY: gl.constexpr):
    """out = x, [start + PLACES * SIZE] from ``start`` on, through shared memory."""
    first = gl.load(start)
    places = gl.allocate_shared_memory(x.dtype.element_ty, [PLACES, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(full.index(i), count=129)
    gl.warp_specialize([(_take, (out, first, places, full)), (_give, (x, first, places, full, EARLY))], [4], [64])


def run_control(name: str) -> None:
    early = CONTROLS[name]
    # 64-bit numbers, which are not stored by stmatrix.
    x = torch.arange(PLACES.value * SIZE.value, device="cuda")
    out, start = torch.full_like(x, -1), torch.zeros_like(x[:1])
    control_kernel[(1,)](x, out, start, EARLY=early, num_warps=4)
    torch.cuda.synchronize()
    assert early or torch.equal(x, out)


def run_call(name: str) -> None:
    heads, dim, block_size, top_k, n_tokens, deterministic, expected = CALLS[name]
    ran = set()
    for kernel in ("select", "forward", "dkdv", "dq"):
        _note(kernel, getattr(hopper, f"launch_{kernel}"), ran)
    g, dtype = torch.Generator("cuda").manual_seed(0), torch.bfloat16 if expected else torch.float32
    q, k, v, dout = (
        torch.randn(n_tokens, h, dim, device="cuda", dtype=dtype, generator=g)
        for h in (heads[0], heads[1], heads[1], heads[0])
    )
    cu_seqlens = torch.tensor([0, 37, n_tokens], dtype=torch.int32, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gate = {"shared_by_group": "sum"} if name.startswith("shared") else {}
    config = MoBAConfig(block_size, top_k, deterministic, **gate)
    moba_attention(*leaves, config, cu_seqlens=cu_seqlens).backward(dout)
    torch.cuda.synchronize()
    assert ran == expected, f"{name}: {ran} ran"


def _note(name: str, launch, ran: set) -> None:
    def noting(*args, **kwargs):
        ran.add(name)
        return launch(*args, **kwargs)

    setattr(hopper, f"launch_{name}", noting)


def reports(log: str) -> list[set[str]]:
    """The source lines that each race report of a log names."""
    found = []
    for part in log.split("Race reported between")[1:]:
        found.append({_source(file, int(line)) for _, _, file, line in ACCESS.findall(part)} or {part[:200]})
    return found


def kind(report: set[str]) -> str:
    """``captures``, or the lines of a report."""
    return "captures" if all(line.startswith(CAPTURES) for line in report) else " | ".join(sorted(report))


def _source(file: str, line: int) -> str:
    for folder in (Path(hopper.__file__).parent, Path(__file__).parent):
        if (folder / file).exists():
            return (folder / file).read_text().splitlines()[line - 1].strip()
    return f"{file}:{line}"


def sanitize(tool: str, case: str, options: list[str]) -> tuple[str, list[set[str]], str]:
    """Runs a case under a tool: its summary, the race reports, the whole log."""
    command = ["compute-sanitizer", "--tool", tool, *options, sys.executable, "-m", "tests.kernels.sanitize"]
    # Each tensor in an allocation of its own, so that memcheck sees what lies beside it.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})
    done = subprocess.run([*command, "--case", case], capture_output=True, text=True, env=environment)
    log = done.stdout + done.stderr
    summary = [line for line in log.splitlines() if "SUMMARY" in line][-1:]
    if done.returncode or not summary:
        return f"did not end well (exit status {done.returncode}): {log[-1000:]}", [], log
    return summary[0].strip("= "), reports(log), log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CONTROLS, *CALLS], help="run this alone, under no tool")
    parser.add_argument("--log", type=Path, help="folder for the tools' whole output")
    args, options = parser.parse_known_args()
    if args.case:
        return run_control(args.case) if args.case in CONTROLS else run_call(args.case)
    runs = [("racecheck", case) for case in CONTROLS]
    runs += [(tool, case) for tool in ("memcheck", "racecheck") for case in CALLS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda run: sanitize(*run, options), runs))
    kinds = {run: Counter(map(kind, races)) for run, (_, races, _) in zip(runs, results)}
    excused = set(kinds["racecheck", "right"]) & {"captures"}
    failed = []
    for run, (summary, _, log) in zip(runs, results):
        print(*run, summary, *(f"{count} {what}" for what, count in kinds[run].items()), sep="; ")
        clean = "SUMMARY" in summary and (run[0] == "racecheck" or " 0 errors" in summary)
        found = set(kinds[run]) - (excused if run[1] != "wrong" else {"captures"})
        if not clean or bool(found) != (run[1] == "wrong"):
            failed.append(" ".join(run))
        if args.log:
            (args.log / f"{run[0]}_{run[1]}.log").write_text(log)
    print("excused:", *sorted(excused) or ["nothing"])
    sys.exit(f"unexpected reports, or none of the wrong control: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
