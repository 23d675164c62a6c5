"""Joining partial results: attention over disjoint sets of keys, and gradients.

The first result that covers everything is kept as it is; only a second one makes a wide accumulator. So one kernel
call costs nothing more, and several are joined in float32 (float64 for float64 inputs).

Legend: N query rows, Hq query heads, D head dim.
"""

import torch
from torch import Tensor

from ..dtypes import WIDE
from ..eager.attention import finite_lse


class Partials:
    """Attention outputs over disjoint sets of keys, joined by their log-sum-exp."""

    def __init__(self, q: Tensor):
        self._shape, self._wide, self._device = q.shape, WIDE[q.dtype], q.device
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor, rows: slice | Tensor) -> None:
        """Join the result out [n, Hq, D], lse [n, Hq] of ``rows``."""
        if self._out is None:
            if out.shape == self._shape:
                self._out, self._lse = out, lse
                return
            self._out, self._lse = self.result()
        self.widen()
        if self._out.is_cuda and self._wide == torch.float32:
            from ..kernels.merge import merge_partial

            picked = isinstance(rows, Tensor)
            into = (self._out, self._lse) if picked else (self._out[rows], self._lse[rows])
            merge_partial(*into, out, lse, rows if picked else None)
        else:
            _merge_partial(self._out, self._lse, out, lse, rows)

    def widen(self) -> None:
        """Make room for joining now, before the next result takes memory; :meth:`add` would do it."""
        if self._out is not None:
            self._out = self._out.to(self._wide)

    def result(self) -> tuple[Tensor, Tensor]:
        """out [N, Hq, D] in any dtype and lse [N, Hq] wide; 0 and -inf where nothing was seen."""
        if self._out is not None:
            return self._out, self._lse
        out = torch.zeros(self._shape, dtype=self._wide, device=self._device)
        return out, torch.full(self._shape[:2], -torch.inf, dtype=self._wide, device=self._device)


def _merge_partial(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: slice | Tensor) -> None:
    """:func:`moba_cp.kernels.merge.merge_partial` in plain PyTorch, any dtype."""
    joined = torch.logaddexp(lse[rows], part_lse)
    shift = finite_lse(joined)
    old, new = (lse[rows] - shift).exp()[..., None], (part_lse - shift).exp()[..., None]
    out[rows] = out[rows] * old + part * new
    lse[rows] = joined


class Sum:
    """A sum of gradients over rows."""

    def __init__(self, like: Tensor):
        """Sum of the shape of ``like``, the tensor it is the gradient of."""
        self._like = like
        self._first: tuple[Tensor, slice | Tensor] | None = None
        self._total: Tensor | None = None

    def add(self, x: Tensor, rows: slice | Tensor) -> None:
        """Add ``x`` to ``rows``; ``x`` belongs to the sum from now on."""
        if self._first is None and self._total is None:
            self._first = x, rows
        else:
            _add(self._wide(), x, rows)

    def add_to(self, total: Tensor) -> None:
        """Add the sum to ``total``, a wide tensor of its shape, in place."""
        if self._first is not None:
            _add(total, *self._first)
        elif self._total is not None:
            total += self._total

    def write_to(self, total: Tensor) -> None:
        """Write the sum over ``total``, a wide tensor of its shape."""
        if self._alone():
            total.copy_(self._first[0])
        else:
            total.zero_()
            self.add_to(total)

    def narrow(self) -> Tensor:
        """The sum in the dtype of the tensor it is the gradient of."""
        return (self._first[0] if self._alone() else self._wide()).to(self._like.dtype)

    def _alone(self) -> bool:
        """Whether there was one addition, of everything."""
        return self._first is not None and self._first[0].shape == self._like.shape

    def _wide(self) -> Tensor:
        if self._total is None:
            total = torch.empty(self._like.shape, dtype=WIDE[self._like.dtype], device=self._like.device)
            self.write_to(total)
            self._first, self._total = None, total
        return self._total


def _add(total: Tensor, x: Tensor, rows: slice | Tensor) -> None:
    if isinstance(rows, Tensor):
        total.index_add_(0, rows, x.to(total.dtype))
    else:
        total[rows] += x
