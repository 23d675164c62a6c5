import argparse

import pytest
import torch

from moba_cp import MoBAConfig, moba_attention
from moba_cp.bench import attention
from moba_cp.bench.attention_chart import draw
from moba_cp.bench.attention_check import check


def results(n=700, heads=(4, 2), dim=16, config=MoBAConfig(32, 4)):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(n, h, dim) for h in (heads[0], heads[1], heads[1], heads[0]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = moba_attention(*leaves, config, return_lse=True)
    out.backward(dout)
    return [*(x.detach() for x in leaves), dout, out.detach(), lse, [x.grad for x in leaves], config]


def test_check_accepts_the_right_result():
    errors, problem = check(*results())
    assert problem is None and set(errors) == {"out", "lse", "dq", "dk", "dv"} and max(errors.values()) < 1e-4


@pytest.mark.parametrize("name, index", [("out", 4), ("lse", 5), ("dq", 0), ("dk", 1), ("dv", 2)])
@pytest.mark.parametrize("damage", [1.1, float("nan")])
def test_check_refuses_a_wrong_one(name, index, damage):
    arguments = results()
    target = arguments[6] if name.startswith("d") else arguments
    target[index] = target[index] * damage
    assert name in check(*arguments)[1]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="shape '1024,16' is not 6 positive integers"):
        attention.parse_shape("1024,16", 6)


def test_no_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    with pytest.raises(ValueError, match="measures a GPU"):
        attention.main(parser.parse_args([]))


def test_chart_marks_what_was_not_measured(tmp_path):
    pytest.importorskip("matplotlib")
    time = lambda t: attention.Time(t, 0.1, 3 * t, 0.1)
    rows = [attention.Row((2**i, 16, 16, 128, 512, 8), time(2.0**i), 1.0, {}) for i in range(13, 18)]
    rows[0].dense["cudnn"] = rows[1].dense["cudnn"] = time(5.0)
    draw(str(tmp_path / "chart.png"), rows, dict(gpu="g", torch="t", triton="3", commit="c"))
    assert (tmp_path / "chart.png").stat().st_size > 10_000
