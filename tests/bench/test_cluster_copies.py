"""``moba-cp bench cluster`` where ranks read one another's memory: ranks that are threads."""

import pytest
import torch

from moba_cp.bench.cluster import measure
from moba_cp.bench.cluster.measure import Layer, Limits, overlap
from moba_cp.bench.cluster.modes import DEFAULT_MODES, shares_heads
from moba_cp.bench.cluster.predict import predictions
from moba_cp.bench.cluster.ranks import Ranks
from moba_cp.bench.cluster.replay import ReplayCommunicator
from moba_cp.cp.allgather import costs as gather_costs
from moba_cp.cp.comm import HostCopy
from tests.bench.test_cluster import CPU, shape
from tests.helpers.distributed import ThreadCommunicator, run_threads


class Twin(ThreadCommunicator):
    """A second communicator of the same thread, with the same memory."""

    def __init__(self, comm: ThreadCommunicator):
        super().__init__(comm.rank, comm.size, comm._board, comm._barrier, comm._turn)
        self.memory = comm.memory


class ThreadReplay(ReplayCommunicator, Twin):
    """Records and plays back what threads bring one another."""

    def _made(self, ranks):
        return ThreadReplay(ThreadCommunicator._made(self, ranks))


class ThreadRanks(Ranks):
    """Ranks that are threads."""

    def __init__(self, comm: ThreadCommunicator):
        self.rank, self.size = comm.rank, comm.size
        self.device, self.on_gpu, self.sizes = CPU, False, [comm.size]
        self._comm = comm

    def group(self, size):
        return self._comm

    def barrier(self):
        self._comm._meet()

    def gathered(self, value, size):
        return self._comm._swap(value)

    def _reduced(self, number, size, operation):
        numbers = self.gathered(number, size)
        return max(numbers) if operation == torch.distributed.ReduceOp.MAX else sum(numbers)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setattr(measure, "ReplayCommunicator", ThreadReplay)


def _same(candidate, wanted) -> bool:
    return all(torch.equal(a, b) for a, b in zip(candidate.results(), wanted, strict=True))


def _without_communication(comm, modes=DEFAULT_MODES):
    """By mode: whether results equal the real ones, meetings and bytes of passes, and the row of the measurement."""
    ranks = ThreadRanks(comm.share_memory())
    layer = Layer(shape(kv_heads=4), 192 * comm.size, comm.size, ranks)
    memory, report = layer.comm.memory, {}
    for mode in modes:
        if not shares_heads(mode, layer.shape, comm.size):
            continue
        candidate = layer.moba(mode)
        candidate.results()
        layer.comm.handed_bytes = 0
        with layer.comm.recording():
            wanted = candidate.results()
        kept, handed, met = layer.comm.kept_bytes, layer.comm.handed_bytes, memory.barriers
        candidate.results()
        expected, met = layer.comm.handed_bytes - handed, (met, memory.barriers)
        ranks.settle(comm.size)
        same = []
        # One rank after the other, which meets nobody; nothing is read from any memory but what was recorded.
        for alone in range(comm.size):
            for _ in range(2 if comm.rank == alone else 0):
                for buffers in memory._buffers.values():
                    buffers[comm.rank].fill_(255)
                with layer.comm.replaying():
                    same.append(_same(candidate, wanted))
            ranks.barrier()
        met += (memory.barriers,)
        # Slots go on in turn as if nothing had happened.
        same.append(_same(candidate, wanted))
        layer.comm.forget()
        report[mode] = same, (kept, expected), met, overlap(layer, candidate, Limits(2, 1e9))
    return report


@pytest.mark.parametrize("size", [2, 3])
def test_a_replay_equals_the_real_pass(size, monkeypatch):
    monkeypatch.setattr(gather_costs, "COPY_RATE", 1e20)
    for report in run_threads(size, _without_communication):
        for mode, (same, (kept, expected), (before, live, replayed), row) in report.items():
            assert same == [True] * 3, mode
            assert kept == expected > 0, "a recording takes what is said before it is made"
            assert (live > before) == (mode in ("auto", "allgather", "heads")), "copies are made where they should be"
            assert replayed == live, "a replay meets somebody"
            assert row.off_error == 0 and row.off_both > 0 and not row.note, mode


def test_a_replay_of_teams_equals_the_real_pass():
    """What ranks with the same heads bring one another is played back with the rest, in its place."""
    for report in run_threads(4, _without_communication, ["kv-heads2", "allgather-heads2"]):
        assert len(report) == 2
        for mode, (same, (kept, expected), _, row) in report.items():
            assert same == [True] * 3 and kept == expected > 0, mode
            assert row.off_error == 0 and not row.note, mode


def _counted(comm, n_tokens, modes):
    """By mode: GB measured and predicted, and whether it used the memory that all read."""
    layer = Layer(shape(), n_tokens, comm.size, ThreadRanks(comm.share_memory()))
    memory, used = layer.comm.memory, {}
    candidates = [layer.moba(mode) for mode in modes]
    for mode, candidate in zip(modes, candidates, strict=True):
        stages = memory.stages
        candidate.results()
        used[mode] = memory.stages > stages
    rows = measure.measure(layer, "attention", candidates, Limits(1, 1e9), lambda name: 0.0)
    predicted = predictions(layer, modes)
    return {
        mode: (row.received_gb, predicted[row.name].predicted_gb, used[mode])
        for mode, row in zip(modes, rows, strict=True)
    }


@pytest.mark.parametrize("rate", [1e6, 1e20], ids=["slow copies", "fast copies"])
@pytest.mark.parametrize("size", [2, 4])
def test_predicted_bytes_are_those_counted(size, rate, monkeypatch):
    monkeypatch.setattr(gather_costs, "COPY_RATE", rate)
    modes = ["auto", "auto-nccl", "kv", "kv-rounded", "allgather", "allgather-rounded-keep", "allgather-nccl"]
    modes += ["heads", "heads-keep", "heads-nccl"]
    for report in run_threads(size, _counted, 256 * size, modes):
        for mode, (measured, predicted, used) in report.items():
            gathers = mode.startswith(("allgather", "heads")) or (mode == "auto" and rate > 1e9)
            # Requests carry headers, which are not predicted.
            assert measured == pytest.approx(predicted, rel=1e-9 if gathers else 0.02), mode
            assert used == (mode in ("auto", "allgather", "allgather-rounded-keep", "heads", "heads-keep")), mode
        assert report["allgather"][0] < report["allgather-nccl"][0]
        assert report["allgather"][1] < report["allgather-nccl"][1]


class OnTwoNodes(ThreadReplay):
    """What a launcher says of ranks on two nodes."""

    def ranks_per_node(self):
        return self.size // 2


def _on_two_nodes(comm):
    layer = Layer(shape(), 512, comm.size, ThreadRanks(comm.share_memory()))
    modes = ["auto", "kv", "allgather"]
    rows = measure.measure(layer, "attention", [layer.moba(m) for m in modes], Limits(1, 1e9), lambda name: 0.0)
    return rows, predictions(layer, modes), comm.memory.stages


def test_nodes_are_those_of_the_launcher(monkeypatch):
    """Ranks of several nodes use no copy engines, and what crosses nodes is predicted."""
    monkeypatch.setattr(measure, "ReplayCommunicator", OnTwoNodes)
    for rows, predicted, stages in run_threads(4, _on_two_nodes):
        assert stages == 0
        for row in rows:
            assert row.both > 0 and 0 < predicted[row.name].between_gb < predicted[row.name].predicted_gb


def _replays_a_forward_pass(comm, mode: str):
    ranks = ThreadRanks(comm.share_memory())
    layer = Layer(shape(kv_heads=4), 192 * comm.size, comm.size, ranks)
    candidate = layer.moba(mode)
    with layer.comm.recording():
        candidate.results()
    ranks.settle(comm.size)
    with layer.comm.replaying():
        candidate.forward()
    layer.comm.forget()
    candidate.results()


@pytest.mark.parametrize("mode", ["heads", "allgather"])
def test_a_replayed_call_is_compared_with_no_other(mode, monkeypatch):
    """Also where what ranks say of a call comes to the host late, as it does from a GPU."""
    asked = []

    def ready(self) -> bool:
        asked.append(self)
        return any(one is self for one in asked[:-1])

    monkeypatch.setattr(HostCopy, "ready", ready)
    run_threads(2, _replays_a_forward_pass, mode)
