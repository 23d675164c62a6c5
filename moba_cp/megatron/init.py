"""Initial weights that depend on the seed alone, not on ranks, sharding or device."""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model.attention import KEY_CONV_WEIGHT

# Projections back into the residual stream, in Megatron's names.
_TO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, std: float, n_layers: int) -> None:
    """Fill the parameters of a model of Megatron's names, sharded by FSDP2 or not.

    Each parameter is drawn on the CPU in float32 from a generator of its own, seeded by ``seed`` and the parameter's
    name: matrices from a normal distribution, norms are ones, biases and convolutions over keys zeros.

    Args:
        seed: of the whole model.
        std: standard deviation; projections back into the residual stream get ``std / sqrt(2 * n_layers)``.
        n_layers: transformer layers.
    """
    for name, parameter in model.named_parameters():
        full = torch.empty(parameter.shape, dtype=torch.float32)
        if name.endswith(KEY_CONV_WEIGHT):
            full.zero_()
        elif parameter.dim() < 2:
            full.fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            scale = std / math.sqrt(2 * n_layers) if name.endswith(_TO_RESIDUAL) else std
            full.normal_(0.0, scale, generator=_generator(seed, name))
        parameter.copy_(distribute_like(full, parameter))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def distribute_like(full: Tensor, parameter: Tensor) -> Tensor:
    """``full`` as ``parameter`` is sharded; every rank has all of it."""
    if not isinstance(parameter, DTensor):
        return full
    # Every rank has the same tensor, so each cuts its own shard and nothing is sent.
    full = full.to(parameter.device, parameter.dtype)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
