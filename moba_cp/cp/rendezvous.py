"""The rendezvous by which the ranks of a group map one another's memory, with keys that are numbered for each group.

PyTorch's symmetric memory numbers the keys of a rendezvous by a counter of the process, not of the group (2.11 and 2.13
do). If some ranks of a group have taken part in one of another group before and others have not, they wait for ever for
different keys. So memory is mapped here for a second process group of the same ranks, whose store counts anew.
"""

import contextlib
import itertools
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

_names = itertools.count()


class RenumberedStore(dist.Store):
    """A store in which the numbers within keys count up from 0, in the order in which they are first used here.

    ``name/7/1`` becomes ``name/0/1`` if no other number came after ``name`` before, the next one ``name/1/...``. Ranks
    that use the same sequence of keys up to their numbers so use the same keys.
    """

    def __init__(self, store: dist.Store, limit: timedelta):
        """``limit``: how long to wait for a key."""
        super().__init__()
        self._store, self._limit = store, limit
        self._numbers: dict[str, dict[str, int]] = {}

    def set(self, key: str, value) -> None:
        """Write a value."""
        self._store.set(self._renumbered(key), value)

    def get(self, key: str) -> bytes:
        """The value of a key, once there is one."""
        self.wait([key])
        return self._store.get(self._renumbered(key))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for keys.

        Raises:
            RuntimeError: they did not come in time.
        """
        self._store.wait([self._renumbered(key) for key in keys], timeout or self._limit)

    def check(self, keys: list[str]) -> bool:
        """Whether there are values for all keys."""
        return self._store.check([self._renumbered(key) for key in keys])

    def add(self, key: str, value: int) -> int:
        """Add to a counter; what it is then."""
        return self._store.add(self._renumbered(key), value)

    def _renumbered(self, key: str) -> str:
        parts = key.split("/")
        for place, part in enumerate(parts):
            if part.isdigit():
                numbers = self._numbers.setdefault("/".join(parts[:place]), {})
                parts[place] = str(numbers.setdefault(part, len(numbers)))
                break
        return "/".join(parts)


class Rendezvous:
    """Maps symmetric memory among the ranks of one group."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, token: str, limit: timedelta):
        """
        Args:
            group: of which ``device``'s backend serves here too; not kept.
            token: equal on all ranks, and never used before with the group's store: keys of an earlier group of the
                same name may still be there.
            limit: how long ranks that have come wait for others.
        """
        from torch._C import _distributed_c10d as c10d

        # Symmetric memory of other kinds asks the group itself for more than its store.
        kind_of = getattr(c10d._SymmetricMemory, "get_backend", None)
        if kind_of is not None and kind_of(device) not in (None, "CUDA"):
            self.name = group.group_name
            return
        # Nothing else holds references to these two.
        prefixed = dist.PrefixStore(f"moba_cp {token}", _get_process_group_store(group))
        self._store = RenumberedStore(prefixed, limit)
        self._group = dist.ProcessGroup(self._store, group.rank(), group.size())
        if group.bound_device_id is not None:
            self._group.bound_device_id = group.bound_device_id
        # Without any backend a group has no name, which a barrier asks for.
        kinds = dist.ProcessGroup.BackendType
        kind = kinds.NCCL if device.type == "cuda" else kinds.GLOO
        self._group._register_backend(device, kind, group._get_backend(device))
        self.name = f"moba_cp copies {next(_names)}"
        """What symmetric memory knows the ranks by; this process's own name for them."""
        c10d._register_process_group(self.name, self._group)
        # Where PyTorch does not look groups up, it is told.
        c10d._SymmetricMemory.set_group_info(self.name, group.rank(), group.size(), self._store)
        weakref.finalize(self, _forget, self.name)

    def map(self, buffer: torch.Tensor):
        """The handle of all ranks' ``buffer``, which PyTorch's ``symmetric_memory.empty`` made; a collective call.

        Raises:
            RuntimeError: the ranks did not come together, or cannot map each other's memory.
        """
        from torch._C._distributed_c10d import _SymmetricMemory

        return _SymmetricMemory.rendezvous(buffer, self.name)


def _forget(name: str) -> None:
    from torch._C import _distributed_c10d as c10d

    # Groups that were destroyed are forgotten already.
    with contextlib.suppress(RuntimeError):
        c10d._unregister_process_group(name)
