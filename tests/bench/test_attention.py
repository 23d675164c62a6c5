import argparse

import pytest
import torch

from moba_cp import MoBAConfig, full_attention, moba_attention
from moba_cp.bench import attention, judge
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
