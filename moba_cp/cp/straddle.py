"""Blocks that lie on several ranks: assembling them on their owners, and their gradients' way back.

Legend: P ranks, L local tokens, X extra rows (assembled straddling blocks), Hkv key/value heads, D head dim.
"""

import torch
from torch import Tensor

from .calls import Where
from .comm import Communicator
from .geometry import BlockGeometry


def assemble(k: Tensor, v: Tensor, geometry: BlockGeometry, comm: Communicator, where: Where) -> tuple[Tensor, Tensor]:
    """Local rows followed by this rank's straddling blocks: k, v [L, Hkv, D] -> [L + X, Hkv, D].

    A collective call, for a ``geometry`` in which some rank's block straddles.
    """
    local = torch.stack([k, v], 1)
    tails = comm.all_to_all(local[geometry.tail_from], geometry.tail_send, geometry.tail_receive, "tails", where)()
    extra = local.new_empty(geometry.n_extra, *local.shape[1:])
    extra[geometry.copy_to] = local[geometry.copy_from]
    extra[geometry.tail_to] = tails
    return torch.cat([k, extra[:, 0]]), torch.cat([v, extra[:, 1]])


def assemble_backward(
    dk: Tensor, dv: Tensor, geometry: BlockGeometry, comm: Communicator, where: Where
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`assemble`: dk, dv [L + X, Hkv, D] -> [L, Hkv, D]; a collective call like that."""
    n_local = dk.shape[0] - geometry.n_extra
    grads = torch.stack([dk, dv], 1)
    local, extra = grads[:n_local], grads[n_local:]
    tails = comm.all_to_all(
        extra[geometry.tail_to], geometry.tail_receive, geometry.tail_send, "tail_gradients", where
    )()
    # Attention reads a straddling block's rows in its assembled copy alone: overwrite what lies in their local rows.
    local[geometry.copy_from] = extra[geometry.copy_to]
    local[geometry.tail_from] = tails
    return local[:, 0], local[:, 1]
