"""Triton kernels, in the order in which one attention call runs them.

:mod:`.means` block representatives; :mod:`.select` scores and top-k; :mod:`.routing` which rows visit a block;
:mod:`.forward` their attention; :mod:`.merge` joins partial results; :mod:`.backward` gradients. :mod:`.attend`
launches the last four; :mod:`.tuned` has their tile shapes. The functions below have the signatures of
:mod:`moba_cp.eager`; they serve float32, bfloat16 and float16 on a GPU, and on the CPU under ``TRITON_INTERPRET=1``.
Kernels know no autograd.

Vocabulary: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` tile values, ``s_`` strides,
CAPITALS compile-time constants.
"""

from .attend import attend, attend_backward, index_size
from .means import block_means
from .merge import add_rows, merge, merge_rows, row_sums
from .select import select_blocks

__all__ = [
    "add_rows",
    "attend",
    "attend_backward",
    "block_means",
    "index_size",
    "merge",
    "merge_rows",
    "row_sums",
    "select_blocks",
]
