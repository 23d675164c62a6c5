"""PyTorch's own context parallelism, to compare with."""

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROTATE_METHODS = ("allgather", "alltoall")
"""How it moves K and V."""


@contextlib.contextmanager
def torch_context_parallel(mesh, n_tokens: int, method: str):
    """Context in which PyTorch's attention by cuDNN, over shards [1, heads, L, D] in zigzag, is parallel over ``mesh``.

    Args:
        mesh: a DeviceMesh of one dimension.
        n_tokens: of the whole sequence.
        method: one of :data:`ROTATE_METHODS`.
    """
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(method)
    # It wants a tensor to shard; ours are shards already.
    dummy = torch.zeros(1, 1, n_tokens, 1, dtype=torch.float32, device="cuda")
    plain = F.scaled_dot_product_attention
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            with context_parallel(mesh, buffers=[dummy], buffer_seq_dims=[2], no_restore_buffers={dummy}):
                yield
    finally:
        # It leaves its own in place where what runs inside fails.
        F.scaled_dot_product_attention = plain
