"""compute-sanitizer on small cases of the kernels for Hopper; needs such a GPU and the CUDA toolkit.

    python -m tests.kernels.sanitize

Runs memcheck and racecheck on calls that all of these kernels serve, and fails on every report but those of one kind.
Triton hands captured values to the groups of ``gl.warp_specialize`` through shared memory, with a barrier of all
threads between (``barrier.sync 1`` in the PTX), and versions of racecheck take that for a race. Such a report names the
line of a kernel's ``def`` or of ``gl.warp_specialize`` on both sides, and nothing that a kernel's own lines do.

A control shows what the reports are worth: a group hands numbers to another as our kernels do, once rightly, and once
telling it before they are stored. Racecheck must say no more of the former than of our kernels, and must find the
latter.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moba_cp import MoBAConfig, moba_attention
from moba_cp.kernels import hopper
from moba_cp.kernels.hopper.shared import barrier

# (Hq, Hkv), D, B, k, tokens, deterministic, and the kernels that this must run.
CALLS = {
    "long": ((2, 1), 128, 256, 2, 600, False, {"select", "forward", "keys", "queries"}),
    "short": ((2, 2), 128, 128, 3, 600, False, {"select", "keys"}),
    "deterministic": ((2, 2), 128, 256, 2, 600, True, {"select", "forward", "queries"}),
    "longer": ((1, 1), 128, 1152, 2, 2404, False, {"select", "forward", "keys", "queries"}),
    "long64": ((2, 1), 64, 256, 2, 600, False, {"select", "forward", "keys"}),
    "short64": ((2, 2), 64, 128, 3, 600, False, {"select", "keys"}),
}
ROUNDS, STAGES, SIZE = gl.constexpr(6), gl.constexpr(2), gl.constexpr(128)
# How the control hands numbers over: 64-bit ones by plain stores, 32-bit ones by stmatrix.
CONTROLS = {
    "right": (torch.int64, False), "right32": (torch.int32, False),
    "wrong": (torch.int64, True), "wrong32": (torch.int32, True),
}  # fmt: skip
HAND_OVER = ("def ", "gl.warp_specialize(")
ACCESS = re.compile(r"(Read|Write) access at (\w+)\+0x\w+ in (\w+\.py):(\d+)")


@gluon.jit
def _give(x, first, places, full, empty, EARLY: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for i in range(ROUNDS):
        stage = i % STAGES
        value = gl.load(x + first + i * SIZE + gl.arange(0, SIZE, layout=LAYOUT))
        mbarrier.wait(empty.index(stage), i // STAGES % 2 ^ 1)
        if EARLY:
            mbarrier.arrive(full.index(stage), count=1)
        places.index(stage).store(value)
        barrier()
        if not EARLY:
            mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _take(out, first, places, full, empty):
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    for i in range(ROUNDS):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES % 2)
        value = places.index(stage).load(LAYOUT)
        mbarrier.arrive(empty.index(stage), count=1)
        gl.store(out + first + i * SIZE + gl.arange(0, SIZE, layout=LAYOUT), value)


@gluon.jit
def control_kernel(x, out, start, EARLY: gl.constexpr):
    """out = x, [start + ROUNDS * SIZE] from ``start`` on, through STAGES places in shared memory."""
    first = gl.load(start)
    ONE: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    places = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, SIZE], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [(_take, (out, first, places, full, empty)), (_give, (x, first, places, full, empty, EARLY))], [4], [64]
    )


def run_control(name: str) -> None:
    dtype, early = CONTROLS[name]
    x = torch.arange(ROUNDS.value * SIZE.value, device="cuda").to(dtype)
    out, start = torch.full_like(x, -1), torch.zeros_like(x[:1])
    control_kernel[(1,)](x, out, start, EARLY=early, num_warps=4)
    torch.cuda.synchronize()
    assert early or torch.equal(x, out)


def run_call(name: str) -> None:
    heads, dim, block_size, top_k, n_tokens, deterministic, expected = CALLS[name]
    ran = set()
    for kernel in ("select", "forward", "keys", "queries"):
        _note(kernel, getattr(hopper, f"launch_{kernel}"), ran)
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(n_tokens, h, dim, device="cuda", dtype=torch.bfloat16, generator=g)
        for h in (heads[0], heads[1], heads[1], heads[0])
    )
    cu_seqlens = torch.tensor([0, 37, n_tokens], dtype=torch.int32, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    moba_attention(*leaves, MoBAConfig(block_size, top_k, deterministic), cu_seqlens=cu_seqlens).backward(dout)
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
    failed = False
    for (tool, case), (summary, races, log) in zip(runs, results):
        own = [race for race in races if not all(line.startswith(HAND_OVER) for line in race)]
        is_clean = "SUMMARY" in summary and not own and (tool == "racecheck" or " 0 errors" in summary)
        failed |= not own if case.startswith("wrong") else not is_clean
        print(f"{tool} {case}: {summary}; {len(races) - len(own)} of the hand-over of captured values")
        for race in own:
            print("   ", " | ".join(sorted(race)))
        if args.log:
            (args.log / f"{tool}_{case}.log").write_text(log)
    sys.exit("unexpected reports, or none of the wrong control" if failed else 0)


if __name__ == "__main__":
    main()
