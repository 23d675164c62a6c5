"""compute-sanitizer on small cases of the kernels for Hopper; needs such a GPU and the CUDA toolkit.

    python -m tests.kernels.sanitize

Runs memcheck and racecheck on calls that all of these kernels serve, and on a control: a group of warps that hands
numbers to another as our kernels do, once rightly, and once telling it before they are stored. Racecheck must report
the wrong control. It also reports orders that it cannot follow; those are excused, but only where the right control,
in the same run, is reported for the same:

- *captures*: Triton hands captured values to the groups of ``gl.warp_specialize`` through shared memory, between two
  barriers of all threads. The report names no line of the kernel's body. Seen with 2025.3, not with 2026.3.
- *chains*: all threads of a group access a place and meet at their barrier, one of them arrives at an mbarrier, and the
  other group waits for that. Seen with both.

Everything else fails. Racecheck follows no stmatrix, TMA or wgmma: what passes through them it does not check.
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
# Whether the control tells before it has stored.
CONTROLS = {"right": False, "wrong": True}
CAPTURES = ("def ", "gl.warp_specialize(")
# Parts of the two lines of a chain: rows of Q follow output that passed through their place, and the control's numbers.
CHAINS = [
    ("q_t.load(WIDE)", "async_copy_global_to_shared(q_s.index(2 * buf + half)"),
    ("places.index(stage).store(value)", "places.index(stage).load(LAYOUT)"),
]
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
    early = CONTROLS[name]
    # 64-bit numbers, which are not stored by stmatrix.
    x = torch.arange(ROUNDS.value * SIZE.value, device="cuda")
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


def kind(report: set[str]) -> str:
    """``captures``, ``chain``, or the lines of a report that is neither."""
    if all(line.startswith(CAPTURES) for line in report):
        return "captures"
    for parts in CHAINS:
        if len(report) == 2 and all(any(part in line for line in report) for part in parts):
            return "chain"
    return " | ".join(sorted(report))


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
    excused = set(kinds["racecheck", "right"]) & {"captures", "chain"}
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
