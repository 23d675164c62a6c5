"""The share of each rank in the sequences of a step.

A label is the next token of its document, wherever that token lies, so a token at the edge of a shard has the label
that it has on one rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ..cp.comm import Communicator
from ..cp.context import CPContext
from ..data.packing import PackedSequence
from ..host import to_device
from ..model.loss import IGNORED_LABEL
from .mesh import Mesh
from .plan import RunPlan


@dataclass(frozen=True)
class MicroBatch:
    """One sequence as this rank sees it; L tokens of it are here."""

    context: CPContext
    tokens: Tensor
    """[L] int64."""
    labels: Tensor
    """[L] int64, IGNORED_LABEL where a token has none."""

    def label_count(self) -> Tensor:
        """Labels of this rank; scalar int64."""
        return (self.labels != IGNORED_LABEL).sum()


class Batches:
    """Training and validation batches of one rank."""

    def __init__(self, plan: RunPlan, mesh: Mesh):
        self.plan, self.mesh = plan, mesh
        self.comm = Communicator(mesh.context_group)
        self._training, self._validation = plan.training_sequences, plan.validation_sequences

    def training(self, step: int) -> Iterator[MicroBatch]:
        """This rank's share of step ``step`` (1, 2, ...); all data ranks get equally many."""
        per_step = self.plan.config.data.sequences_per_step
        first = (step - 1) * per_step
        for index in range(first + self.mesh.data_rank, first + per_step, self.mesh.data_size):
            yield self._micro_batch(self._training.sequence(index))

    def validation(self, observer: Callable | None = None) -> Iterator[MicroBatch]:
        """This rank's share of the validation sequences; all data ranks get equally many. ``observer`` is called with
        the blocks selected in the first of them."""
        if self._validation is None:
            return
        count = min(self.plan.config.data.validation_sequences, self._validation.per_epoch)
        for first in range(0, count, self.mesh.data_size):
            index = first + self.mesh.data_rank
            batch = self._micro_batch(
                self._validation.sequence(min(index, count - 1)), observer if first == 0 else None
            )
            if index >= count:
                # All ranks must take part in each forward pass (collectives): without labels this one adds nothing.
                batch.labels.fill_(IGNORED_LABEL)
            yield batch

    def _micro_batch(self, sequence: PackedSequence, observer: Callable | None = None) -> MicroBatch:
        """What this rank holds of a sequence; nothing else of it is read."""
        sequence = self.plan.fit(sequence)
        context = CPContext(
            self.comm,
            layout=self.plan.config.attention.layout,
            seq_len=len(sequence),
            cu_seqlens=sequence.cu_seqlens,
            device=self.mesh.device,
            exchange=self.plan.config.exchange,
            observer=observer,
        )
        tokens, labels = sequence.read(context.segments[context.rank])
        self.plan.check_tokens(tokens)
        # The host does not wait for what the device computes meanwhile.
        tokens, labels = (to_device(x, self.mesh.device) for x in (tokens, labels))
        return MicroBatch(context, tokens, labels)
