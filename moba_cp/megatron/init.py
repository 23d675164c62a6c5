"""Initial weights that depend on the seed alone, not on ranks, sharding or device."""

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..model.attention import KEY_CONV_WEIGHT

# Projections back into the residual stream, in Megatron's names.
_TO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
# Of a matrix, elements that are drawn together: a rank draws the blocks of rows that it has a part of.
_BLOCK_ELEMENTS = 1 << 20


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, std: float, n_layers: int) -> None:
    """Fill the parameters of a model of Megatron's names, sharded by FSDP2 or not.

    Matrices are drawn from a normal distribution, on the CPU in float32 and in blocks of rows; each block has a
    generator of its own, seeded by ``seed``, the parameter's name and the block's first row. So a rank draws little
    more than its own shard. Norms are ones, biases and convolutions over keys zeros.

    Args:
        seed: of the whole model.
        std: standard deviation; projections back into the residual stream get ``std / sqrt(2 * n_layers)``.
        n_layers: transformer layers.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with ThreadPoolExecutor(min(16, threads)) as pool:
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if name.endswith(KEY_CONV_WEIGHT):
                local.zero_()
            elif parameter.dim() < 2:
                local.fill_(0.0 if name.endswith(".bias") else 1.0)
            else:
                scale = std / math.sqrt(2 * n_layers) if name.endswith(_TO_RESIDUAL) else std
                local.copy_(_drawn(f"{seed}:{name}", parameter, scale, pool))


def _drawn(key: str, parameter: Tensor, scale: float, pool: ThreadPoolExecutor) -> Tensor:
    """This rank's shard of a matrix [rows, ...] of normal numbers, which ``key`` decides; float32 on the CPU."""
    shape, offset = _shard(parameter)
    n_rows, width = parameter.shape[0], parameter.shape[1:].numel()
    first, last = offset[0], offset[0] + shape[0]
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    shard = torch.empty(shape[0], *parameter.shape[1:], dtype=torch.float32)

    def draw(start: int) -> None:
        end = min(start + step, n_rows)
        block = torch.empty(end - start, *parameter.shape[1:], dtype=torch.float32)
        block.normal_(0.0, scale, generator=_generator(key, start))
        here = slice(max(start, first), min(end, last))
        shard[here.start - first : here.stop - first] = block[here.start - start : here.stop - start]

    # Consumed, so that an error in a thread is raised here.
    list(pool.map(draw, range(first // step * step, last, step)))
    inner = tuple(slice(at, at + n) for at, n in zip(offset[1:], shape[1:], strict=True))
    return shard[(slice(None), *inner)]


def _shard(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, first index in each dimension) of what this rank holds of ``parameter``."""
    if not isinstance(parameter, DTensor):
        return tuple(parameter.shape), (0,) * parameter.dim()
    return compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)


def _generator(key: str, start: int) -> torch.Generator:
    digest = hashlib.sha256(f"{key}:{start}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
