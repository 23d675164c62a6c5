"""All ranks of a group make the same attention calls in the same order: an error on all of them where they do not.

Collectives know nothing of layers. If a rank skips a call, its next call would be matched with another layer's on the
other ranks, and receive that layer's keys. So every MoBA forward appends to the block means, which all ranks gather
anyway, which call it is: a digest of all calls of the group so far, their number, and whether gradients are wanted.
"""

import collections
import hashlib
import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

UNNAMED_LAYER = "an unnamed layer"
"""A layer's name where the model gives none."""

TAG_BYTES = 16
_SHOWN = 96
_WANTED, _GRAD_MODE = 1, 2


class ExchangeError(RuntimeError):
    """A collective failed: another rank left, did not come in time, or made another call."""


class Where(NamedTuple):
    """Which layer a message belongs to, and whether to its backward pass."""

    layer: str
    """whose counters count it"""
    name: str
    """of the pass, in error messages"""

    @staticmethod
    def forward(layer: str) -> "Where":
        """A forward pass."""
        return Where(layer, layer)

    @staticmethod
    def backward(layer: str) -> "Where":
        """A backward pass."""
        return Where(layer, f"the backward of {layer}")


class Ledger:
    """The attention calls that this rank made in one group so far."""

    def __init__(self):
        self.pending: collections.deque[Call] = collections.deque()
        """Calls that were not compared yet with those of the other ranks."""
        self._start = 0
        self.reset()

    def reset(self) -> None:
        """Begin anew, as all ranks do after an error."""
        self.count, self._digest, self._contexts = 0, b"", 0
        self._start += 1
        self.pending.clear()

    def context(self, known: tuple[int, int] | None) -> tuple[int, int]:
        """(reset, number) of a context, by its first call; ``known``: what this returned for it before."""
        if known is not None and known[0] == self._start:
            return known
        self._contexts += 1
        return self._start, self._contexts

    def enter(self, what: tuple) -> int:
        """Record one call; returns the digest of all so far."""
        self.count += 1
        self._digest = hashlib.blake2b(self._digest + repr(what).encode(), digest_size=8).digest()
        return int.from_bytes(self._digest, "little", signed=True)


_ledgers: "weakref.WeakKeyDictionary[dist.ProcessGroup, Ledger]" = weakref.WeakKeyDictionary()


def ledger_of(group: dist.ProcessGroup | None) -> Ledger:
    """The ledger of a group; a new one for None."""
    return Ledger() if group is None else _ledgers.setdefault(group, Ledger())


def agree(comm, signature: dict[str, object]) -> None:
    """Compare what the ranks of a group give its first call, of the context and its first layer: name -> value.

    Tags compare calls only once their block means are here, which another number of heads would not let arrive. Of
    later contexts they have to do: a comparison of their own would meet other calls where a rank leaves one out.

    Raises:
        ExchangeError: on all ranks, with the name and the values that differ.
    """
    if comm.size == 1 or not comm.checks_calls:
        return
    text = {name: str(value) for name, value in signature.items()}
    digests = [hashlib.blake2b(value.encode(), digest_size=8).digest() for value in text.values()]
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)
    every = comm.gather_on_host(mine)
    for (name, value), column in zip(text.items(), (every != every[0]).T, strict=True):
        if not column.any():
            continue
        other, shown = int(column.nonzero()[0]), torch.zeros(_SHOWN, dtype=torch.uint8)
        encoded = value.encode()[:_SHOWN]
        shown[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        values = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in comm.gather_on_host(shown)]
        raise ExchangeError(
            f"rank {comm.rank} of {comm.size}: {name} is {values[other]} on rank {other} but {values[0]} on rank 0; "
            "give every rank of a context the same sequence, layout, options and kinds of layers"
        )


def enter_call(comm, where: Where, *what) -> int:
    """An attention call begins, or its backward pass; ``what`` says more of it, the same on all ranks.

    Returns:
        A digest of all calls so far.

    Raises:
        ExchangeError: by now it is known that an earlier call was not the same on all ranks.
    """
    if comm.size == 1 or not comm.checks_calls:
        return 0
    ledger = comm.calls
    while ledger.pending and ledger.pending[0].look():
        ledger.pending.popleft()
    comm.context_number = ledger.context(comm.context_number)
    return ledger.enter((comm.context_number[1], where.name, *what))


class Call:
    """One MoBA forward, as this rank makes it and as the others do."""

    def __init__(self, comm, what: tuple, wanted: bool, needs_grad: bool):
        """``what``: equal on all ranks; ``wanted``: whether this rank wants gradients of it; ``needs_grad``: whether
        gradients can be wanted of it."""
        self.comm = comm
        # As it is now: a replay's tags are of another call, and may be looked at after the replay.
        self._checked = comm.checks_calls
        self.where = Where.forward(comm.layer)
        self.needs_grad = needs_grad
        digest = enter_call(comm, self.where, "moba", *what)
        self._flags = _WANTED * wanted + _GRAD_MODE * self.needs_grad
        self._mine = digest, comm.calls.count
        self._name = f"the forward of {self.where.name}"
        self._arrived = None
        self._anybody = wanted

    def enter_backward(self) -> Where:
        """Its backward pass begins."""
        where = Where.backward(self.where.layer)
        enter_call(self.comm, where, "moba")
        self.check()
        return where

    def tag(self, device: torch.device) -> Tensor:
        """[TAG_BYTES] uint8, for the others."""
        digest, count = self._mine
        tag = torch.tensor([digest, 4 * count + self._flags], dtype=torch.int64)
        if device.type == "cuda":
            tag = tag.pin_memory().to(device, non_blocking=True)
        return tag.view(torch.uint8)

    def arrive(self, tags) -> None:
        """Take the tags of all ranks, a :class:`.comm.HostCopy` of [P, TAG_BYTES]. Those in memory of the host are
        checked at once; others by :meth:`check`, or once they are here by the call that follows. Where calls are not
        compared, nor is this one later, when they are again."""
        if not self.comm.checks_calls:
            return
        self._arrived = tags
        if tags.ready():
            self.check()
        else:
            self.comm.calls.pending.append(self)

    def check(self) -> None:
        """Wait for the tags and compare them.

        Raises:
            ExchangeError: on all ranks, if they do not make the same call, or if some want gradients of it and others
                cannot have any.
        """
        if self._arrived is None:
            return
        tags = self._arrived.get().contiguous().view(torch.int64).tolist()
        self._arrived = None
        if not self._checked:
            return
        here, count = f"rank {self.comm.rank} of {self.comm.size}", self._mine[1]
        others = {rank: word // 4 for rank, (digest, word) in enumerate(tags) if (digest, word // 4) != self._mine}
        if others:
            self.comm.calls.reset()
            raise ExchangeError(
                f"{here}: its attention call {count}, {self._name}, is another one than that of other ranks (rank: "
                f"call {others}); every rank has to call every layer, in the same order and with equal shapes"
            )
        wanted = [rank for rank, (_, word) in enumerate(tags) if word & _WANTED]
        without = [rank for rank, (_, word) in enumerate(tags) if not word & _GRAD_MODE]
        if wanted and without:
            self.comm.calls.reset()
            raise ExchangeError(
                f"{here}: ranks {wanted} want gradients of {self._name}, but ranks {without} compute it in "
                "torch.no_grad or inference mode, so that there is no backward pass there; do the same on all ranks"
            )
        self._anybody = bool(wanted)

    def anybody_wants(self) -> bool:
        """Whether some rank wants gradients; waits for the tags."""
        self.check()
        return self._anybody

    def look(self) -> bool:
        """:meth:`check` if that does not wait; whether it is done."""
        if self._arrived is not None and self._arrived.ready():
            self.check()
        return self._arrived is None
