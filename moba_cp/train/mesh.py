"""The ranks of a run: data x context, their groups and their device.

Ranks that share a sequence (context) are neighbours, so that they sit in one node where they can. Weights are sharded
over all ranks together.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .config import RunConfig
from .heartbeat import Heartbeat, open_heartbeat


@dataclass(frozen=True)
class Mesh:
    """This rank's place among the ranks."""

    rank: int
    size: int
    device: torch.device
    data_rank: int
    data_size: int
    context_group: dist.ProcessGroup
    context_size: int
    shard_mesh: DeviceMesh
    """All ranks in one dimension, over which weights and optimizer state are sharded."""
    group: dist.ProcessGroup | None = None
    """All ranks of the run; None where these are all of torch.distributed."""
    save_group: dist.ProcessGroup | None = None
    """All ranks, for checkpoints that are written in the background; None where none are."""
    heartbeat: Heartbeat = field(default_factory=lambda: Heartbeat(0, 1, None, 0.0))
    """Where this rank is, for the errors of others."""

    @property
    def first(self) -> bool:
        """Whether this rank writes logs and progress."""
        return self.rank == 0


def launched_size() -> int:
    """Number of ranks that torchrun (or another launcher) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_rank() -> int:
    """This process's rank according to its launcher; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def context_size(config: RunConfig, size: int) -> int:
    """Ranks per sequence out of ``size`` ranks, or ValueError."""
    context = config.context_size if config.context_size is not None else size
    if size % context:
        raise ValueError(
            f"run.context_size={context} does not divide the {size} ranks of this run; "
            f"use one of {divisors(size)}, or null for all"
        )
    return context


def divisors(size: int) -> str:
    """The divisors of ``size``, as text."""
    return ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)


def open_mesh(config: RunConfig) -> Mesh:
    """Make the process groups; torch.distributed is started unless it has been. A collective call of all
    ranks. :func:`close_mesh` ends them.

    Raises:
        ValueError: context_size does not divide the ranks, or the device is not there.
    """
    device, timeout = start_ranks(config), timedelta(seconds=config.timeout_seconds)
    size, rank = dist.get_world_size(), dist.get_rank()
    heartbeat = open_heartbeat(rank, size, config.timeout_seconds)
    context = context_size(config, size)
    # Every rank makes every group. A DeviceMesh would make them with PyTorch's own timeout of half an hour.
    groups = [dist.new_group(range(i, i + context), timeout=timeout) for i in range(0, size, context)]
    return Mesh(
        rank=rank,
        size=size,
        device=device,
        data_rank=rank // context,
        data_size=size // context,
        context_group=groups[rank // context],
        context_size=context,
        shard_mesh=init_device_mesh(device.type, (size,), mesh_dim_names=("all",)),
        heartbeat=heartbeat,
        save_group=dist.new_group(timeout=timeout, backend="gloo") if config.background_save else None,
    )


def start_ranks(config: RunConfig) -> torch.device:
    """Start torch.distributed unless it has been, without the groups of :func:`open_mesh`; this rank's device.

    Raises:
        ValueError: the device is not there.
    """
    if config.deterministic:
        # cuBLAS reads it when it starts; without it its results depend on how streams share its memory.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    device = device_of(config.device)
    if not dist.is_initialized():
        start_process_group(device, timedelta(seconds=config.timeout_seconds))
    return device


def backend_of(device: torch.device) -> str:
    """The torch.distributed backend for tensors of this kind of device and of the CPU."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def start_process_group(device: torch.device, timeout: timedelta) -> None:
    """Start torch.distributed for the ranks that were launched; collective over them."""
    # Which collectives each rank had begun, written to files when one of them times out.
    new_name = torch.torch_version.TorchVersion(torch.__version__) >= (2, 12)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE" if new_name else "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # On a low-priority stream NCCL's kernels would wait for attention to finish instead of overlapping with it.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    if launched_size() > 1:
        dist.init_process_group(backend_of(device), timeout=timeout)
    else:
        # One rank needs no port: the store is in memory.
        dist.init_process_group(backend_of(device), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def close_mesh(mesh: Mesh | None = None) -> None:
    """End the heartbeat of ``mesh``, and the process groups if there are any."""
    if mesh is not None:
        mesh.heartbeat.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def device_of(wanted: str) -> torch.device:
    """This rank's device for ``run.device``, made the current one."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("run.device='cuda': PyTorch finds no GPU here; use auto or cpu")
    # Several ranks may share a GPU (tests do), if each has its own NCCL_HOSTID.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
