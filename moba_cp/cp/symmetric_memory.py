"""Memory that the GPUs of a node read from one another: each rank writes its part, and the others copy it.

The GPUs' copy engines make the copies. They leave the multiprocessors to attention, of which NCCL's kernels take some,
and need no send on the other side.
"""

import os
import socket
import uuid
import warnings
import weakref
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Communicator, SideStream, wait_for
from .rendezvous import Rendezvous

# Bytes: what buffers are rounded up to, and the size of the one for barriers.
_ROUND = 1 << 21
_RENDEZVOUS_SECONDS = 60
"""How long ranks that map one another's memory wait for one that does not come; NCCL brings K and V then."""


class MissingMemory(RuntimeError):
    """Some rank has no memory for copies; raised on all ranks."""


def slot_bytes(nbytes: int) -> int:
    """What a slot for ``nbytes`` takes. Sizes differ with the batch: up to a thirty-second more now saves many small
    steps."""
    step = max(_ROUND, 1 << max(0, nbytes.bit_length() - 6))
    return -(-nbytes // step) * step


class PeerMemory:
    """Buffers that all ranks of a group read, and the stream on which their contents move.

    A buffer has several slots, which stages of work, counted over all calls, use in turn. On their streams for copies
    all ranks issue the same in the same order, so after a barrier everything that was copied before it has arrived.
    Hence after the barrier that publishes K and V of a stage no rank reads those of earlier stages any more, and their
    slots may be written; after the barrier that returns the gradients of a stage the same holds for the stage before.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._buffers: dict[str, list[Tensor]] = {}
        self._slots: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        """Stages before each buffer was last asked for."""
        self._side = SideStream()
        self._stages = 0
        self._pass_open = False
        self.barriers = 0
        """Barriers of stages so far."""
        self.generation = 0
        """Counts the buffers that were made, so that users of views of them see when they were replaced."""
        self._released: dict[tuple[str, int], torch.cuda.Event | None] = {}

    @property
    def stages(self) -> int:
        """Stages of work that used it so far."""
        return self._stages

    @property
    def nbytes(self) -> int:
        """Memory that this rank has given; PyTorch's allocator does not count it."""
        return sum(parts[self.rank].nbytes for parts in self._buffers.values())

    def nbytes_since(self, stages: int) -> int:
        """Like :attr:`nbytes`, of the buffers that were used since there had been so many ``stages``."""
        return sum(parts[self.rank].nbytes for name, parts in self._buffers.items() if self._asked[name] >= stages)

    def reserve(self, name: str, slots: int, nbytes: int) -> None:
        """Make the ``slots`` slots of buffer ``name`` at least so large; a collective call, equal on all ranks.

        Raises:
            MissingMemory: on all ranks, if one has no such memory left.
        """
        self._asked[name] = self._stages
        slot = slot_bytes(nbytes)
        if name in self._buffers and self._buffers[name][self.rank].nbytes >= slots * slot:
            return
        if name in self._buffers:
            # No rank may still read what is freed now.
            self._settle()
            del self._buffers[name]
        # Made in inference mode they could not be written to in training.
        with torch.inference_mode(False), torch.no_grad():
            self._buffers[name] = self._allocate(name, slots * slot)
        self._slots[name] = slots
        self.generation += 1

    def open_pass(self, what: str) -> None:
        """The stages of one pass begin; a collective call after a pass that did not end, because something failed.

        Raises:
            RuntimeError: that pass failed at different places on different ranks.
        """
        if self._pass_open:
            self._start_again(what)
        self._pass_open = True

    def close_pass(self) -> None:
        """All its stages were issued."""
        self._pass_open = False

    def _start_again(self, what: str) -> None:
        """Forget a pass that failed; a collective call. A rank that failed alone waits here for the others, who wait
        for it in the pass: the group's timeout ends both."""
        places = self._all_ranks((self._stages, self.barriers))
        if len(set(places)) > 1:
            raise RuntimeError(
                f"{what}: an earlier pass failed after different (stages, barriers) of the ranks, {places}; "
                "all ranks have to start again"
            )
        self._settle()
        self._released.clear()

    def next_stage(self) -> int:
        """The number of the next stage."""
        self._stages += 1
        return self._stages

    def at(self, name: str, stage: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor at the beginning of a stage's slot of a rank's buffer."""
        buffer = self._buffers[name][rank]
        room = buffer.numel() // self._slots[name]
        begin, count = self.slot(name, stage) * room, torch.Size(shape).numel() * dtype.itemsize
        assert count <= room, f"{count} bytes in a slot of {name}, {room}"
        return buffer[begin : begin + count].view(dtype).view(shape)

    def on_copy_stream(self, after: torch.cuda.Event | None):
        """Context of the stream on which contents move, once it has passed ``after``; nothing for None."""
        return self._side.entered(after)

    def slot(self, name: str, stage: int) -> int:
        """The number of a stage's slot of buffer ``name``."""
        return stage % self._slots[name]

    def release(self, name: str, stage: int, after: torch.cuda.Event | None) -> None:
        """The stage needs its slot of this rank's buffer ``name`` no longer, once the device has passed ``after``."""
        self._released[name, self.slot(name, stage)] = after

    def claim(self, name: str, stage: int) -> None:
        """Let the current stream wait until no stage before needs the slot."""
        wait_for(self._released.get((name, self.slot(name, stage))))

    def barrier(self) -> None:
        """All ranks wait for one another on their current streams: what each wrote there before, all can copy after."""
        raise NotImplementedError

    def _allocate(self, name: str, nbytes: int) -> list[Tensor]:
        """[nbytes] uint8 of every rank, as this rank reads it, in place of what had this name; a collective call."""
        raise NotImplementedError

    def _settle(self) -> None:
        """Wait until all ranks have done what they issued."""
        raise NotImplementedError

    def _all_ranks(self, value) -> list:
        """``value`` of every rank; a collective call."""
        raise NotImplementedError


class SymmetricMemory(PeerMemory):
    """By PyTorch's symmetric memory: GPUs of one node that map each other's memory."""

    def __init__(self, group: dist.ProcessGroup, token: str):
        """``token``: equal on all ranks and new, see :class:`.rendezvous.Rendezvous`."""
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        # The table of memories holds groups weakly; a group's memory must not keep it alive.
        self._group = weakref.ref(group)
        self._device = torch.device("cuda", torch.cuda.current_device())
        timeout = group._get_backend(self._device).options._timeout
        self._timeout_ms = int(timeout.total_seconds() * 1000)
        # Views of a buffer do not keep it: this does.
        self._owned: dict[str, tuple] = {}
        # All ranks arrive here at about the same time.
        limit = min(timeout, timedelta(seconds=_RENDEZVOUS_SECONDS))
        self._mapping = Rendezvous(group, self._device, token, limit)
        self._rendezvous("barrier", _ROUND)

    def barrier(self) -> None:
        # A rank that waits in vain ends its process with an error, as NCCL's watchdog does.
        self._owned["barrier"][1].barrier(0, self._timeout_ms)

    def _allocate(self, name: str, nbytes: int) -> list[Tensor]:
        if self._owned.pop(name, None) is not None:
            # Others still map what is to be freed.
            self._settle()
        torch.cuda.empty_cache()
        handle = self._rendezvous(name, nbytes)
        return [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self.size)]

    def _rendezvous(self, name: str, nbytes: int):
        import torch.distributed._symmetric_memory as symmetric_memory

        buffer, error = None, ""
        try:
            buffer = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=self._device)
        except RuntimeError as failure:
            error = _first_line(failure)
        what = f"{nbytes >> 20} MiB for copies between GPUs; exchange copy_engines=False does without"
        _agree(error, self._group(), what)
        handle = None
        try:
            handle = self._mapping.map(buffer)
        except RuntimeError as failure:
            error = _first_line(failure)
        _agree(error, self._group(), what)
        self._owned[name] = buffer, handle
        return handle

    def _settle(self) -> None:
        torch.cuda.synchronize()
        dist.barrier(self._group(), device_ids=[self._device.index])

    def _all_ranks(self, value) -> list:
        return _values_of_all(value, self._group())


_memories: "weakref.WeakKeyDictionary[dist.ProcessGroup, PeerMemory | None]" = weakref.WeakKeyDictionary()


def peer_memory(comm: Communicator, device: torch.device | None = None) -> PeerMemory | None:
    """The group's peer memory; None unless its ranks have different GPUs of one node that map each other's memory, and
    for tensors on a ``device`` that is no GPU.

    A collective call; what the first one finds is kept.
    """
    group = comm.group
    if comm.memory is not None or (device is not None and device.type != "cuda"):
        return comm.memory
    # The trainer's groups have a backend for the CPU too.
    if group is None or dist.get_world_size(group) == 1 or "cuda:nccl" not in dist.get_backend_config(group):
        return None
    if group not in _memories:
        with torch.inference_mode(False), torch.no_grad():
            _memories[group] = _mapped(group)
    return _memories[group]


_in_all_teams: "weakref.WeakKeyDictionary[dist.ProcessGroup, bool]" = weakref.WeakKeyDictionary()


def team_memory(team: Communicator, whole: Communicator, device: torch.device) -> PeerMemory | None:
    """:func:`peer_memory` of one of the teams that make up ``whole``; None unless all of them have it: what moves, and
    among how many ranks, is the same for all. A collective call of ``whole``; what the first one finds is kept."""
    memory = peer_memory(team, device)
    if team.group is None:
        return memory
    if team.group not in _in_all_teams:
        mine = torch.tensor([memory is not None], dtype=torch.int32)
        _in_all_teams[team.group] = bool(whole.gather_on_host(mine).all())
    return memory if _in_all_teams[team.group] else None


def mapped_bytes() -> int:
    """Memory that this process has given to all its groups; PyTorch's allocator does not count it."""
    return sum(memory.nbytes for memory in _memories.values() if memory is not None)


def _mapped(group: dist.ProcessGroup) -> PeerMemory | None:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    everybody = _values_of_all((_host(), str(properties.uuid), uuid.uuid4().hex), group)
    hosts, gpus, tokens = (set(column) for column in zip(*everybody, strict=True))
    if len(hosts) > 1 or len(gpus) < len(everybody):
        return None
    try:
        return _symmetric_memory(group, min(tokens))
    except MissingMemory as failure:
        if dist.get_rank(group) == 0:
            warnings.warn(
                f"the group's GPUs do not map each other's memory, so NCCL brings K and V ({failure}); let every "
                "process see all GPUs of the node (CUDA_VISIBLE_DEVICES), or set exchange copy_engines=False",
                stacklevel=2,
            )
        return None


def _symmetric_memory(group: dist.ProcessGroup, token: str) -> SymmetricMemory:
    memory, error = None, ""
    try:
        memory = SymmetricMemory(group, token)
    except MissingMemory:
        # All ranks know.
        raise
    except (RuntimeError, ImportError, AttributeError, TypeError) as failure:
        error = _first_line(failure)
    _agree(error, group, "memory that all ranks read")
    return memory


def _agree(error: str, group: dist.ProcessGroup, what: str) -> None:
    """Raise :class:`MissingMemory` on all ranks if any of them has an error; a collective call."""
    for rank, why in enumerate(_values_of_all(error, group)):
        if why:
            raise MissingMemory(f"rank {rank}: {why} ({what})")


def _values_of_all(value, group: dist.ProcessGroup) -> list:
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def _first_line(failure: Exception) -> str:
    return str(failure).strip().split("\n")[0] or type(failure).__name__


def _host() -> str:
    """What all processes of one machine, or one container, have in common."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else os.uname().version}"
