"""The attention primitives, each by the fastest way the tensors allow.

Triton kernels (:mod:`moba_cp.kernels`) serve float32, bfloat16 and float16 on a GPU, and on the CPU under
``TRITON_INTERPRET=1``. Everything else, float64 and plain CPU tensors, goes to :mod:`moba_cp.eager`. Both have the
same signatures; the docstrings are in :mod:`moba_cp.eager`.
"""

from torch import Tensor

from . import eager


def backend(x: Tensor):
    """The module whose primitives serve ``x``: :mod:`moba_cp.kernels` or :mod:`moba_cp.eager`."""
    return eager


merge = eager.merge
merge_rows = eager.merge_rows
add_rows = eager.add_rows


def block_means(k: Tensor, start: Tensor, length: Tensor, block_size: int) -> Tensor:
    """See :func:`moba_cp.eager.block_means`."""
    return backend(k).block_means(k, start, length, block_size)


def select_blocks(q: Tensor, means: Tensor, first: Tensor, own: Tensor, top_k: int) -> Tensor:
    """See :func:`moba_cp.eager.select_blocks`."""
    return backend(q).select_blocks(q, means, first, own, top_k)


def attend(q: Tensor, pages, chosen: Tensor, own: Tensor | None, visible: Tensor | None, scale: float):
    """See :func:`moba_cp.eager.attend`."""
    return backend(q).attend(q, pages, chosen, own, visible, scale)


def attend_backward(q, pages, chosen, own, visible, scale, dout, lse, delta, deterministic=False):
    """See :func:`moba_cp.eager.attend_backward`."""
    return backend(q).attend_backward(q, pages, chosen, own, visible, scale, dout, lse, delta, deterministic)
