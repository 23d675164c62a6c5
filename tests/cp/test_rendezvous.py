"""Ranks of groups of different sizes meet to map one another's memory."""

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from moba_cp.cp.rendezvous import Rendezvous, RenumberedStore
from tests.helpers.distributed import TIME_SCALE, run_ranks

LIMIT = timedelta(seconds=20 * TIME_SCALE)
SHORT = timedelta(seconds=1)


def test_numbers_in_keys_count_from_zero():
    inner = dist.HashStore()
    store = RenumberedStore(inner, SHORT)
    # Through a store of C++, as PyTorch uses it.
    outer = dist.PrefixStore("outer", store)
    for number, value in ((7, b"a"), (9, b"b"), (7, b"c")):
        outer.set(f"name/{number}/1", value)
    outer.set("other/3/1", b"d")
    outer.set("no number", b"e")
    values = ("outer/name/0/1", b"c"), ("outer/name/1/1", b"b"), ("outer/other/0/1", b"d"), ("outer/no number", b"e")
    for key, value in values:
        assert inner.get(key) == value
    assert outer.get("name/9/1") == b"b" and outer.check(["name/7/1"]) and not outer.check(["name/7/2"])
    assert outer.add("count/5", 2) == 2 and outer.add("count/6", 1) == 1 and outer.add("count/5", 1) == 3


def test_waiting_ends_in_an_error():
    store = dist.PrefixStore("outer", RenumberedStore(dist.HashStore(), SHORT))
    for wait in (lambda: store.get("name/0/1"), lambda: store.wait(["name/0/1"])):
        with pytest.raises(RuntimeError):
            wait()


def _as_pytorch_does(numbers, name: str, value: str) -> list[str]:
    """What all ranks of a group gave, by a counter of this process."""
    group = c10d._resolve_process_group(name)
    store, number = dist.PrefixStore("", group.get_group_store()), next(numbers)
    store.set(f"CUDASymmetricMemory/{number}/{group.rank()}", value)
    keys = [f"CUDASymmetricMemory/{number}/{rank}" for rank in range(group.size())]
    store.wait(keys)
    return [store.get(key).decode() for key in keys]


def _in_groups(rank):
    """Values that meet in a group of one, of two, of all, and again."""
    # As many messages as other libraries have sent.
    numbers = itertools.count(5 * rank)
    groups = [dist.new_group(ranks) for ranks in ([0], [0, 1], [2, 3], [0, 1, 2, 3])]
    mine = [group for group in groups if dist.get_rank(group) >= 0]
    met = []
    meetings = [Rendezvous(group, torch.device("cpu"), "token", LIMIT) for group in mine]
    for number in range(2):
        for meeting in meetings:
            for message in range(3):
                met.append(_as_pytorch_does(numbers, meeting.name, f"{number} {message} {rank}"))
    names = [meeting.name for meeting in meetings]
    del meeting, meetings
    for name in names:
        with pytest.raises(RuntimeError):
            c10d._resolve_process_group(name)
    assert [group.group_name for group in mine] and dist.group.WORLD.size() == 4
    dist.barrier(mine[-1])
    return met


def test_groups_of_different_sizes_meet():
    everybody = run_ranks(4, _in_groups)
    for rank, met in enumerate(everybody):
        groups = [[0]] * (rank == 0) + [[0, 1] if rank < 2 else [2, 3], [0, 1, 2, 3]]
        expected = [
            [f"{number} {message} {other}" for other in group]
            for number in range(2)
            for group in groups
            for message in range(3)
        ]
        assert met == expected
