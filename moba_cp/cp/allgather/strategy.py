"""MoBA attention where all K and V come to every rank, some heads at a time: stages of whole heads.

Where nearly everything is needed anyway, this needs no plan, and a stage has all blocks in one storage: outputs and dQ
are written once, in their dtype, and so are dK and dV by the sums of all ranks' shares. While a stage is computed, K
and V of the next one, or with copy engines of the next two, arrive, and the gradients of the one before return.

Between GPUs that map each other's memory (:mod:`..symmetric_memory`) copy engines move it all, and only what a rank's
queries can see. Elsewhere it is an all-gather and an all-to-all.

Legend: P ranks, L local tokens, X extra rows, W most rows (local and extra) of any rank, Hq query heads, Hkv key/value
heads, H KV heads of a stage, D head dim, n blocks. A rank's *slab* of a stage is [H * W, 2, D], K beside V: first the
rows before the geometry's cut, head by head, then the others. A *storage* is the slabs of all ranks.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..comm import used_here, wait_for
from ..context import CPContext
from ..queries import OutputGradient, Queries
from ..symmetric_memory import MissingMemory
from .costs import GatherCosts
from .stages import SLOTS, CollectiveStage, Layer, PeerStage, Stage

# K and V of the whole sequence in a stage: copies take most of a millisecond, and memory of a few such stages stays. On
# four GPUs attention takes as long forward, and twice that backward; a host starts a stage in less.
STAGE_BYTES = 256 << 20


def heads_of_stages(n_kv: int, stages: int, head_bytes: int) -> list[slice]:
    """KV heads of each stage: in ``stages`` stages, or in more where K and V of one would take over STAGE_BYTES.

    Long stages have a half before and a half behind: nothing hides how the first one's K and V come in backward, nor
    how the last one's gradients return.

    Args:
        head_bytes: of K and V of the whole sequence, one head.
    """
    most = max(1, min(n_kv // stages, STAGE_BYTES // head_bytes))
    edge = most // 2 if most < n_kv and 2 * most * head_bytes > STAGE_BYTES else 0
    middle = n_kv - 2 * edge
    n_middle = -(-middle // most)
    cuts = [0, *(edge + middle * i // n_middle for i in range(n_middle + 1)), n_kv]
    return [slice(begin, end) for begin, end in zip(cuts[:-1], cuts[1:], strict=True) if begin < end]


class Gathering:
    """What the calls of one layer, forward and backward, have in common."""

    def __init__(self, k: Tensor, cp: CPContext, block_size: int):
        """``k`` [L, Hkv, D]."""
        geometry, options, memory = cp.geometry(block_size), cp.exchange, cp.peers
        _, n_kv, dim = k.shape
        self.costs = GatherCosts(geometry, n_kv, dim, k.dtype, options, memory is not None)
        head_bytes = len(geometry.owned) * geometry.widest * 2 * dim * k.dtype.itemsize
        heads = heads_of_stages(n_kv, options.stages, head_bytes)
        self.layer = Layer(cp.comm, geometry, memory, heads, dim, k.dtype, options.wire_dtype(k.dtype))
        self._keep = options.keep
        self._kept: list[Tensor] = []
        self._task_cache: dict = {}
        """What attention to the stages of a pass has in common."""
        self._returning: Callable[[], torch.cuda.Event | None] | None = None
        self._summed: torch.cuda.Event | None = None

    def stages(
        self, k_rows: Tensor, v_rows: Tensor, backward: bool, differentiated: bool = True, kept: Sequence[Tensor] = ()
    ) -> Iterator[Stage]:
        """The stages, in turn; a collective call, which starts the first ones at once. While one is computed the next
        ones' storages arrive. All have to be taken: the pass ends with the last.

        Args:
            k_rows, v_rows: [L + X, Hkv, D].
            backward: whether forward was before.
            differentiated: forward will be followed by backward.
            kept: of :meth:`take_kept` after forward: what was kept does not travel again.

        Raises:
            RuntimeError: an earlier pass failed on this rank, or a rank has no memory for copies.
        """
        layer, comm, memory = self.layer, self.layer.comm, self.layer.memory
        if memory is not None:
            rows = comm.size * max(h.stop - h.start for h in layer.heads) * layer.geometry.widest
            memory.open_pass(f"rank {comm.rank} in {comm.direction}{comm.layer}")
            try:
                memory.reserve("kv", SLOTS["kv"], rows * 2 * layer.dim * layer.dtype.itemsize)
                if differentiated:
                    # Before activations fill what is left.
                    memory.reserve("gradients", SLOTS["gradients"], rows * 2 * layer.dim * layer.wire.itemsize)
            except MissingMemory:
                # All ranks know, and nothing has begun.
                memory.close_pass()
                raise
        self._returning, self._task_cache, self._kept = None, {}, []
        kind = CollectiveStage if memory is None else PeerStage
        ready = comm.mark(k_rows)
        with (memory or comm).beside(ready):
            used_here(k_rows, v_rows)

        def begin(number: int) -> Stage:
            stage = kind(layer, layer.heads[number])
            stage.begin(k_rows, v_rows, ready, kept[number] if kept else None)
            return stage

        ahead = [begin(number) for number in range(min(kind.ahead, len(layer.heads)))]
        return self._in_turn(ahead, begin, self._keep and differentiated and not backward)

    def take_kept(self) -> list[Tensor]:
        """Storages of all stages of forward that are to serve backward too, none if they are to travel again; they
        are the caller's from now on."""
        kept, self._kept = self._kept, []
        return kept

    def attend(self, stage: Stage, rows: Queries, out: tuple[Tensor, Tensor], overwrite_out: bool) -> None:
        """Attention to a stage's heads.

        Args:
            stage: of :meth:`stages`.
            out: out [L, Hq, D] and lse [L, Hq], see :func:`moba_cp.eager.attend`.
            overwrite_out: ``out`` holds nothing yet; otherwise it holds the attention to this rank's blocks.
        """
        rows.attend(
            stage.pages(with_own=overwrite_out),
            stage.heads,
            out,
            overwrite_out=overwrite_out,
            task_cache=self._task_cache,
        )

    def attend_backward(
        self, stage: Stage, rows: Queries, output: OutputGradient, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Gradients of a stage's heads; a collective call.

        Args:
            stage: of :meth:`stages`, which are to come here in turn.
            dq: [L, Hq, D], written in its dtype.
            dk, dv: [L + X, Hkv, D], written once :meth:`wait` was called.
        """
        grads = stage.gradients()

        def dkdv_done() -> None:
            self._sum_up()
            self._returning = stage.give_back(grads, dk, dv)

        out = dq, grads[:, :1], grads[:, 1:]
        how = dict(overwrite_dkv=True, overwrite_dq=True, dkdv_done=dkdv_done, task_cache=self._task_cache)
        rows.attend_backward(stage.pages(with_own=True), stage.heads, out, output, **how)

    def wait(self) -> None:
        """Let the current stream wait for dK and dV of all stages."""
        self._sum_up()
        wait_for(self._summed)

    def _sum_up(self) -> None:
        """Issue the sums of the stage before, whose shares have been on their way for a while."""
        if self._returning is not None:
            self._summed, self._returning = self._returning(), None

    def _in_turn(self, ahead: list[Stage], begin: Callable[[int], Stage], keep: bool) -> Iterator[Stage]:
        for number in range(len(self.layer.heads)):
            stage = ahead.pop(0)
            if keep:
                self._kept.append(stage.storage().clone())
            yield stage
            stage.finish()
            if number + stage.ahead < len(self.layer.heads):
                ahead.append(begin(number + stage.ahead))
        self._task_cache = {}
        if self.layer.memory is not None:
            self.layer.memory.close_pass()
