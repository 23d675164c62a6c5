"""The gates and the byte counts of ``moba-cp bench exchange``."""

import argparse
import json

import numpy as np
import pytest
import torch

from moba_cp import reference
from moba_cp.bench import exchange
from moba_cp.bench.chart import figure
from moba_cp.bench.commands import exchange as command
from moba_cp.bench.gates import RecordedGate, SyntheticGate
from moba_cp.bench.links import Links
from moba_cp.cp.allgather import costs as gather_costs
from moba_cp.cp.options import MODES, SEQUENCE_MODES, ExchangeOptions, Weighing
from tests.cp.test_allgather import _run
from tests.cp.test_exchange import _moved
from tests.helpers.cases import Case
from tests.helpers.distributed import run_threads


def _args(*given):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(given))


@pytest.mark.parametrize("kind", ["uniform", "concentrated"])
def test_gates_choose_distinct_earlier_blocks(kind):
    gate = SyntheticGate(kind, 4, 2, 64, 4)
    positions = np.arange(20000, 24000)
    chosen = gate(positions)
    assert chosen.shape == (4000, 4, 3) and (chosen >= 0).all()
    assert (chosen < torch.from_numpy(positions // 64)[:, None, None]).all()
    ordered = chosen.sort(-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    assert torch.equal(chosen, gate(positions)), "not a function of the positions"
    early = gate(np.arange(200))
    assert ((early >= 0).sum(-1) == torch.arange(200)[:, None].div(64, rounding_mode="floor").clamp(max=3)).all() or (
        kind == "concentrated"
    )


def test_the_concentrated_gate_has_a_pool_per_segment_and_head():
    gate = SyntheticGate("concentrated", 4, 2, 64, 4)
    chosen = gate(np.arange(1024 * 100, 1024 * 101))
    for heads in (slice(0, 2), slice(2, 4)):
        pool = chosen[:, heads].unique()
        assert len(pool) == 16
        assert (pool >= 1600 - 32).sum() >= 8
    assert not torch.equal(chosen[:, :2].unique(), chosen[:, 2:].unique())


@pytest.mark.parametrize("copies", ["none", "slow", "fast"])
@pytest.mark.parametrize("documents", [[0, 256], [0, 24, 40, 256]], ids=["one document", "packed"])
def test_bytes_are_those_that_training_moves(tmp_path, documents, copies, monkeypatch):
    """The command's bytes for a recorded selection equal the counters of the same selection when it really runs."""
    monkeypatch.setattr(gather_costs, "COPY_RATE", 1e20 if copies == "fast" else 1e6)
    n, size, per_node = 256, 4, "1" if copies == "none" else "4"
    q, dout = (torch.randn(n, 4, 32) for _ in range(2))
    k, v = (torch.randn(n, 2, 32) for _ in range(2))
    cu_seqlens = torch.tensor(documents, dtype=torch.int32)
    case = Case(q, k, v, dout, cu_seqlens, 16, 4)
    path = tmp_path / "gate.pt"
    chosen = reference.select_blocks(q, k, 16, 4, cu_seqlens).int()
    torch.save({"layers": {"layer 1": chosen}, "block_size": 16, "n_kv_heads": 2, "cu_seqlens": cu_seqlens}, path)
    args = _args("--gate", str(path), "--dim", "32", "--dtype", "fp32", "--nodes", "0", "--ranks-per-node", per_node)
    args.tokens, args.heads, args.kv_heads, args.top_k, args.block_size = n, 4, 2, 4, 16
    n_blocks = sum(-(-length // 16) for length in cu_seqlens.diff().tolist())
    rows = {row.name: row for row in exchange.measure(size, RecordedGate(path), list(SEQUENCE_MODES), args)}
    for mode, row in rows.items():
        options = ExchangeOptions(mode, stages=1, ranks_per_node=int(per_node))
        counters = [c for _, c, _ in run_threads(size, _run, copies != "none", case, "zigzag", options)]
        means = sum(c["received_means_bytes"] for c in counters)
        asks = mode != "allgather" and (mode, copies) != ("auto", "fast")
        assert all(("received_requests_bytes" in c) == asks for c in counters)
        requests = (size - 1) * n_blocks * 2 * asks
        assert row.predicted_gb * 1e9 * size == pytest.approx(sum(map(_moved, counters)) + means + requests), mode
    # With copy engines a plan must save much; for packed documents it does, since they see little of one another.
    gathers = copies == "fast" or (copies == "slow" and len(documents) == 2)
    assert (rows["auto"].busiest == rows["allgather"].busiest) == gathers


def test_the_command_prints_writes_and_draws(tmp_path, capsys, monkeypatch):
    """Ranks in any order: the chart shows for each number of ranks what the table says of it."""
    table, chart, drawn = tmp_path / "table.json", tmp_path / "chart.png", []
    real = exchange.draw
    monkeypatch.setattr(exchange, "draw", lambda *all: drawn.append(all) or real(*all))
    shape = ["--ranks", "4,2,8", "--tokens", "16384", "--heads", "4", "--kv-heads", "2", "--block-size", "128"]
    assert exchange.main(_args(*shape, "--no-copy-engines", "--json", str(table), "--plot", str(chart))) == 0
    rows = json.loads(table.read_text())["rows"]
    expected = [(p, mode) for p in (2, 4, 8) for mode in MODES]
    # Eight ranks have nothing to share out of four heads.
    assert [(row["ranks"], row["name"]) for row in rows] == [x for x in expected if x != (8, "heads")]
    assert "allgather" in capsys.readouterr().out and chart.stat().st_size > 1000
    ((_, (panel,), _),) = drawn
    curves = {curve.label: dict(curve.points) for curve in panel.curves}
    for row in rows:
        assert curves[row["name"]][row["ranks"]] == row["predicted_gb"]
        assert curves["dense ring"][row["ranks"]] == pytest.approx(row["predicted_gb"] / row["of_ring"])
    for size in (2, 4, 8):
        gb = {row["name"]: row["predicted_gb"] for row in rows if row["ranks"] == size}
        assert gb["auto"] <= 1.02 * min(gb["kv"], gb["query"], gb["allgather"])


def test_the_chart_mirrors_nothing_and_hides_nothing():
    """Rows as they come, by falling number of ranks, with auto equal to kv."""
    pytest.importorskip("matplotlib")
    gb = {"auto": lambda p: 16 / p, "kv": lambda p: 16 / p, "query": lambda p: 64 / p, "allgather": lambda p: 2.0 * p}
    rows = [
        exchange.Row("exchange", mode, 1024, p, predicted_gb=f(p), of_ring=0.5)
        for p in (256, 16, 2)
        for mode, f in gb.items()
    ]
    drawn = figure(exchange.panels(rows), "title").axes[0]
    lines = {line.get_label(): line for line in drawn.lines}
    for mode, f in gb.items():
        x, y = lines[mode].get_data()
        assert list(x) == [2, 16, 256] and list(y) == [f(p) for p in (2, 16, 256)]
    assert [text.get_text() for text in drawn.get_xticklabels()] == ["2", "16", "256"]
    auto, kv = lines["auto"], lines["kv"]
    assert auto.get_linewidth() > 2 * kv.get_linewidth() and auto.get_markersize() > 1.5 * kv.get_markersize()
    order = list(lines)
    assert order.index("auto") < order.index("kv"), "the broad one lies below"


@pytest.mark.parametrize("kind, share", [("concentrated", 0.134), ("uniform", 0.488)])
def test_of_a_dense_ring_at_a_million_tokens(kind, share):
    """On 64 ranks, every rank for itself: what is promised is a fifth and a half."""
    args = _args("--gate", kind, "--tokens", "1048576", "--ranks-per-node", "1")
    gate = SyntheticGate(kind, args.heads, args.kv_heads, args.block_size, args.top_k)
    (row,) = exchange.measure(64, gate, ["auto"], args)
    assert row.of_ring == pytest.approx(share, abs=5e-4)


def test_the_prediction_goes_by_the_speed_of_copies_that_training_goes_by():
    assert Links().copy_gbps == gather_costs.COPY_RATE / 1e9


def test_copy_engines_change_what_is_gathered_within_a_node():
    """A quarter of what others have is never seen in the zigzag layout."""
    shape = ["--tokens", "16384", "--heads", "4", "--kv-heads", "2", "--block-size", "128", "--device", "cpu"]
    gate = SyntheticGate("uniform", 4, 2, 128, 8)

    def gigabytes(*given: str) -> dict[str, float]:
        args = _args(*shape, *given)
        return {row.name: row.predicted_gb for row in exchange.measure(4, gate, ["auto", "kv", "allgather"], args)}

    copied, collective = gigabytes(), gigabytes("--no-copy-engines")
    assert copied["auto"] == pytest.approx(copied["allgather"], rel=0.01)
    assert copied["allgather"] == pytest.approx(0.75 * collective["allgather"], rel=0.01)
    assert copied["kv"] == collective["kv"]
    # Ranks of several nodes copy nothing.
    assert gigabytes("--ranks-per-node", "2") == gigabytes("--ranks-per-node", "2", "--no-copy-engines")


@pytest.mark.parametrize(
    "given, says",
    [
        (["--gate", "nothing.pt"], "gate='nothing.pt' is no recorded selection"),
        (["--ranks", "two"], "ranks='two' is not a list of positive whole numbers"),
        (["--modes", "all"], "exchange mode='all' is not one of"),
        (["--heads", "3"], "kv-heads=8 does not divide heads=3"),
        (["--top-k", "0"], "top_k=0 is not between"),
        (["--row-weight", "-1"], "exchange row_weight=-1.0 is not a number in"),
        (["--tflops", "0"], "tflops=0 is not above 0; leave it out for 320"),
        (["--within-latency-us", "-1"], "within-latency-us=-1 is not 0 or more"),
        (["--ranks-per-node", "0"], "ranks-per-node=0 is below 1"),
        (["--nodes", "-1"], "nodes=-1 is below 0"),
        (["--device", "tpu"], "device='tpu' is not one of auto, cpu, cuda"),
        (["--device", "cuda"], "device='cuda': PyTorch finds no GPU here"),
    ],
)
def test_bad_arguments_are_named(given, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=says):
        exchange.main(_args(*given))


@pytest.mark.parametrize("gpu, tokens", [(False, 65536), (True, 1048576)])
def test_without_a_number_of_tokens_a_cpu_counts_few(gpu, tokens, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(exchange, "measure", lambda *_: [])
    assert exchange.main(_args()) == 0 and capsys.readouterr().out.startswith(f"{tokens} tokens, 32 query heads")


@pytest.mark.parametrize("gate", ["uniform", "concentrated"])
def test_auto_counts_a_block_that_its_node_shares_once(gate):
    """Between nodes auto crosses with no more than the other ways do; every rank for itself, with no more in all."""
    args = _args(
        "--tokens", "32768", "--heads", "4", "--kv-heads", "2", "--dim", "32", "--block-size", "64", "--device", "cpu"
    )
    gate = SyntheticGate(gate, 4, 2, 64, 8)
    for per_node, measure_of in ((4, "between_gb"), (1, "predicted_gb")):
        args.ranks_per_node, args.nodes = per_node, 2
        rows = {row.name: getattr(row, measure_of) for row in exchange.measure(16, gate, list(SEQUENCE_MODES), args)}
        assert rows["auto"] <= 1.02 * min(rows.values()), rows


def _wire_ms(row, within: float, between: float) -> float:
    """ms on the network at GB/s within a node and between nodes."""
    return (row.predicted_gb - row.between_gb) / within * 1e3 + row.between_gb / between * 1e3


def _auto(monkeypatch, kv_heads: int, size: int, *given, weighing=None):
    """The row of auto for a uniform gate, with another way to weigh blocks and rows if one is given."""
    shape = ["--tokens", "16384", "--heads", "4", "--kv-heads", str(kv_heads), "--block-size", "64", "--device", "cpu"]
    with monkeypatch.context() as patch:
        if weighing is not None:
            patch.setattr(ExchangeOptions, "weighing", lambda self, n_ranks: weighing)
        gate = SyntheticGate("uniform", 4, kv_heads, 64, 8)
        (row,) = exchange.measure(size, gate, ["auto"], _args(*shape, "--no-copy-engines", *given))
    return row


def test_counting_a_block_by_the_ranks_that_share_it_pays(monkeypatch):
    """Under grouped queries, on any network that is slower between nodes than within them."""
    shared = _auto(monkeypatch, 1, 16)
    alone = _auto(monkeypatch, 1, 16, weighing=Weighing(4.0, 1.0, 1, 8))
    assert shared.between_gb < 0.5 * alone.between_gb
    for within, between in ((370, 48), (370, 12), (25, 12), (25, 3)):
        assert _wire_ms(shared, within, between) < _wire_ms(alone, within, between), (within, between)


def test_a_row_weight_of_one_pays_where_a_node_is_slow(monkeypatch):
    """GPUs of a node that share no fast links, each query head with K and V of its own."""
    default, least = _auto(monkeypatch, 4, 8), _auto(monkeypatch, 4, 8, "--row-weight", "1")
    assert least.predicted_gb < 0.7 * default.predicted_gb
    slow = "--within-gbps", "25", "--tflops", "1000"
    default, least = _auto(monkeypatch, 4, 8, *slow), _auto(monkeypatch, 4, 8, *slow, "--row-weight", "1")
    assert least.exposed_ms < 0.7 * default.exposed_ms
