import argparse

import pytest
import torch

from moba_cp import MoBAConfig, full_attention, moba_attention
from moba_cp.bench import attention, judge, peers, shape
from moba_cp.bench.chart import figure
from moba_cp.bench.commands import attention as command
from moba_cp.bench.rows import Row
from moba_cp.bench.timing import Candidate, time_passes


def results(n=700, heads=(4, 2), dim=16, config=MoBAConfig(32, 4)):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(n, h, dim) for h in (heads[0], heads[1], heads[1], heads[0]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = moba_attention(*leaves, config, return_lse=True)
    out.backward(dout)
    inputs = [*(x.detach() for x in leaves), dout]
    return inputs, [out.detach(), *(x.grad for x in leaves)], lse.detach(), config


def test_the_right_result_is_accepted():
    errors, problem = judge.judge_moba(*results())
    assert problem is None and set(errors) == {"out", "lse", "dq", "dk", "dv"} and max(errors.values()) < 1e-4


@pytest.mark.parametrize("name", [*judge.NAMES, "lse"])
@pytest.mark.parametrize("damage", [1.1, float("nan")])
def test_a_wrong_one_is_refused(name, damage):
    inputs, outputs, lse, config = results()
    if name == "lse":
        lse = lse * damage
    else:
        outputs[judge.NAMES.index(name)] *= damage
    assert f"{name} is wrong by" in judge.judge_moba(inputs, outputs, lse, config)[1]


def test_a_selection_that_is_not_the_best_is_refused(monkeypatch):
    real = judge.select
    monkeypatch.setattr(judge, "select", lambda *inputs: real(*inputs).clamp(max=3))
    assert judge.judge_moba(*results())[1].startswith("the selection of token")


def test_across_ranks_twice_the_error_of_one_is_allowed():
    inputs, outputs, _, _ = results()
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    out = full_attention(*leaves)
    out.backward(inputs[3].double())
    exact = judge.exact_full(*inputs)
    found = [out.detach(), *(x.grad for x in leaves)]
    assert max(judge.distances(found, exact)) < 1e-12
    one = [1e-3] * 4
    assert judge.too_far([x + 1.9e-3 for x in exact], exact, one, False) is None
    assert judge.too_far([exact[0], *(x + 2.9e-3 for x in exact[1:])], exact, one, True) is None
    assert judge.too_far([x + 2.9e-3 for x in exact], exact, one, True).startswith("out is off by 2.9e-03")
    assert judge.too_far([exact[0], exact[1] * torch.nan, *exact[2:]], exact, one, True).startswith("dq is off by nan")


def test_the_timer_times_what_it_says():
    x, said = torch.ones(2, requires_grad=True), []

    def forward():
        said.append("grad" if torch.is_grad_enabled() else "no grad")
        return 2 * x

    passes = Candidate("twice", forward, torch.ones(2), [x], inference=True)
    assert len(time_passes(passes, True, repeats=3, warm_up=2)) == 3 and said == ["grad"] * 5
    assert torch.equal(x.grad, torch.full((2,), 2.0)), "gradients are those of one pass"
    said.clear()
    times = time_passes(passes, False, repeats=2, before=lambda: said.append("before"))
    assert said == ["before", "no grad"] * 2 and min(times) > 0


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="shape '1024,16' is not 6 positive integers"):
        attention.parse_shape("1024,16", 6)


def test_no_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ValueError, match="measures a GPU"):
        attention.main(parser.parse_args([]))


def _row(name, n_tokens, ms):
    return Row("attention", name, n_tokens, shape=(16, 16, 128, 512, 8), forward=ms, both=3 * ms)


def test_the_chart_extrapolates_what_was_not_measured():
    sizes = [2**i for i in range(17, 12, -1)]
    rows = [_row("moba", n, n / 1024) for n in sizes] + [_row("cudnn", n, n**2 / 2**26) for n in sizes[-2:]]
    forward, both = attention.panels(rows)
    curves = {curve.label: sorted(curve.points) for curve in forward.curves}
    assert curves["MoBA, this library"] == [(n, n / 1024) for n in reversed(sizes)]
    assert curves["dense, cuDNN"] == [(8192, 1.0), (16384, 4.0)]
    assert curves["dense, cuDNN, extrapolated"] == [(16384, 4.0), (32768, 16.0), (65536, 64.0), (131072, 256.0)]
    assert sorted(both.curves[0].points)[0] == (8192, 24.0)
    assert attention._over_moba(rows, rows[-1]) == "0.12x / 0.12x" and attention._over_moba(rows, rows[0]) == ""
    pytest.importorskip("matplotlib")
    drawn = figure([forward, both], "title")
    for axis, panel in zip(drawn.axes, (forward, both), strict=True):
        for line, curve in zip(axis.lines, panel.curves, strict=True):
            assert list(zip(*line.get_data(), strict=True)) == sorted(curve.points), curve.label
        assert [text.get_text() for text in axis.get_xticklabels()] == ["8K", "16K", "32K", "64K", "128K"]


def test_shapes_say_how_a_group_selects():
    assert attention.parse_shape("64,4,2,16,16,3,max", 6, ("sum", "max")) == (64, 4, 2, 16, 16, 3, "max")
    for text in ("64,4,2,16,16,3,mean", "64,4,2,16,16,sum", "64,4,2,16,16,3,4"):
        with pytest.raises(ValueError, match="and sum or max or nothing behind them; use e.g."):
            attention.parse_shape(text, 6, ("sum", "max"))
    for text in shape.SHAPES:
        attention.parse_shape(text, 6, ("sum", "max"))


@pytest.mark.parametrize("shared", ["sum", "max"])
def test_a_shared_selection_is_judged(shared):
    inputs, outputs, lse, config = results(heads=(6, 2), config=MoBAConfig(32, 4, shared_by_group=shared))
    assert judge.select(inputs[0], inputs[1], config).shape == (700, 2, 3)
    errors, problem = judge.judge_moba(inputs, outputs, lse, config)
    assert problem is None and max(errors.values()) < 1e-4
    other = MoBAConfig(32, 4, shared_by_group="max" if shared == "sum" else "sum")
    assert "is wrong by" in judge.judge_moba(inputs, outputs, lse, other)[1]


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_tiles_that_peers_attend_to(block_size):
    """Against plain loops: a tile of keys is wanted as soon as one query of a tile of queries selected its block."""
    g = torch.Generator().manual_seed(block_size)
    n = 1000
    current = torch.arange(n) // block_size
    selection = torch.stack([torch.randint(-1, int(b) + 1, (2, 2), generator=g) for b in current]).int()
    selection[selection == current[:, None, None]] = -1
    q, k, v = torch.randn(n, 4, 16), torch.randn(n, 2, 16), torch.randn(n, 2, 16)
    inputs = peers.Inputs([q, k, v], q, selection, block_size)
    assert torch.equal(inputs.whole_selection[..., 2], current[:, None].expand(-1, 2).int())
    wanted = torch.zeros(2, 8, 8, dtype=torch.bool)
    for t in range(n):
        for head in range(2):
            for block in inputs.whole_selection[t, head].tolist():
                if block >= 0:
                    first, last = block * block_size // 128, ((block + 1) * block_size - 1) // 128
                    wanted[head, t // 128, first : min(last, t // 128) + 1] = True
    assert torch.equal(peers.tiles_of(inputs), wanted)
    count, index = peers._lists(wanted)
    for head, row in ((0, 0), (1, 7), (0, 5)):
        assert index[head, row, : count[head, row]].tolist() == wanted[head, row].nonzero()[:, 0].tolist()


def test_a_peer_that_fails_has_a_row_that_says_so(monkeypatch):
    """And one that works is timed, with what it computes instead in its row."""
    q, k, v = (torch.randn(32, h, 16).requires_grad_() for h in (4, 2, 2))
    inputs = peers.Inputs([q, k, v], torch.ones(32, 4, 16), torch.full((32, 2, 2), -1, dtype=torch.int32), 16)
    arguments = argparse.Namespace(repeats=3)
    works = Candidate("nsa", lambda: full_attention(q, k, v), inputs.dout, inputs.leaves, inference=True)
    half = Candidate("nsa", lambda: full_attention(q, k, v).detach(), inputs.dout, inputs.leaves, inference=True)

    def row(make):
        monkeypatch.setitem(peers.PEERS, "nsa", peers.Peer("fla", make, "something else"))
        return attention._peer_row("nsa", inputs, (32, 4, 2, 16, 16, 3, "sum"), arguments)

    found = row(lambda given: works)
    assert found.both > 0 and found.note == "something else" and found.shape == (4, 2, 16, 16, 3, "sum")
    found = row(lambda given: half)
    assert found.forward > 0 and found.both is None and "backward failed, RuntimeError" in found.note
    found = row(lambda given: 1 / 0)
    assert found.forward is None and "forward failed, ZeroDivisionError: division by zero" in found.note


def test_peers_are_those_that_the_command_knows():
    assert tuple(peers.PEERS) == command.SPARSE
    assert not peers.Peer("no_such_package", None, "").is_installed
    assert (
        not peers.Peer("no_such_package.inside", None, "").is_installed and peers.Peer("torch", None, "").is_installed
    )
