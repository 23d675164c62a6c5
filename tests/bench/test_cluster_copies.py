"""``moba-cp bench cluster`` where ranks read one another's memory: ranks that are threads."""

import pytest
import torch

from moba_cp import moba_attention
from moba_cp.bench.cluster import command, measure, parts, stand_in
from moba_cp.bench.cluster.measure import DEFAULT_MODES, Layer, Limits, overlap
from moba_cp.bench.cluster.predict import predictions
from moba_cp.bench.cluster.ranks import Ranks
from moba_cp.bench.cluster.replay import ReplayCommunicator
from moba_cp.bench.cluster.rows import Report, Row
from moba_cp.bench.gates import GATES
from moba_cp.bench.timing import Candidate
from moba_cp.cp.allgather import costs as gather_costs
from moba_cp.cp.options import ExchangeOptions
from tests.bench.test_cluster import CPU, arguments, shape
from tests.helpers.distributed import ThreadCommunicator, run_threads


class Twin(ThreadCommunicator):
    """A second communicator of the same thread, with the same memory."""

    def __init__(self, comm: ThreadCommunicator):
        super().__init__(comm.rank, comm.size, comm._board, comm._barrier, comm._turn)
        self._peers = comm.peers()


class ThreadReplay(ReplayCommunicator, Twin):
    """Records and plays back what threads bring one another."""


class ThreadRanks(Ranks):
    """Ranks that are threads."""

    def __init__(self, comm: ThreadCommunicator, nodes: int = 1):
        self.rank, self.size, self.nodes, self.per_node = comm.rank, comm.size, nodes, comm.size // nodes
        self.device, self.on_gpu, self.sizes = CPU, False, [comm.size]
        self._comm = comm

    def group(self, size):
        return self._comm

    def meet(self):
        self._comm._meet()

    def gathered(self, value, size):
        return self._comm._swap(value)

    def _reduced(self, number, size, operation):
        numbers = self.gathered(number, size)
        return max(numbers) if operation == torch.distributed.ReduceOp.MAX else sum(numbers)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setattr(measure, "ReplayCommunicator", ThreadReplay)


def _results(candidate):
    for x in candidate.leaves:
        x.grad = None
    out = candidate.forward()
    out.backward(candidate.dout)
    return [out.detach(), *(x.grad for x in candidate.leaves)]


def _same(candidate, wanted) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_results(candidate), wanted, strict=True))


def _with_the_wire_off(comm):
    """By mode: whether results equal the real ones, meetings and bytes of passes, and the row of the measurement."""
    ranks = ThreadRanks(comm.share_memory())
    layer = Layer(shape(kv_heads=4), 192 * comm.size, comm.size, ranks)
    memory, report = layer.comm.peers(), {}
    for mode in DEFAULT_MODES:
        candidate = layer.moba(mode)
        _results(candidate)
        layer.comm.handed_bytes = 0
        with layer.comm.recording():
            wanted = _results(candidate)
        kept, handed, met = layer.comm.kept_bytes, layer.comm.handed_bytes, memory.meetings
        _results(candidate)
        expected, met = layer.comm.handed_bytes - handed, (met, memory.meetings)
        ranks.settle(comm.size)
        same = []
        # One rank after the other, which meets nobody; nothing is read from any memory but what was recorded.
        for alone in range(comm.size):
            for _ in range(2 if comm.rank == alone else 0):
                for buffers in memory._buffers.values():
                    buffers[comm.rank].fill_(255)
                with layer.comm.replaying():
                    same.append(_same(candidate, wanted))
            ranks.meet()
        met += (memory.meetings,)
        # Slots go on in turn as if nothing had happened.
        same.append(_same(candidate, wanted))
        layer.comm.forget()
        report[mode] = same, (kept, expected), met, overlap(layer, candidate, Limits(2, 1e9))
    return report


@pytest.mark.parametrize("size", [2, 3])
def test_a_replay_equals_the_real_pass(size, monkeypatch):
    monkeypatch.setattr(gather_costs, "COPY_RATE", 1e20)
    for report in run_threads(size, _with_the_wire_off):
        for mode, (same, (kept, expected), (before, live, replayed), row) in report.items():
            assert same == [True] * 3, mode
            assert kept == expected > 0, "a recording takes what is said before it is made"
            assert (live > before) == (mode in ("auto", "allgather")), "copies are made where they should be"
            assert replayed == live, "a replay meets somebody"
            assert row.off_error == 0 and row.off_both > 0 and not row.note, mode


def _counted(comm, n_tokens, modes):
    """By mode: GB measured and predicted, and memory of the rows."""
    layer = Layer(shape(), n_tokens, comm.size, ThreadRanks(comm.share_memory()))
    memory, used = layer.comm.peers(), {}
    candidates = [layer.moba(mode) for mode in modes]
    for mode, candidate in zip(modes, candidates, strict=True):
        use = layer.peer_use()
        _results(candidate)
        used[mode] = use.nbytes
        assert use.nbytes in (0, memory.nbytes)
    rows = measure.measure(layer, "attention", candidates, Limits(1, 1e9), lambda name: 0.0)
    predicted = predictions(layer, modes)
    return {mode: (row.received_gb, predicted[row.name].gb, used[mode]) for mode, row in zip(modes, rows, strict=True)}


@pytest.mark.parametrize("rate", [1e6, 1e20], ids=["slow copies", "fast copies"])
@pytest.mark.parametrize("size", [2, 4])
def test_predicted_bytes_are_those_counted(size, rate, monkeypatch):
    monkeypatch.setattr(gather_costs, "COPY_RATE", rate)
    modes = ["auto", "auto-nccl", "kv", "kv-rounded", "allgather", "allgather-rounded-keep", "allgather-nccl"]
    for report in run_threads(size, _counted, 256 * size, modes):
        for mode, (measured, predicted, used) in report.items():
            gathers = mode.startswith("allgather") or (mode == "auto" and rate > 1e9)
            # Requests carry headers, which are not predicted.
            assert measured == pytest.approx(predicted, rel=1e-9 if gathers else 0.02), mode
            assert (used > 0) == (mode in ("auto", "allgather", "allgather-rounded-keep")), mode
        assert report["allgather"][0] < report["allgather-nccl"][0]
        assert report["allgather"][1] < report["allgather-nccl"][1]


def _as_nodes(comm):
    ranks, report = ThreadRanks(comm.share_memory(), nodes=2), Report({}, {}, None)
    modes = "--modes", ",".join((*DEFAULT_MODES, "allgather-keep"))
    parts.nodes(command._settings(arguments("--tokens", "512", "--nodes", "2", *modes)), ranks, report)
    return {row.name: row for row in report.rows}, comm.peers().stages


def test_nodes_read_no_memory_of_one_another():
    """Ranks that could, and are told to be two nodes."""
    everybody = run_threads(4, _as_nodes)
    assert [stages for _, stages in everybody] == [0] * 4
    rows = everybody[0][0]
    names = {f"moba {mode} {kind}" for mode in ("auto", "kv", "query", "allgather") for kind in ("flat", "by node")}
    names.add("moba allgather-keep flat")
    assert set(rows) == names - {"moba allgather by node"}, "without copy engines all-gather is measured once"
    for name in names & set(rows):
        assert 0 < rows[name].between_gb < rows[name].received_gb and rows[name].both > 0
    gathered = rows["moba allgather flat"]
    assert gathered.between_gb == pytest.approx(gathered.received_gb * 2 / 3, rel=1e-6)


def _results_and_choice(layer: Layer):
    """Results of MoBA by all-gathering, bytes by kind, and what was chosen."""
    seen = []
    cp = layer.context(ExchangeOptions("allgather"), lambda name, chosen, n_kv, block_size: seen.append(chosen))
    layer.comm.reset_counters()
    candidate = Candidate("", lambda: moba_attention(*layer.leaves, layer.shape.moba, cp=cp), layer.dout, layer.leaves)
    return _results(candidate), (layer.comm.counters.received, layer.comm.counters.sent), seen[0]


def _real(comm, gate, n_tokens):
    return _results_and_choice(Layer(shape(gate), n_tokens, comm.size, ThreadRanks(comm.share_memory())))


def _standing_in(comm, gate, n_tokens, size):
    ranks = ThreadRanks(comm.share_memory())
    memory = stand_in.StandInMemory(comm.peers(), [0, size - 1][comm.rank], size)
    means = stand_in._means(shape(gate), n_tokens, size, CPU)
    layer = Layer(shape(gate), n_tokens, size, ranks, stand_in.StandInCommunicator(memory, means), present=2)
    return _results_and_choice(layer)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [2, 4, 6])
def test_two_stand_in_for_the_first_and_the_last(size, gate):
    """They choose and move what these do; of two ranks they are both."""
    n_tokens = (1536 if gate == "concentrated" else 128) * size
    real = run_threads(size, _real, gate, n_tokens)
    for act, (results, moved, chosen) in zip((real[0], real[-1]), run_threads(2, _standing_in, gate, n_tokens, size)):
        assert torch.equal(chosen, act[2]) and (chosen >= 0).any()
        assert all(x.isfinite().all() for x in results)
        for kinds, wanted in zip(moved, act[1], strict=True):
            assert kinds == wanted and kinds["kv"] > 0
        if size == 2:
            assert all(torch.equal(a, b) for a, b in zip(results, act[0], strict=True))


def _stand_in_rows(comm, *given):
    ranks, report = ThreadRanks(comm.share_memory()), Report({}, {}, None)
    report.rows.append(Row("attention", 512, 1, "moba", both=1.0))
    parts.standing_in(command._settings(arguments("--tokens", "512", *given)), ranks, report)
    return report.rows[1:]


def test_the_part_stand_in(monkeypatch):
    monkeypatch.setattr(stand_in, "peer_memory", lambda comm: comm.peers())
    modes = "--modes", "auto,allgather,allgather-keep,allgather-nccl"
    rows, others = run_threads(2, _stand_in_rows, "--stand-in", "4,8,16", *modes)
    assert not others and [row.ranks for row in rows] == [4, 4, 8, 8, 16]
    assert [row.name for row in rows[:2]] == ["moba allgather", "moba allgather-keep"]
    assert rows[1].received_gb < rows[0].received_gb
    for row in rows[:4]:
        assert row.both > 0 and row.off_both > 0 and row.off_error == 0 and row.received_gb > 0
        assert row.note == f"two GPUs: {100 / (row.ranks * row.both):.0f} % of {row.ranks} times one"
    assert rows[4].both is None and "blocks would lie on two of 16 ranks" in rows[4].note
    monkeypatch.setattr(stand_in, "peer_memory", lambda comm: None)
    (row,), _ = run_threads(2, _stand_in_rows, "--stand-in", "4", "--layout", "contiguous")
    assert row.note.startswith("skipped: in the contiguous layout")
    (row,), _ = run_threads(2, _stand_in_rows, "--stand-in", "4")
    assert row.note == "skipped: the GPUs do not map each other's memory"
