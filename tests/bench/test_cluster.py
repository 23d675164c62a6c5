"""``moba-cp bench cluster`` on a few gloo ranks, and its parts on one."""

import argparse
import contextlib
import io
import json

import numpy as np
import pytest
import torch

from moba_cp import MoBAConfig
from moba_cp.bench.cluster import check, command, goals, profile
from moba_cp.bench.cluster.inputs import Shape, make_inputs
from moba_cp.bench.cluster.measure import DEFAULT_MODES, Layer, Limits, exchange_options, measure, overlap
from moba_cp.bench.cluster.ranks import Ranks
from moba_cp.bench.cluster.replay import ReplayCommunicator
from moba_cp.bench.cluster.rows import COLUMNS, Report, Row, header
from moba_cp.bench.timing import Candidate
from moba_cp.blocks import block_table
from moba_cp.cp.layout import positions_of, rank_segments
from moba_cp.cp.options import MODES, ExchangeOptions
from moba_cp.ops import backend
from tests.helpers.distributed import run_ranks

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--heads", "4", "--kv-heads", "2", "--dim", "16", "--block-size", "32", "--top-k", "3"]
SMALL += ["--check-tokens", "256", "--training-tokens", "256", "--repeats", "2"]


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
    real = check.moba_attention
    check.moba_attention = lambda *leaves, cp=None: real(*leaves, cp=cp) * (1.0 if cp is None or rank == 0 else 1.01)
    refused = run("--tokens", "512", "--json", f"{folder}/refused.json")
    return whole, refused


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    return folder, run_ranks(2, _two_ranks, str(folder))


def test_the_whole_command(two_ranks):
    pytest.importorskip("megatron.core")
    folder, ((whole, _), (other, _)) = two_ranks
    assert whole[0] == other[0] == 0 and other[1] == "", "all ranks succeed and one speaks"
    report = json.loads((folder / "two.json").read_text())
    rows = {(row["part"], row["tokens"], row["ranks"], row["name"]): row for row in report["rows"]}
    moba = [f"moba {mode}" for mode in DEFAULT_MODES]
    expected = {("attention", 512, 1, name) for name in ("moba", "full")}
    expected |= {("attention", 512, 2, name) for name in (*moba, "full")}
    expected |= {("overlap", 512, 2, name) for name in moba}
    expected |= {("training", 256, size, name) for size in (1, 2) for name in ("moba", "full")}
    assert set(rows) == expected
    for key, row in rows.items():
        assert row["both"] > 0 and not row["note"], key
        if key[0] == "overlap":
            assert row["off_both"] > 0 and row["off_error"] == 0
        if key[0] == "attention" and key[2] == 2 and key[3] != "full":
            # Means and requests come on top, and rows carry the numbers of their blocks.
            assert row["received_gb"] == pytest.approx(row["predicted_gb"], rel=0.02), key
        if key[0] == "training":
            assert 5 < row["loss"] < 6
    assert report["environment"]["ranks"] == "2" and report["settings"]["gate"] == "uniform"
    assert {goal["met"] for goal in report["goals"]} <= {True, False, None}
    assert (folder / "two.png").stat().st_size > 10_000
    lines = whole[1].splitlines()
    table = lines[lines.index(header()) + 1 :][: len(rows)]
    assert [line.split()[0] for line in table] == [row["part"] for row in report["rows"]]
    assert all(len(line) == sum(width for _, width in COLUMNS) for line in table), "the columns are aligned"


def test_a_failed_check_publishes_nothing(two_ranks):
    folder, results = two_ranks
    for rank, (_, (code, printed)) in enumerate(results):
        assert code == 1
        assert ("MoBA by auto on 2 ranks: dk is off by" in printed) == (rank == 0)
        assert printed.count("nothing is published") == (rank == 0)
    assert not (folder / "refused.json").exists()


def _four_ranks(rank, folder):
    torch.set_num_threads(1)
    return run("--tokens", "1024", "--nodes", "2", "--gate", "concentrated", "--json", f"{folder}/nodes.json")


def test_nodes_send_each_block_once(tmp_path):
    results = run_ranks(4, _four_ranks, str(tmp_path))
    assert [code for code, _ in results] == [0] * 4
    rows = {row["name"]: row for row in json.loads((tmp_path / "nodes.json").read_text())["rows"]}
    assert set(rows) == {f"moba {m} {kind}" for m in MODES for kind in ("flat", "by node")} - {"moba allgather by node"}
    assert all("emulated" in row["note"] and row["part"] == "nodes" for row in rows.values())
    flat, by_node = rows["moba kv flat"], rows["moba kv by node"]
    assert 0 < by_node["between_gb"] < 0.95 * flat["between_gb"]
    gathered = rows["moba allgather flat"]
    assert gathered["between_gb"] == pytest.approx(gathered["received_gb"] * 2 / 3, rel=1e-3)


def _with_the_wire_off(rank):
    """For every candidate: whether results, twice, equal the real ones, and the row of the whole measurement."""
    torch.set_num_threads(1)
    ranks = Ranks("cpu")
    layer = Layer(shape(), 512, 2, ranks)
    report = {}
    for candidate in [layer.moba(mode) for mode in MODES] + [layer.full()]:

        def results():
            for x in candidate.leaves:
                x.grad = None
            out = candidate.forward()
            out.backward(candidate.dout)
            return [out.detach(), *(x.grad for x in candidate.leaves)]

        with layer.comm.recording():
            wanted = results()
        kept = layer.comm.kept_bytes
        same = []
        # One rank after the other: nothing is sent, or they would wait for ever.
        for alone in range(2):
            for _ in range(2 if rank == alone else 0):
                with layer.comm.replaying():
                    same.append(all(torch.equal(a, b) for a, b in zip(results(), wanted, strict=True)))
            ranks.meet()
        layer.comm.forget()
        row = overlap(layer, candidate, Limits(2, 1e9))
        report[candidate.name] = same, kept, layer.comm.kept_bytes, row
    return report


def test_a_replay_equals_the_real_pass():
    for report in run_ranks(2, _with_the_wire_off):
        assert set(report) == {*(f"moba {mode}" for mode in MODES), "full"}
        for name, (same, kept, left, row) in report.items():
            assert same == [True, True], name
            assert kept > 0 and left == 0
            assert row.off_error == 0 and row.off_both > 0 and row.repeats == 2 and not row.note


def test_a_replay_of_another_pass_is_refused():
    comm = ReplayCommunicator(None)
    with comm.recording():
        comm.all_gather(torch.ones(3), "means")
    with comm.replaying():
        assert torch.equal(comm.all_gather(torch.zeros(3), "means"), torch.ones(1, 3))
    with comm.replaying(), pytest.raises(AssertionError, match="kv all-gather where means all-gather was recorded"):
        comm.all_gather(torch.zeros(3), "kv")


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
    rows = measure(layer, "attention", [bad, slow, good], Limits(2, 100.0), lambda name: 1e3 * (name == "slow"))
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
    chosen = backend(k.bfloat16()).select_blocks(q[rows].bfloat16(), means, table.first[rows], table.own[rows], 8)
    drawn = it.drawn()(rows.numpy())  # a whole chunk, as the inputs draw it
    found = (drawn[..., None] == chosen[..., None, :]).any(-1)
    assert found.float().mean() > 0.99 and found.all(-1).float().mean() > 0.95
    early = it.drawn()(np.arange(2 * size))
    assert (early[:size] < 0).all(), "the first block's queries have nothing to choose"


def test_the_check_finds_a_wrong_selection(one_rank, monkeypatch):
    real = check._one_rank_selection
    assert check.check(shape(), 256, ["auto"], (1,), one_rank) is None
    monkeypatch.setattr(check, "_one_rank_selection", lambda *inputs: real(*inputs).clamp(max=1))
    assert "MoBA on one rank: out is wrong by" in check.check(shape(), 256, ["auto"], (1,), one_rank)


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
    return Row(part, tokens, ranks, name, forward=both / 3, both=both, **rest)


def test_goals_are_judged_by_what_was_measured():
    report = Report({}, {}, None)
    assert [goal["met"] for goal in goals.judge(report)] == [None] * 6
    report.rows = [
        _row("attention", 131072, 2, "full", 231.0),
        _row("attention", 524288, 1, "moba", 240.0),
        _row("attention", 524288, 2, "moba auto", 130.0),
        _row("attention", 524288, 2, "moba allgather", 135.0),
        _row("attention", 524288, 4, "moba auto", 71.0),
        _row("attention", 524288, 4, "moba allgather", 72.0),
        _row("attention", 524288, 4, "moba allgather-nccl", 68.0),
        _row("overlap", 131072, 2, "moba auto", 130.0, off_both=90.0),
        _row("overlap", 524288, 2, "moba auto", 130.0, off_both=120.0),
        _row("overlap", 524288, 4, "moba kv", 130.0, off_both=20.0),
    ]
    judged = goals.judge(report)
    assert [goal["met"] for goal in judged] == [False, True, False, None, False, True]
    measured = ["231.0 ms", "1.85 times", "84.5%", "not measured"]
    assert [goal["measured"] for goal in judged[:4]] == measured
    assert judged[4]["measured"] == "worst 1.044 (T=524288, 4 ranks)"
    assert judged[5]["measured"] == "worst 1.083 (T=524288, 2 ranks)"
    assert [line.split()[-1] for line in goals.lines(judged)] == ["missed", "met", "missed", "-", "missed", "met"]


def test_rows_are_written_as_they_come(tmp_path, capsys):
    report = Report({"gpu": "g"}, {"heads": 1}, tmp_path / "rows.json")
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
            "modes: 'kv-nccl:2': kv never uses copy engines; use kv, or -nccl behind auto or all",
        ),
        (["--modes", "all-nccl"], "modes: 'all-nccl': exchange mode='all' is not one of auto, kv, query, allgather"),
        (["--modes", "auto-kept"], "modes: 'auto-kept': -kept is none of -nccl, -keep, -rounded"),
        (["--modes", "auto:x"], "modes: 'auto:x': could not convert string to float"),
        (["--parts", "attention,nodes"], "with nodes=1: the part nodes, and no other, goes with --nodes"),
        (["--nodes", "0"], "nodes=0 is not positive"),
        (["--nodes", "2"], "nodes=2 does not divide the 1 ranks"),
        (["--ranks", "2"], "ranks=2 is none of 1"),
        (["--stand-in", "4"], "stand-in=4 on 1 ranks: two stand in for two or more"),
        (["--stand-in", "4", "--nodes", "2"], "stand-in=4 with nodes=2: nodes share no memory"),
        (["--parts", "stand-in"], "'stand-in' is not one of attention"),
        (["--kv-heads", "3"], "kv-heads=3 does not divide heads=4"),
        (["--repeats", "0"], "repeats=0 is not positive"),
        (["--max-ms", "0"], "max-ms=0.0 is not above 0"),
        (["--block-size", "20"], "block_size=20 is not a positive multiple of 16"),
        (["--json", "/nowhere/x.json"], "the folder /nowhere is not there"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(given, says):
    with pytest.raises(ValueError, match=says):
        command.main(arguments(*given))
