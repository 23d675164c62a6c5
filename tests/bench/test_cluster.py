"""``moba-cp bench cluster`` on a few gloo ranks, and its parts on one."""

import argparse
import contextlib
import io
import json

import numpy as np
import pytest
import torch

from moba_cp import MoBAConfig
from moba_cp.bench.chart import figure
from moba_cp.bench.cluster import chart, check, measure, profile
from moba_cp.bench.cluster.inputs import drawn_gate, make_inputs
from moba_cp.bench.cluster.measure import Layer, Limits, overlap
from moba_cp.bench.cluster.modes import DEFAULT_MODES, exchange_options
from moba_cp.bench.cluster.ranks import Ranks
from moba_cp.bench.cluster.replay import ReplayCommunicator
from moba_cp.bench.cluster.run import TABLE
from moba_cp.bench.commands import cluster as command
from moba_cp.bench.rows import Report, Row
from moba_cp.bench.shape import Shape
from moba_cp.bench.timing import Candidate
from moba_cp.blocks import block_table
from moba_cp.cp.calls import Where
from moba_cp.cp.layout import positions_of, rank_segments
from moba_cp.cp.options import MODES, ExchangeOptions
from moba_cp.ops import backend
from tests.helpers.distributed import run_ranks

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--heads", "4", "--kv-heads", "2", "--dim", "16", "--block-size", "32", "--top-k", "3"]
SMALL += ["--check-tokens", "256", "--repeats", "2"]


def arguments(*given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*SMALL, *given])


def run(*given) -> tuple[int, str]:
    """Exit code and output of the command on this rank."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = command.main(arguments(*given))
    return code, printed.getvalue()


def shape(gate="uniform", heads=4, kv_heads=2, dim=16, block_size=32, top_k=3) -> Shape:
    return Shape(heads, kv_heads, dim, MoBAConfig(block_size, top_k), "zigzag", gate)


def _two_ranks(rank, folder):
    torch.set_num_threads(1)
    whole = run("--tokens", "512", "--json", f"{folder}/two.json", "--chart", f"{folder}/two.png")
    late = run("--tokens", "512", "--seconds", "1e-9", "--json", f"{folder}/late.json")
    real = measure.moba_attention
    measure.moba_attention = lambda *leaves, cp=None: real(*leaves, cp=cp) * (1.0 if cp is None or rank == 0 else 1.01)
    refused = run("--tokens", "512", "--json", f"{folder}/refused.json")
    return whole, refused, late


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    return folder, run_ranks(2, _two_ranks, str(folder))


def test_the_whole_command(two_ranks):
    folder, ((whole, *_), (other, *_)) = two_ranks
    assert whole[0] == other[0] == 0 and other[1] == "", "all ranks succeed and one speaks"
    report = json.loads((folder / "two.json").read_text())
    rows = {(row["part"], row["tokens"], row["ranks"], row["name"]): row for row in report["rows"]}
    moba = [f"moba {mode}" for mode in DEFAULT_MODES]
    expected = {("attention", 512, 1, name) for name in ("moba", "full")}
    expected |= {("attention", 512, 2, name) for name in (*moba, "full", "full heads")}
    expected |= {("overlap", 512, 2, name) for name in moba}
    assert set(rows) == expected
    for key, row in rows.items():
        assert row["both"] > 0 and not row["note"] and row["shape"] == [4, 2, 16, 32, 3], key
        if key[0] == "overlap":
            assert row["off_both"] > 0 and row["off_error"] == 0
        if key[0] == "attention" and key[2] == 2 and not key[3].startswith("full"):
            # Means and requests come on top, and rows carry the numbers of their blocks.
            assert row["received_gb"] == pytest.approx(row["predicted_gb"], rel=0.02), key
    assert report["environment"]["ranks"] == "2" and report["environment"]["kernels"]
    assert report["settings"]["gate"] == "uniform" and report["settings"]["tokens"] == "512"
    assert (folder / "two.png").stat().st_size > 10_000
    lines = whole[1].splitlines()
    table = lines[lines.index(TABLE.header()) + 1 :][: len(rows)]
    assert [line.split()[0] for line in table] == [row["part"] for row in report["rows"]]
    assert all(len(line) == len(TABLE.header()) for line in table), "the columns are aligned"


def test_no_measurement_begins_when_the_time_is_over(two_ranks):
    folder, results = two_ranks
    assert [late[0] for *_, late in results] == [0, 0]
    rows = json.loads((folder / "late.json").read_text())["rows"]
    assert [(row["part"], row["ranks"]) for row in rows] == [("skipped", 1), ("skipped", 2)]
    assert all("give more by --seconds" in row["note"] for row in rows)


def test_a_failed_check_publishes_nothing(two_ranks):
    folder, results = two_ranks
    for rank, (_, (code, printed), _) in enumerate(results):
        assert code == 1
        assert ("MoBA by auto on 2 ranks: dk is off by" in printed) == (rank == 0)
        assert printed.count("nothing is published") == (rank == 0)
    assert not (folder / "refused.json").exists()


def _without_communication(rank):
    """For every candidate: whether results, twice, equal the real ones, and the row of the whole measurement."""
    torch.set_num_threads(1)
    ranks = Ranks("cpu")
    layer = Layer(shape(), 512, 2, ranks)
    report = {}
    for candidate in [layer.moba(mode) for mode in MODES] + [layer.full(), layer.full("heads", "full heads")]:
        with layer.comm.recording():
            wanted = candidate.results()
        kept = layer.comm.kept_bytes
        same = []
        # One rank after the other: nothing is sent, or they would wait for ever.
        for alone in range(2):
            for _ in range(2 if rank == alone else 0):
                with layer.comm.replaying():
                    same.append(all(torch.equal(a, b) for a, b in zip(candidate.results(), wanted, strict=True)))
            ranks.barrier()
        layer.comm.forget()
        row = overlap(layer, candidate, Limits(2, 1e9))
        report[candidate.name] = same, kept, layer.comm.kept_bytes, row
    return report


def test_a_replay_equals_the_real_pass():
    for report in run_ranks(2, _without_communication):
        assert set(report) == {*(f"moba {mode}" for mode in MODES), "full", "full heads"}
        for name, (same, kept, left, row) in report.items():
            assert same == [True, True], name
            assert kept > 0 and left == 0
            assert row.off_error == 0 and row.off_both > 0 and row.repeats == 2 and not row.note


def test_a_replay_of_another_pass_is_refused():
    comm, where = ReplayCommunicator(None), Where.forward("layer 1")
    with comm.recording():
        comm.all_gather(torch.ones(3), "means", where)
    with comm.replaying():
        assert torch.equal(comm.all_gather(torch.zeros(3), "means", where), torch.ones(1, 3))
    asked = "kv all-gather in layer 1 where means all-gather in layer 1 was recorded"
    with comm.replaying(), pytest.raises(AssertionError, match=asked):
        comm.all_gather(torch.zeros(3), "kv", where)


@pytest.fixture
def one_rank():
    ranks = Ranks("cpu")
    yield ranks
    ranks.close()


def test_what_fails_or_takes_too_long_is_said_and_loses_nothing_else(one_rank):
    layer = Layer(shape(), 256, 1, one_rank)
    good = layer.moba("auto", "moba")

    def fails():
        raise RuntimeError("no such kernel\nand more")

    bad = Candidate("bad", fails, good.dout, good.leaves)
    slow = Candidate("slow", good.forward, good.dout, good.leaves)
    rows = measure.measure(layer, "attention", [bad, slow, good], Limits(2, 100.0), lambda name: 1e3 * (name == "slow"))
    assert [row.name for row in rows] == ["bad", "slow", "moba"]
    assert rows[0].note == "failed: RuntimeError: no such kernel" and rows[0].both is None
    assert rows[1].note == "skipped: about 1000 ms, more than 100" and rows[1].both is None
    assert rows[2].both >= rows[2].forward > 0 and rows[2].repeats == 2 and not rows[2].note


@pytest.mark.parametrize("gate", ["uniform", "concentrated"])
def test_inputs_do_not_depend_on_the_ranks(gate):
    n = 8192 + 64
    whole = make_inputs(shape(gate), n, torch.arange(n), CPU)
    for size in (2, 4):
        for segments in rank_segments("zigzag", n, size, None):
            positions = torch.from_numpy(positions_of(segments))
            for part, x in zip(make_inputs(shape(gate), n, positions, CPU), whole, strict=True):
                assert torch.equal(part, x[positions])


def test_queries_choose_what_the_concentrated_gate_draws():
    n, size = 65536, 128
    it = shape("concentrated", 2, 1, 128, size, 8)
    q, k, _, _ = make_inputs(it, n, torch.arange(n), CPU)
    rows = torch.arange(n - 4096, n)
    table = block_table(n, size, None, CPU)
    means = backend(k.bfloat16()).block_means(k.bfloat16(), table.start, table.length, size)
    chosen = backend(k.bfloat16()).select_blocks(
        q[rows].bfloat16(), means, table.first[rows], table.current_block[rows], 8
    )
    drawn = drawn_gate(it)(rows.numpy())  # a whole chunk, as the inputs draw it
    found = (drawn[..., None] == chosen[..., None, :]).any(-1)
    assert found.float().mean() > 0.99 and found.all(-1).float().mean() > 0.95
    early = drawn_gate(it)(np.arange(2 * size))
    assert (early[:size] < 0).all(), "the first block's queries have nothing to choose"


def test_the_check_finds_a_wrong_selection(one_rank, monkeypatch):
    real = check.select
    assert check.check(shape(), 256, ["auto"], (1,), one_rank) is None
    monkeypatch.setattr(check, "select", lambda *inputs: real(*inputs).clamp(max=1))
    assert "MoBA on one rank: out is off by" in check.check(shape(), 256, ["auto"], (1,), one_rank)


def test_names_of_modes():
    assert exchange_options("allgather") == ExchangeOptions("allgather")
    assert exchange_options("allgather-nccl", 4) == ExchangeOptions("allgather", ranks_per_node=4, copy_engines=False)
    assert exchange_options("auto-nccl:1.5") == ExchangeOptions("auto", row_weight=1.5, copy_engines=False)
    every = ExchangeOptions("auto", row_weight=2, keep=True, gradient_dtype="input", copy_engines=False)
    assert exchange_options("auto-rounded-keep-nccl:2") == every
    assert exchange_options("kv-keep") == ExchangeOptions("kv", keep=True)
    assert exchange_options("auto-nccl-keep") == ExchangeOptions("auto", keep=True, copy_engines=False)
    assert [exchange_options(mode).mode for mode in DEFAULT_MODES] == [*MODES, "allgather"]


def _row(part, tokens, ranks, name, both, **rest):
    return Row(part, name, tokens, ranks, forward=both / 3, both=both, **rest)


def test_the_chart_compares_with_the_fastest_on_one_rank():
    """Times as measured, by growing tokens and ranks; nothing is compared with itself where another is faster."""
    rows = []
    for n in (4096, 2048, 1024):
        rows += [_row("attention", n, 1, "moba", n / 100), _row("attention", n, 1, "full", n / 10)]
        rows.append(_row("attention", n, 1, "torch cudnn", n / 20))
        for size in (4, 2):
            rows += [_row("attention", n, size, "moba auto", n / 90 / size), _row("attention", n, size, "full", n / 10)]
            rows.append(_row("attention", n, size, "torch alltoall", n / 16 / size))
    rows += [_row("overlap", 1024, 4, "moba auto", 1.0), Row("attention", "moba kv", 1024, 4, note="failed")]
    by_tokens, by_ranks, shares = chart.panels(rows)
    curves = {curve.label: sorted(curve.points) for curve in by_tokens.curves}
    assert set(curves) == {
        *("moba, 1 rank", "full, 1 rank", "torch cudnn, 1 rank"),
        *("moba auto, 4 ranks", "full, 4 ranks", "torch alltoall, 4 ranks"),
    }
    assert curves["moba auto, 4 ranks"] == [(n, n / 360) for n in (1024, 2048, 4096)]
    assert curves["torch cudnn, 1 rank"] == [(n, n / 20) for n in (1024, 2048, 4096)]
    curves = {curve.label: sorted(curve.points) for curve in by_ranks.curves}
    assert curves["moba auto, 4K tokens"] == [(1, 40.96), (2, 4096 / 180), (4, 4096 / 360)]
    assert curves["torch alltoall, 4K tokens"] == [(1, 204.8), (2, 128.0), (4, 64.0)]
    curves = {curve.label: dict(curve.points) for curve in shares.curves}
    assert curves["moba auto"] == {n: pytest.approx(90.0) for n in (1024, 2048, 4096)}
    assert curves["torch alltoall"] == {n: pytest.approx(80.0) for n in (1024, 2048, 4096)}
    assert curves["full"][1024] == pytest.approx(12.5), "cuDNN is faster on one rank"
    assert chart.panels([row for row in rows if row.ranks > 1]) == []
    for left_out in (4, 2):
        two = chart.panels([row for row in rows if row.ranks != left_out])
        assert [panel.x_label for panel in two] == ["tokens", "tokens"], "two points make no curve against ranks"
    pytest.importorskip("matplotlib")
    for axis, panel in zip(figure([by_tokens, by_ranks, shares], "").axes, (by_tokens, by_ranks, shares), strict=True):
        for line, curve in zip(axis.lines, panel.curves, strict=True):
            assert list(zip(*line.get_data(), strict=True)) == sorted(curve.points)


def test_rows_are_written_as_they_come(tmp_path, capsys):
    report = Report({"gpu": "g"}, {"heads": 1}, TABLE, tmp_path / "rows.json")
    for count in (1, 2):
        report.add(_row("attention", 1024, 1, "moba", 3.0))
        assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == count
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert capsys.readouterr().out.count("moba") == 2


def test_a_profile_says_what_overlaps():
    ms = 1_000_000
    kernels = [
        ("work", 0, 10 * ms),
        ("ncclDevKernel", 5 * ms, 15 * ms),
        ("nccl:all", 0, 99 * ms),
        ("work", 20 * ms, 21 * ms),
        ("Memcpy PtoP (Device -> Device)", 20 * ms, 23 * ms),
        ("Memcpy DtoD (Device -> Device)", 23 * ms, 24 * ms),
    ]
    lines = profile.summary(kernels)
    assert lines[0].split() == "12.000 ms computing, 13.000 ms moving, 7.000 ms of it alone, 5.000 ms nothing".split()
    assert [line.split()[3] for line in lines[1:]] == ["work", "ncclDevKernel", "Memcpy", "Memcpy"]


@pytest.mark.parametrize(
    "given, says",
    [
        (["--tokens", "1k"], "tokens='1k' is not a list of positive whole numbers"),
        (["--tokens", "513"], "tokens: seq_len=513 is not divisible by"),
        (["--modes", "kv,all"], "modes: 'all': exchange mode='all' is not one of auto, kv, query, allgather"),
        (["--modes", "auto:0"], "modes: 'auto:0': exchange row_weight=0.0 is not a number in"),
        (
            ["--modes", "kv-nccl:2"],
            "modes: 'kv-nccl:2': kv never uses copy engines; use kv, or -nccl behind auto, allgather or heads",
        ),
        (["--modes", "all-nccl"], "modes: 'all-nccl': exchange mode='all' is not one of auto, kv, query, allgather"),
        (["--modes", "auto-kept"], "modes: 'auto-kept': -kept is none of -nccl, -keep, -rounded"),
        (["--modes", "auto:x"], "modes: 'auto:x': could not convert string to float"),
        (["--ranks", "2"], "ranks=2 is none of 1"),
        (["--parts", "attention,nodes"], "parts='attention,nodes' is not a list of attention, overlap"),
        (["--gate", "gate.pt"], "gate='gate.pt' is not one of uniform, concentrated"),
        (["--seconds", "0"], "seconds=0.0 is not positive"),
        (["--kv-heads", "3"], "kv-heads=3 does not divide heads=4"),
        (["--repeats", "0"], "repeats=0 is not positive"),
        (["--max-ms", "0"], "max-ms=0.0 is not positive"),
        (["--block-size", "20"], "block_size=20 is not a positive multiple of 16"),
        (["--device", "auto"], "this machine has none that PyTorch sees; name --device cpu and a small layer"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(given, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=says):
        command.main(arguments(*given))


def test_the_first_rank_says_what_is_going_on(one_rank, capsys):
    assert check.check(shape(), 256, ["auto"], (1,), one_rank) is None
    one_rank.say("attention of 256 tokens on 1 ranks")
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.endswith("s] attention of 256 tokens on 1 ranks\n")
    assert 0 < one_rank.elapsed(1) < 600
