"""This rank's query rows: attention of these to blocks wherever they lie."""

from dataclasses import dataclass

from torch import Tensor

from ..blocks import Pages
from ..ops import backend
from .geometry import BlockGeometry


@dataclass(frozen=True)
class Queries:
    """Query rows and the blocks that they see; L local tokens, Hq query heads, D head dim, S = k - 1."""

    q: Tensor
    """[L, Hq, D]."""
    chosen: Tensor
    """[L, Hq, S] int32 block ids, -1 for none; besides its own block a row sees these whole."""
    geometry: BlockGeometry
    scale: float
    index: Tensor | None
    """Of all blocks wherever they lie, see :func:`moba_cp.eager.routing_index`: calls pass over those that their
    storage does not have."""

    @staticmethod
    def of(q: Tensor, chosen: Tensor, geometry: BlockGeometry, scale: float, n_kv: int) -> "Queries":
        """With a new index, for ``n_kv`` KV heads."""
        own, visible = geometry.own, geometry.visible
        index = backend(q).routing_index(q, chosen, own, visible, geometry.somewhere.expand(n_kv, -1))
        return Queries(q, chosen, geometry, scale, index)

    @property
    def _seen(self) -> tuple:
        return self.chosen, self.geometry.own, self.geometry.visible, self.scale

    def attend(self, pages: Pages, kv_heads: slice | None, out: tuple[Tensor, Tensor], **how) -> None:
        """Attention to the blocks in ``pages``; arguments as of :func:`moba_cp.eager.attend`."""
        backend(self.q).attend(self.q, pages, *self._seen, index=self.index, kv_heads=kv_heads, out=out, **how)

    def attend_backward(
        self, pages: Pages, kv_heads: slice, out: tuple[Tensor, Tensor, Tensor], output: "OutputGradient", **how
    ) -> None:
        """Gradients of :meth:`attend`; ``how`` as of :func:`moba_cp.eager.attend_backward`."""
        rows = output.dout, output.lse, output.delta, output.deterministic
        backend(self.q).attend_backward(
            self.q, pages, *self._seen, *rows, index=self.index, kv_heads=kv_heads, out=out, **how
        )


@dataclass(frozen=True)
class OutputGradient:
    """What the backward pass knows of each row's output."""

    dout: Tensor
    """[L, Hq, D]."""
    lse: Tensor
    """[L, Hq] wide, over all that the row sees."""
    delta: Tensor
    """[L, Hq] wide, row sums of dout * out."""
    deterministic: bool
