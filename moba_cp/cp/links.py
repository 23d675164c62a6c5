"""How fast the links between a group's ranks are: measured once, by all ranks together, or assumed.

Legend: P ranks in nodes of m. *Near* links join ranks of a node, *far* ones nodes.
"""

import math
import time
import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist

from .comm import Communicator

ENOUGH_SECONDS = 0.01
"""A message that takes so long tells a link's speed; longer ones are not sent."""
SIZES = [1 << bits for bits in range(16, 27, 2)]
"""Bytes of the messages, until one takes long enough: 64 KiB to 64 MiB."""


class Links(NamedTuple):
    """Of one rank while all ranks of its node send and receive at once, each in both directions."""

    near_rate: float
    """Bytes per second, each way."""
    far_rate: float
    near_seconds: float
    """That the smallest message takes."""
    far_seconds: float
    """Likewise, between nodes."""


ASSUMED = Links(1.5e11, 2.5e10, 2e-5, 5e-5)
"""NVLink by NCCL's kernels, and a network card of 200 Gbit/s for each rank."""

_measured: "weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, Links]]" = weakref.WeakKeyDictionary()


def links_of(comm: Communicator, per_node: int, device: torch.device, measure: bool) -> Links:
    """The group's links with ``per_node`` ranks on each node; a collective call, which measures the first time.

    What was measured is rounded to a power of two, so that the same program chooses alike from run to run.

    Args:
        device: where messages are.
        measure: False assumes :data:`ASSUMED`; so do ranks that are no processes.
    """
    if not measure or comm.group is None:
        return ASSUMED
    found = _measured.setdefault(comm.group, {})
    if per_node not in found:
        with torch.inference_mode(False), torch.no_grad():
            found[per_node] = _measure(comm, per_node, device)
    return found[per_node]


def _measure(comm: Communicator, per_node: int, device: torch.device) -> Links:
    node, index = divmod(comm.rank, per_node)
    n_nodes = comm.size // per_node

    def in_turn(step: int, of: int, at: int) -> tuple[int, int]:
        return (at + step) % of, (at - step) % of

    near = [node * per_node + i for i in in_turn(1, per_node, index)]
    far = [n * per_node + index for n in in_turn(1, n_nodes, node)]
    numbers: list[float] = []
    for to, source in (near, far) if per_node > 1 else (far,):
        _seconds(comm, to, source, 1, device)
        smallest = min(_seconds(comm, to, source, 1, device) for _ in range(3))
        for size in SIZES:
            seconds = _seconds(comm, to, source, size, device)
            if seconds >= ENOUGH_SECONDS:
                # Something else may have held this one up.
                seconds = min(seconds, *(_seconds(comm, to, source, size, device) for _ in range(2)))
            if seconds >= ENOUGH_SECONDS:
                break
        numbers += [_rounded(size / max(1e-9, seconds - smallest)), _rounded(smallest)]
    if per_node == 1:
        # No rank has a neighbour.
        numbers = numbers * 2
    near_rate, near_seconds, far_rate, far_seconds = numbers
    return Links(near_rate, far_rate, near_seconds, far_seconds)


def _seconds(comm: Communicator, to: int, source: int, n_bytes: int, device: torch.device) -> float:
    """That it takes to send so much to one rank while another sends as much; the most of all ranks."""
    send, receive = [0] * comm.size, [0] * comm.size
    send[to] = receive[source] = n_bytes
    x = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    # All begin together.
    comm.gather_uncounted(x[:1])
    _settle(device)
    began = time.perf_counter()
    comm.all_to_all_uncounted(x, send, receive)
    _settle(device)
    mine = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
    return comm.gather_uncounted(mine.to(device)).max().item()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rounded(number: float) -> float:
    """The nearest power of two."""
    return 2.0 ** round(math.log2(max(number, 1e-9)))
