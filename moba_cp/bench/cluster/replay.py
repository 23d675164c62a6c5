"""A communicator that can play back what its collectives returned: a real rank computes, and nothing is sent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cp.comm import Communicator, subgroup

# Messages whose results the receiver changes in place: each replay must hand out a new copy of these.
_CHANGED = ("full_kv_gradients",)


@dataclass
class _Message:
    what: str
    kept: tuple[Tensor, ...]
    given: tuple[Tensor, ...]
    """What is handed out: ``kept`` itself, or copies that may be changed."""
    single: bool
    """One tensor was received, not several together."""


class ReplayCommunicator(Communicator):
    """A :class:`Communicator` that within :meth:`recording` keeps what one pass receives, and within :meth:`replaying`
    gives it back at once, so that a pass computes what it did when messages were really sent.

    What copy engines bring is kept and given back likewise: a replayed pass neither waits for the other ranks nor reads
    their memory. But it writes its own, which they read: all of them must have done what they issued when a replay
    begins, and when the next pass begins after it.
    """

    def __init__(self, group):
        super().__init__(group)
        self._tape = self
        """Whose messages, in the order in which a pass asks for them, are these ranks' too: that of the group."""
        self._messages: list[_Message | None] = []
        self._mode, self._next = "live", 0
        self.handed_bytes = 0
        """Memory that a recording of the passes since this was 0 would have taken."""

    def _part(self, ranks: range) -> Communicator:
        part = super()._part(ranks)
        part._tape = self
        return part

    def _made(self, ranks: range) -> Communicator:
        return ReplayCommunicator(subgroup(self.group, ranks))

    @property
    def checks_calls(self) -> bool:
        """Others make other passes during a replay, or none."""
        return self._tape._mode != "replay"

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the collectives of the one pass within this context return."""
        self.forget()
        self._mode = "record"
        try:
            yield
        finally:
            self._mode = "live"

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Play the recorded pass, or its beginning, once."""
        self._mode, self._next = "replay", 0
        for message in self._messages:
            if message.given is not message.kept:
                for given, kept in zip(message.given, message.kept, strict=True):
                    given.copy_(kept)
        try:
            yield
        finally:
            self._mode = "live"

    def gather_uncounted(self, x: Tensor) -> Tensor:
        """Never recorded: a group's first call compares what the ranks give it, and a replay does not ask again."""
        with self._live():
            return super().gather_uncounted(x)

    def all_to_all_uncounted(
        self, x: Tensor, send: list[int] | None = None, receive: list[int] | None = None
    ) -> Tensor:
        """Never recorded: by such messages a group measures its links, once."""
        with self._live():
            return super().all_to_all_uncounted(x, send, receive)

    @contextmanager
    def _live(self) -> Iterator[None]:
        mode, self._tape._mode = self._tape._mode, "live"
        try:
            yield
        finally:
            self._tape._mode = mode

    def forget(self) -> None:
        """Free what was recorded."""
        if self._messages and torch.cuda.is_available():
            # The communication stream may still read it, and the allocator knows nothing of that.
            torch.cuda.synchronize()
        self._messages.clear()

    @property
    def kept_bytes(self) -> int:
        """Memory that the recording takes."""
        return sum(_nbytes(m.kept) + (_nbytes(m.given) if m.given is not m.kept else 0) for m in self._messages)

    def _guarded(self, what: str, start: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
        tape = self._tape
        if tape._mode == "replay":
            message = tape._messages[tape._next]
            tape._next += 1
            assert message.what == what, f"the pass asks for {what} where {message.what} was recorded"
            return lambda: message.given[0] if message.single else message.given
        wait, copies = super()._guarded(what, start), 1 + what.startswith(_CHANGED)
        if tape._mode == "live":

            def counted():
                out = wait()
                tape.handed_bytes += copies * _nbytes(_tensors(out))
                return out

            return counted
        place = len(tape._messages)
        tape._messages.append(None)

        def recorded():
            out = wait()
            kept = tuple(x.clone() for x in _tensors(out))
            given = tuple(x.clone() for x in kept) if copies > 1 else kept
            tape._messages[place] = _Message(what, kept, given, isinstance(out, Tensor))
            return out

        return recorded


def _tensors(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


def _nbytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.nbytes for x in tensors)
