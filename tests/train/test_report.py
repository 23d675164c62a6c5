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


class FullSink:
    """Charts on a disk that is full after one step."""

    def __init__(self):
        self.steps = []

    def write(self, step, values):
        self.steps.append(step)
        if step > 1:
            raise OSError(28, "No space left on device")

    def close(self):
        raise OSError(28, "No space left on device")


def test_charts_that_cannot_be_written_end_no_run(tmp_path, reporter, monkeypatch, capsys):
    sinks = [FullSink(), FullSink()]
    monkeypatch.setattr("moba_cp.train.report.open_sinks", lambda *arguments: sinks[:1])
    with reporter:
        for step in (1, 2, 3):
            reporter.report(RECORD | {"step": step})
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2, 3] and sinks[0].steps == [1, 2]
    assert capsys.readouterr().err.count("reports beside the log end here: OSError: [Errno 28] No space left") == 1
    monkeypatch.setattr("moba_cp.train.report.open_sinks", lambda *arguments: sinks[1:])
    with reporter:
        pass
    assert "reports beside the log end here" in capsys.readouterr().err


def test_a_run_that_is_killed_has_the_curve_of_its_last_checkpoint(tmp_path, reporter):
    reporter.__enter__()
    reporter.report(RECORD | {"step": 1})
    reporter.draw()
    assert (tmp_path / "loss.png").exists()
