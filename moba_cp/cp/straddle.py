"""Blocks that lie on several ranks: assembling them on their owners, and block means.

Legend: P ranks, L local tokens, X extra rows (assembled straddling blocks), n blocks, Hkv key/value heads, D head dim.
"""

import torch
from torch import Tensor

from ..blocks import Pages
from ..ops import backend
from .calls import TAG_BYTES, Call
from .comm import Communicator, HostCopy
from .geometry import BlockGeometry


def assemble(k: Tensor, v: Tensor, geometry: BlockGeometry, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Local rows followed by this rank's straddling blocks: k, v [L, Hkv, D] -> [L + X, Hkv, D]; a collective call."""
    if not geometry.straddles:
        return k, v
    local = torch.stack([k, v], 1)
    tails = comm.all_to_all(local[geometry.tail_from], geometry.tail_send, geometry.tail_receive, "tails")()
    extra = local.new_empty(geometry.n_extra, *local.shape[1:])
    extra[geometry.copy_to] = local[geometry.copy_from]
    extra[geometry.tail_to] = tails
    return torch.cat([k, extra[:, 0]]), torch.cat([v, extra[:, 1]])


def assemble_backward(dk: Tensor, dv: Tensor, geometry: BlockGeometry, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`assemble`: dk, dv [L + X, Hkv, D] -> [L, Hkv, D]; a collective call."""
    if not geometry.straddles:
        return dk, dv
    n_local = dk.shape[0] - geometry.n_extra
    grads = torch.stack([dk, dv], 1)
    local, extra = grads[:n_local], grads[n_local:]
    tails = comm.all_to_all(extra[geometry.tail_to], geometry.tail_receive, geometry.tail_send, "tail_gradients")()
    # A row of a straddling block is nowhere else: the gradient in its place is nobody's.
    local[geometry.copy_from] = extra[geometry.copy_to]
    local[geometry.tail_from] = tails
    return local[:, 0], local[:, 1]


def owned_means(k: Tensor, geometry: BlockGeometry, rank: int) -> Tensor:
    """Mean key of each block that ``rank`` owns, and zeros up to the most that any rank owns: [m, Hkv, D] in k's dtype.

    ``k`` [L + X, Hkv, D] and ``geometry`` are that rank's.
    """
    if "owned" not in geometry.tables:
        mine = geometry.owned[rank]
        geometry.tables["owned"] = geometry.row[mine], geometry.length[mine]
    means = backend(k).block_means(k, *geometry.tables["owned"], geometry.block_size)
    widest = max(ids.numel() for ids in geometry.owned)
    if means.shape[0] < widest:
        means = torch.cat([means, means.new_zeros(widest - means.shape[0], *means.shape[1:])])
    return means


def gather_means(k: Tensor, geometry: BlockGeometry, comm: Communicator, call: Call | None = None) -> Tensor:
    """Mean key of every block of the sequence, [n, Hkv, D] in k's dtype; k [L + X, Hkv, D]; a collective call.

    ``call``: what is to be the same on all ranks, which say so by the way.
    """
    means = owned_means(k, geometry, comm.rank)
    if call is None:
        return comm.all_gather(means, "means").flatten(0, 1)[geometry.gathered]
    message = torch.cat([means.view(-1).view(torch.uint8), call.tag(k.device)])
    arrived = comm.all_gather_async(message, "means", uncounted=TAG_BYTES)()
    call.arrive(HostCopy(arrived[:, means.nbytes :]))
    if "gathered" not in geometry.tables:
        count = max(1, means.shape[0])
        geometry.tables["gathered"] = geometry.gathered // count, geometry.gathered % count
    return arrived[:, : means.nbytes].view(k.dtype).unflatten(1, means.shape)[geometry.tables["gathered"]]


def owned_pages(k: Tensor, v: Tensor, geometry: BlockGeometry) -> Pages:
    """Pages of the blocks this rank owns; k, v [L + X, Hkv, D]."""
    n_kv = k.shape[1]
    if ("heads", n_kv) not in geometry.tables:
        geometry.tables["heads", n_kv] = torch.arange(n_kv, device=k.device, dtype=torch.int32)[:, None]
    head = geometry.tables["heads", n_kv].expand(-1, geometry.n_blocks)
    return Pages(k, v, geometry.row.expand(n_kv, -1), head, geometry.length, geometry.block_size)
