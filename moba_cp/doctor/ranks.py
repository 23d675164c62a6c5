"""Checks across ranks: what each brings, and how fast bytes go from each to each. All ranks call them together.

Speeds are judged against one another: pairs within a machine against such pairs, pairs between machines against those.
"""

import os
import socket
import statistics
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ..cp.comm import Communicator
from ..cp.symmetric_memory import peer_memory
from ..train.agreement import all_values
from ..train.log import versions
from .finding import Finding, guarded
from .node import CLOCK_SECONDS

_SEEN_SECONDS = 30.0
# A pair, or a rank, that is so much slower than the median is a failure. CPUs of a test share cores and vary.
SLOWEST_PAIR = {"cuda": 0.5, "cpu": 0.02}
SLOWEST_RANK = {"cuda": 1.2, "cpu": 50.0}
PAIR_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}
EXCHANGE_BYTES = {"cuda": (1 << 20, 64 << 20), "cpu": (1 << 16, 1 << 20)}
"""Of a rank's all-to-all: a plan of few blocks, and a stage of many."""
NVLINK_GB = 50.0
"""Less between GPUs of one machine than any NVLink gives."""
NVLINK = ("H100 80GB HBM3", "H200", "A100-SXM", "B200", "GB200")


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    rank: int
    host: str
    gpu: str
    """The GPU's identity; empty on a CPU."""
    title: str
    """The GPU's name; empty on a CPU."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


def check_ranks(device: torch.device, folder: Path) -> list[Finding]:
    """All checks across ranks, the same list on every rank; torch.distributed is started."""
    places = all_values(_place(device))
    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("versions", lambda: same_versions(places)),
        ("clocks", lambda: clocks(places)),
        ("shared files", lambda: shared_files(places, folder)),
        ("skew", lambda: skew(places, device)),
        ("pairs", lambda: pairs(places, device)),
        ("all-to-all", lambda: all_to_all(places, device)),
        ("copy engines", lambda: copy_engines(places, device)),
    ]
    hosts = {place.host for place in places}
    found = [Finding("ranks", True, f"{len(places)} on {len(hosts)} machine{'s' * (len(hosts) > 1)} meet")]
    for name, check in checks:
        mine = guarded(name, check)
        # Every rank has the same finding, unless the check itself failed on some.
        everybody = all_values(mine)
        found += next((one for one in everybody if not all(finding.passed for finding in one)), mine)
    return found


def same_versions(places: list[Place]) -> Finding:
    """Every rank runs the same versions."""
    everybody = all_values(versions())
    first = everybody[0]
    odd = [
        f"{place} has {name} {mine[name]}, rank 0 {first[name]}"
        for place, mine in zip(places, everybody, strict=True)
        for name in first
        if mine[name] != first[name] and name != "platform"
    ]
    text = "; ".join(odd[:4]) or f"torch {first['torch']} and the rest are the same on all"
    return Finding("versions", not odd, text, "use one environment, on a shared file system or in an image")


def clocks(places: list[Place]) -> Finding:
    """The machines' clocks agree."""
    dist.barrier()
    times = all_values(time.time())
    middle = statistics.median(times)
    worst = max(places, key=lambda place: abs(times[place.rank] - middle))
    off = abs(times[worst.rank] - middle)
    return Finding("clocks", off <= CLOCK_SECONDS, f"{worst} is {off:.1f} s off", "synchronize it (chronyc tracking)")


def shared_files(places: list[Place], folder: Path) -> Finding:
    """What rank 0 writes is there for everybody: checkpoints are written by all ranks into one folder."""
    name = all_values(f".moba-cp-doctor-{uuid.uuid4().hex}")[0]
    path, limit = folder / name, time.monotonic() + _SEEN_SECONDS
    if dist.get_rank() == 0:
        path.write_text(name)
    dist.barrier()
    while not (seen := path.exists()) and time.monotonic() < limit:
        time.sleep(0.2)
    blind = [str(place) for place, sees in zip(places, all_values(seen), strict=True) if not sees]
    if dist.get_rank() == 0:
        path.unlink(missing_ok=True)
    text = f"{', '.join(blind[:4])} see another {folder}" if blind else f"{folder} is the same for all"
    return Finding("shared files", not blind, text, "use a folder on a shared file system (--folder, run.directory)")


def skew(places: list[Place], device: torch.device) -> Finding:
    """The same work takes all ranks as long."""
    n, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
    for _ in range(2):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(20):
            torch.mm(a, a)
        _settle(device)
        mine = time.perf_counter() - began
    times = all_values(mine)
    middle, worst = statistics.median_low(times), max(places, key=lambda place: times[place.rank])
    ratio = times[worst.rank] / middle
    text = f"the slowest, {worst}, takes {ratio:.2f} times the median for the same work"
    passed = ratio <= SLOWEST_RANK[device.type] or _shared(places)
    return Finding("skew", passed, text, "look at its clocks, heat and what else runs there")


def pairs(places: list[Place], device: torch.device) -> list[Finding]:
    """Bytes per second from each rank to each other one, all ranks sending to one each at a time."""
    size, rank, nbytes = len(places), dist.get_rank(), PAIR_BYTES[device.type]
    rates = {}
    for shift in range(1, size):
        there, here = (rank + shift) % size, (rank - shift) % size
        send, receive = [0] * size, [0] * size
        send[there], receive[here] = nbytes, nbytes
        seconds = _timed(lambda send=send, receive=receive: _send(device, send, receive), device)
        for source, taken in enumerate(all_values(seconds)):
            rates[source, (source + shift) % size] = nbytes / taken / 1e9
    found = []
    for title, within in (("in a machine", True), ("across", False)):
        kind = {p: rate for p, rate in rates.items() if (places[p[0]].host == places[p[1]].host) is within}
        if kind:
            found.append(_judged_pairs(f"pairs {title}", kind, places, device, within))
    return found or [Finding("pairs", True, "one rank: nothing to send")]


def _judged_pairs(name: str, rates, places: list[Place], device: torch.device, within: bool) -> Finding:
    middle = statistics.median(rates.values())
    source, target = min(rates, key=rates.get)
    least = rates[source, target]
    text = f"median {middle:.2f} GB/s, slowest {least:.2f} from {places[source]} to {places[target]}"
    if _shared(places):
        return Finding(name, True, f"{text}; ranks share a GPU, so speeds mean nothing")
    if least < SLOWEST_PAIR[device.type] * middle:
        return Finding(name, False, text, "look at that link: nvidia-smi nvlink -s, ibstat, ethtool")
    if within and middle < NVLINK_GB and any(part in places[0].title for part in NVLINK):
        return Finding(name, False, text, "NVLink is not used: nvidia-smi topo -m; unset NCCL_P2P_DISABLE")
    return Finding(name, True, text)


def all_to_all(places: list[Place], device: torch.device) -> Finding:
    """Everybody to everybody at once, at the sizes at which the exchange does it; contents are compared too."""
    size, parts, right = len(places), [], True
    for nbytes in EXCHANGE_BYTES[device.type]:
        each = nbytes // size
        x = torch.full((each * size,), dist.get_rank() + 1, dtype=torch.uint8, device=device)
        out = torch.zeros_like(x)
        seconds = max(all_values(_timed(lambda x=x, out=out: dist.all_to_all_single(out, x), device)))
        expected = torch.arange(1, size + 1, dtype=torch.uint8, device=device).repeat_interleave(each)
        right = right and torch.equal(out, expected)
        parts.append(f"{nbytes >> 10} KiB a rank in {1e3 * seconds:.2f} ms ({nbytes / seconds / 1e9:.2f} GB/s)")
    wrong = [str(place) for place, good in zip(places, all_values(right), strict=True) if not good]
    text = f"wrong bytes on {', '.join(wrong)}" if wrong else ", ".join(parts)
    return Finding("all-to-all", not wrong, text, "the network or its driver changes data: take the machine out")


def copy_engines(places: list[Place], device: torch.device) -> Finding:
    """Whether GPUs of one machine read one another's memory, so that copies need no multiprocessors."""
    if device.type != "cuda" or len({p.host for p in places}) > 1 or _shared(places) or len(places) == 1:
        return Finding("copy engines", True, "not for these ranks: they serve GPUs of one machine, one for each rank")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory = peer_memory(Communicator(dist.group.WORLD), device)
    text = "serve" if memory is not None else str(caught[0].message) if caught else "do not serve"
    return Finding("copy engines", memory is not None, text, "let every process see all GPUs of the machine")


def _send(device: torch.device, send: list[int], receive: list[int]) -> None:
    x = torch.empty(sum(send), dtype=torch.uint8, device=device)
    dist.all_to_all_single(torch.empty(sum(receive), dtype=torch.uint8, device=device), x, receive, send)


def _timed(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the quickest of some calls, the first of all left out."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        work()
        _settle(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _place(device: torch.device) -> Place:
    gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if gpu else None
    # NCCL_HOSTID makes ranks of one machine look like several, and is said where it is set.
    host = os.environ.get("NCCL_HOSTID") or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Place(dist.get_rank(), host, str(properties.uuid) if gpu else "", properties.name if gpu else "")


def _shared(places: list[Place]) -> bool:
    """Whether ranks share a GPU."""
    gpus = [place.gpu for place in places if place.gpu]
    return len(set(gpus)) < len(gpus)
