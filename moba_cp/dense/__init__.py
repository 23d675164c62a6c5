"""Exact causal attention on one device: what full-attention layers compute locally.

Host arithmetic (:mod:`.ranges`) cuts what the rows see into rectangles; a backend (:mod:`.backends`) computes them with
the fastest kernels that can serve; partial results are joined in a wide dtype (:mod:`.sums`).

Legend: N query rows, R key rows, Hq query heads, Hkv key/value heads, D head dim.
Wide means float32, or float64 for float64 inputs.
"""

from torch import Tensor

from .backends import BACKENDS, choose_backend
from .ranges import Ranges, build_ranges
from .sums import Partials, Sum

__all__ = ["BACKENDS", "Partials", "Ranges", "Sum", "attend", "attend_backward", "build_ranges", "choose_backend"]


def attend(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float, backend, into: Partials) -> None:
    """Join the attention of the rows ``q`` to the keys of one storage into ``into``.

    Args:
        q: [N, Hq, D] contiguous.
        k, v: [R, Hkv, D] contiguous.
        ranges: what each row sees of this storage.
        scale: factor of the scores.
        backend: one of :data:`BACKENDS`'s values, see :func:`choose_backend`.
        into: joined results; a row that sees nothing here is left as it is.
    """
    for call in backend.calls(ranges, q.device):
        out, lse = backend.forward(q[call.rows], k[call.keys], v[call.keys], call, scale)
        into.add(out, lse, call.rows)


def attend_backward(q, k, v, ranges, scale, backend, dout, out, lse, dq: Sum, dk: Sum, dv: Sum, deterministic=False):
    """Add the gradients of :func:`attend`, as this storage's part in the attention over all storages.

    Args:
        dout, out: [N, Hq, D] contiguous, the final output and its gradient.
        lse: [N, Hq] wide, log-sum-exp over all keys of the row, in all storages.
        dq, dk, dv: sums of the shapes of q, k, v.
        deterministic: whether to ask the kernels for the same bits from run to run.
    """
    for call in backend.calls(ranges, q.device):
        rows, keys = call.rows, call.keys
        grads = backend.backward(
            q[rows], k[keys], v[keys], call, scale, dout[rows], out[rows], lse[rows], deterministic
        )
        dq.add(grads[0], rows)
        dk.add(grads[1], keys)
        dv.add(grads[2], keys)
