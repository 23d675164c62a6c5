"""From the host's memory to a device, without waiting."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``.

    From the CPU, the host does not wait for what the current stream has still to do. With ``non_blocking=True`` alone
    it would: from memory that is not page-locked, more than 64 KiB are copied once the stream has come to it (CUDA
    Runtime API, "API synchronization behavior").
    """
    device = torch.device(device)
    if device.type != "cuda" or not x.is_cpu:
        return x.to(device)
    # The allocator gives the page-locked copy to others only when the device has read it.
    return x.pin_memory().to(device, non_blocking=True)
