"""Where the time and the memory of a step go: kernels that serve, utilization, and on demand a trace of one step."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import dense
from ..autograd import full_kernels
from ..cp.symmetric_memory import mapped_bytes
from ..ops import backend
from .config import TrainConfig
from .mesh import Mesh

TRACE, SNAPSHOT = "trace.json.gz", "memory.pickle"

PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12, "GB200": 2450e12}
"""Dense bf16 FLOP/s of one device, from the vendors' data sheets (SXM modules)."""

# What a kernel belongs to, by its name; the first that matches. Compiled kernels are named after what they fuse.
_ELEMENTWISE = "element by element"
_PARTS = {
    _ELEMENTWISE: r"^triton_(poi|red|per)_",
    "index branch": r"^_index_",
    "routing": r"select_kernel|_score_kernel|_choose_kernel|_given_kernel|_means_kernel|_count_kernel|_running_sum"
    r"|_scatter_kernel|_task_kernel|_visit_table|_row_stats",
    "exchange": r"nccl|Memcpy PtoP|_pack_kernel|_gather_rows|_request|_list|_pick|_relay|_moved|_far|_partial|_row_ids"
    r"|_weigh_kernel|_sum_kernel|_sum_up_kernel|_add_kernel|_copy_kernel|^_rows_kernel",
    "attention": r"_block_kernel|dkdv_|dq_kernel|_visits_kernel|_finish_kernel|_merge|_row_sums|_scale_rows|flash|cudnn"
    r"|fmha",
    "linear layers": r"gemm|nvjet|cutlass|xmma|cublas|splitK",
    "optimizer": r"adam|multi_tensor",
    "host copies": r"Memcpy (DtoH|HtoD)",
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that a device could reach; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAKS.items() if re.search(rf"\b{model}\b", name)), None)


def device_memory(device: torch.device) -> dict[str, float]:
    """GiB that tensors took at most since the last call, and that are held for them; both with buffers that other ranks
    read. Empty on a CPU."""
    if device.type != "cuda":
        return {}
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    mapped = mapped_bytes()
    return {"peak_gib": round((peak + mapped) / 2**30, 3), "reserved_gib": round((reserved + mapped) / 2**30, 3)}


def backends(config: TrainConfig, device: torch.device) -> list[str]:
    """Which kernels compute attention in each kind of layer, as lines for the terminal."""
    model, dtype = config.model, getattr(torch, config.run.dtype)
    q = torch.empty(128, model.n_heads, model.head_dim, dtype=dtype, device=device)
    kinds = {config.attention.kind(i, model.n_layers) for i in range(1, model.n_layers + 1)}
    kinds |= {phase.kind for phase in config.attention.schedule}
    lines = []
    if "moba" in kinds:
        ops = backend(q)
        serving = getattr(ops, "serving", None)
        lines.append(f"MoBA layers: {serving(device) if serving else 'plain PyTorch'}")
    if "full" in kinds:
        _, chosen = full_kernels(q, q, None, None, "auto", config.attention.deterministic)
        names = ", ".join(dense.BACKENDS)
        lines.append(f"full layers: {chosen.name} (of {names})")
    return lines


@contextlib.contextmanager
def tracing(folder: Path, wanted: bool, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Trace what runs inside on rank 0, if ``wanted``; the yielded entry for the log is filled at the end."""
    entry: dict[str, Any] = {}
    if not (wanted and mesh.first):
        yield entry
        return
    on_gpu = mesh.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        # Stacks of C++ would take more host memory than a long sequence leaves.
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=200_000)
    with torch.profiler.profile(activities=activities) as profile:
        yield entry
        if on_gpu:
            torch.cuda.synchronize(mesh.device)
    if on_gpu:
        torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
        torch.cuda.memory._record_memory_history(enabled=None)
        entry["seconds_by_part"] = seconds_by_part(profile.events())
    profile.export_chrome_trace(str(folder / TRACE))


def part_of(kernel: str) -> str:
    """What part of a step a kernel or copy belongs to."""
    return next((part for part, names in _PARTS.items() if re.search(names, kernel)), _ELEMENTWISE)


def seconds_by_part(events: Any) -> dict[str, float]:
    """Seconds that a device's kernels and copies took, by part of the step; ``waiting``: when nothing ran on it.

    Parts that run side by side count both, so the sum can be above the step's time.
    """
    parts: dict[str, float] = {}
    busy = []
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        begin, end = event.time_range.start, event.time_range.end
        part = part_of(event.name)
        parts[part] = parts.get(part, 0.0) + (end - begin) / 1e6
        busy.append((begin, end))
    busy.sort()
    idle, until = 0.0, busy[0][0] if busy else 0.0
    for begin, end in busy:
        idle += max(0.0, begin - until)
        until = max(until, end)
    return {name: round(seconds, 5) for name, seconds in (parts | {"waiting": idle / 1e6}).items()}
