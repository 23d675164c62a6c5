"""What a run leaves behind however it ends."""

from types import SimpleNamespace

import pytest

from moba_cp.train.config import RunConfig, TrainConfig
from moba_cp.train.log import read_log
from moba_cp.train.memory import MemoryPlan
from moba_cp.train.report import Reporter

RECORD = {"loss": 2.0, "attention": "moba", "tokens_per_second": 10.0, "exchange": {"sent_bytes": 0}}
KEPT = MemoryPlan((), {}, 0)


@pytest.fixture
def reporter(tmp_path):
    """A reporter of the first rank that writes into tmp_path."""
    plan = SimpleNamespace(config=TrainConfig(run=RunConfig(str(tmp_path), steps=9)), size=2, context_size=2,
                           corpus=SimpleNamespace(unit="bytes"))  # fmt: skip
    return Reporter(plan, SimpleNamespace(first=True, device=SimpleNamespace(type="cpu")), 0, None, KEPT)


def test_a_run_that_ends_badly_has_a_curve(tmp_path, reporter, capsys):
    with pytest.raises(RuntimeError, match="disk"), reporter:
        reporter.start(5.5)
        reporter.report(RECORD | {"step": 1})
        raise RuntimeError("the disk is gone")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [0, 1]
    assert "step 0/9  validation 5.5000\n" in capsys.readouterr().err


def test_a_curve_that_cannot_be_drawn_hides_no_error_and_ends_no_run(reporter, monkeypatch, capsys):
    monkeypatch.setattr("moba_cp.train.report.draw", lambda *arguments: 1 / 0)
    with pytest.raises(RuntimeError, match="disk"), reporter:
        raise RuntimeError("the disk is gone")
    capsys.readouterr()
    with reporter:
        reporter.draw()
    assert capsys.readouterr().err.count("loss.png could not be drawn: ZeroDivisionError") == 2


def test_a_run_that_is_killed_has_the_curve_of_its_last_checkpoint(tmp_path, reporter):
    reporter.__enter__()
    reporter.report(RECORD | {"step": 1})
    reporter.draw()
    assert (tmp_path / "loss.png").exists()
