"""Full attention across ranks by a ring: shards of K and V travel from rank to rank while they are computed with.

Two shards are in memory besides the local one: the one computed with, which is also being sent on, and the one being
received. A shard travels only as far as somebody sees it. In the backward pass its gradients travel behind it, in
float32 (float64 for float64 inputs), and the last rank that saw it sends them home.

Legend: L local tokens, P ranks, Hq query heads, Hkv key/value heads, D head dim. Step ``t`` deals with the shard of
rank ``(rank - t) % P``; ``hops[p]`` is how far the shard of rank p travels.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from ... import dense
from ...dtypes import WIDE
from ..calls import Where
from ..comm import Communicator
from ..context import CPContext
from .schedule import schedule_of


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cp: CPContext, backend: str, deterministic: bool, where: Where
):
    """out [L, Hq, D] in any dtype, lse [L, Hq] wide, of q [L, Hq, D], k, v [L, Hkv, D]; a collective call."""
    schedule, partials = schedule_of(cp), dense.Partials(q)
    for source, k_shard, v_shard in _shards(k, v, schedule.hops, cp.comm, where):
        ranges = schedule.ranges(source)
        kernels = dense.choose_backend(q, ranges, backend, deterministic)
        if ranges.rectangles and source != cp.rank:
            partials.widen()
        dense.attend(q, k_shard, v_shard, ranges, scale, kernels, partials)
        # Or the shard would live on while the next but one is received.
        del k_shard, v_shard
    return partials.result()


def backward(q, k, v, dout, out, lse, scale: float, cp: CPContext, backend: str, deterministic: bool, where: Where):
    """dq [L, Hq, D], dk, dv [L, Hkv, D] in any dtype; dout, out like q, lse [L, Hq] wide; a collective call."""
    schedule, dq = schedule_of(cp), dense.Sum(q)
    gradients = _GradientRing(k, schedule.hops, cp.comm, where)
    for source, k_shard, v_shard in _shards(k, v, schedule.hops, cp.comm, where):
        ranges = schedule.ranges(source)
        kernels = dense.choose_backend(q, ranges, backend, deterministic)
        dk, dv = dense.Sum(k_shard), dense.Sum(v_shard)
        dense.attend_backward(q, k_shard, v_shard, ranges, scale, kernels, dout, out, lse, dq, dk, dv, deterministic)
        gradients.pass_on(dk, dv)
        del k_shard, v_shard
    dk, dv = gradients.at_home()
    return dq.narrow(), dk, dv


def _shards(
    k: Tensor, v: Tensor, hops: list[int], comm: Communicator, where: Where
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(source, K, V) of every step, [L, Hkv, D], or [0, Hkv, D] where the shard does not come; a collective call.

    The next shard is on its way while the caller computes with this one.
    """
    rank, size, n_local = comm.rank, comm.size, k.shape[0]
    wait: Callable[[], tuple[Tensor, ...]] = tuple
    for step in range(max(hops) + 1):
        if step:
            k, v = wait()
        if step < max(hops):
            send, receive = [0] * size, [0] * size
            send[(rank + 1) % size] = k.shape[0] if hops[(rank - step) % size] > step else 0
            receive[rank - 1] = n_local if hops[(rank - step - 1) % size] > step else 0
            rows = sum(send)
            wait = comm.all_to_all((k[:rows], v[:rows]), send, receive, "full_kv", where)
        yield (rank - step) % size, k, v


class _GradientRing:
    """Gradients of the shards, following them one step behind."""

    def __init__(self, k: Tensor, hops: list[int], comm: Communicator, where: Where):
        self._k, self._hops, self._comm, self._where = k, hops, comm, where
        self._step = 0
        self._arrive: Callable[[], None] | None = None
        self._earlier: Tensor | None = None
        self._home: Tensor | None = None

    def pass_on(self, dk: dense.Sum, dv: dense.Sum) -> None:
        """Add this rank's gradients of the current shard to earlier ranks' and send them on; a collective call."""
        rank, size, step, hops = self._comm.rank, self._comm.size, self._step, self._hops
        source, following = (rank - step) % size, (rank - step - 1) % size
        n_local = self._k.shape[0]
        self._receive()
        grads, self._earlier = self._earlier, None
        if grads is None:
            rows = n_local if hops[source] >= step else 0
            grads = self._k.new_empty(rows, 2, *self._k.shape[1:], dtype=WIDE[self._k.dtype])
            dk.write_to(grads[:, 0])
            dv.write_to(grads[:, 1])
        else:
            dk.add_to(grads[:, 0])
            dv.add_to(grads[:, 1])
        self._step += 1
        if step == 0 and hops[rank] == 0:
            self._home, grads = grads, grads[:0]
        if max(hops) == 0:
            return
        send, receive = [0] * size, [0] * size
        send[(rank + 1) % size if hops[source] > step else source] = grads.shape[0]
        # Gradients of the next step's shard come from the rank before, one's own from the last that saw them.
        follows, returns = hops[following] > step, step > 0 and hops[rank] == step
        before, last = (rank - 1) % size, (rank + step) % size
        receive[before] += n_local * follows
        receive[last] += n_local * returns
        wait = self._comm.all_to_all(grads, send, receive, "full_kv_gradients", self._where)

        def arrive() -> None:
            parts = wait().split(receive)
            self._earlier = parts[before] if follows else None
            self._home = parts[last] if returns else self._home

        self._arrive = arrive

    def at_home(self) -> tuple[Tensor, Tensor]:
        """dk, dv [L, Hkv, D] of this rank's shard, wide, summed over the ranks in ring order; after the last step."""
        self._receive()
        return self._home[:, 0], self._home[:, 1]

    def _receive(self) -> None:
        if self._arrive is not None:
            self._arrive()
            self._arrive = None
