"""Log, progress line and curve."""

import io
import json
import re
from pathlib import Path

import pytest

from moba_cp.train.curve import draw, smoothed
from moba_cp.train.log import Progress, RunLog, check_folder, human, is_own, read_log


def write_steps(folder, start_step, steps):
    log = RunLog(folder, start_step, "a: 1\n", {"ranks": 2})
    for step in steps:
        log.write({"step": step, "loss": 1 / (step + 1)})
    log.close()
    return [record["step"] for record in read_log(folder / "log.jsonl")]


def test_new_run_starts_an_empty_log_and_removes_what_an_earlier_one_left(tmp_path):
    folder = tmp_path / "a" / "run"
    assert write_steps(folder, 0, [0, 1, 2]) == [0, 1, 2]
    for left in ("loss.png", "error-rank1.txt", "notes.txt"):
        (folder / left).write_text("x")
    checkpoint = folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir()
    (checkpoint / "meta.json").write_text("{}")
    assert write_steps(folder, 0, [0, 1]) == [0, 1]
    assert {path.name for path in folder.iterdir()} == {
        "log.jsonl", "config.yaml", "versions.json", "notes.txt", "checkpoints"
    }  # fmt: skip
    # What is replaced stays until this run has a checkpoint of its own.
    aside = {re.sub("superseded-[0-9a-f]{8}-", "", path.name): path for path in (folder / "checkpoints").iterdir()}
    assert set(aside) == {"log.jsonl", "loss.png", "step-00000002"}
    assert [record["step"] for record in read_log(aside["log.jsonl"])] == [0, 1, 2]
    assert (folder / "config.yaml").read_text() == "a: 1\n"
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["ranks"] == 2 and versions["torch"] and versions["python"]


def test_resumed_run_goes_on_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, 0, range(8))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    assert write_steps(tmp_path, 5, [6, 7]) == [0, 1, 2, 3, 4, 5, 6, 7]


class FullDisk:
    """A file that takes ``room`` more bytes."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self._file.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self):
        self._file.close()


def test_lines_that_a_full_disk_does_not_take_follow_later(tmp_path):
    log = RunLog(tmp_path, 0, "", {}, patient=True)
    log._file = disk = FullDisk(log._file, 20)
    assert log.write({"step": 1}) is None
    # Half of the second line fits.
    assert "log.jsonl: could not be written: No space left on device" in log.write({"step": 2})
    assert log.write({"step": 3}) is not None
    disk.room = 10**6
    assert log.write({"step": 4}) is None and log.close() is None
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    log = RunLog(tmp_path, 0, "", {})
    log._file = FullDisk(log._file, 0)
    with pytest.raises(OSError, match="No space"):
        log.write({"step": 1})


def test_resumed_run_sets_the_checkpoints_after_its_own_aside(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for name in ("step-00000002", "step-00000004", "step-00000006", "step-00000003.partial"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "meta.json").write_text("{}")
    write_steps(tmp_path, 4, [5])
    names = {re.sub("superseded-[0-9a-f]{8}", "aside", path.name) for path in checkpoints.iterdir()}
    assert names == {"step-00000002", "step-00000004", "aside-step-00000006"}


def test_only_a_checkpoint_of_the_folder_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, step = Path("runs/a"), "checkpoints/step-00000002"
    assert is_own(run, run / step) and is_own(run, tmp_path / run / step)
    assert not is_own(run, None) and not is_own(run, Path("runs/b") / step) and not is_own(Path("runs"), run / step)


@pytest.mark.parametrize("own, overwrite", [(True, False), (False, True)])
def test_folder_of_an_earlier_run_needs_a_word(tmp_path, own, overwrite):
    write_steps(tmp_path, 0, [1])
    check_folder(tmp_path, own, overwrite)
    with pytest.raises(ValueError, match=r"earlier run that has saved no checkpoint; replace it \(--overwrite\) or"):
        check_folder(tmp_path, False, False)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"earlier run; go on with it \(--resume\), replace it \(--overwrite\) or"):
        check_folder(tmp_path, False, False)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["config.yaml", "loss.png", "checkpoints"])
def test_what_no_run_has_written_is_not_replaced(tmp_path, name, overwrite):
    (tmp_path / name).mkdir()
    with pytest.raises(
        ValueError, match=f"holds {name} but no log.jsonl, so not of an earlier run; the run would repl"
    ):
        check_folder(tmp_path, False, overwrite)


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"{tmp_path} is not writable"):
        check_folder(tmp_path / "a" / "b", False, False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal():
    stream = Terminal()
    progress = Progress(120, 0, stream)
    for step in (8, 9, 10, 11):
        progress.show(step, 2.25, 12345.0, 3 * 2**20, 2.75 if step == 9 else None)
    progress.close()
    first, second = stream.getvalue().removesuffix("\n").split("\n")
    assert first.count("\r") == second.count("\r") == 2, "a validation loss stays, all else is rewritten"
    assert first.endswith("step 9/120  loss 2.2500  validation 2.7500  12.3 k tokens/s  0:00 left")
    assert second.endswith("step 11/120  loss 2.2500  12.3 k tokens/s  3.00 MiB sent  0:00 left")


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("validation", [None, 12.3456])
def test_progress_fits_the_terminal_and_leaves_nothing_of_a_longer_line(monkeypatch, columns, validation):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    progress = Progress(28610, 0, stream)
    progress.show(28600, 12.3456, 812345.0, 999 * 2**40)
    progress.started -= 1e6
    progress.show(28601, 12.3456, 812345.0, 999 * 2**40, validation)
    progress.show(28602, 2.3, 1.0, 0)
    lines = [line for line in stream.getvalue().replace("\n", "\r").split("\r") if line]
    assert all(len(line) < columns for line in lines) and len(lines) == 3
    assert validation is not None or len(lines[2]) >= len(lines[1])
    assert all(line.startswith("step 286") and "loss" in line for line in lines)
    assert columns == 40 or "left" in lines[1]


def test_running_mean_starts_unbiased():
    points = [(1, 8.0), (2, 2.0), (3, 2.0)]
    means = [mean for _, mean in smoothed(points)]
    # Weights 0.9 and 1, then 0.81, 0.9 and 1: a mean of what there is.
    assert means == pytest.approx([8.0, (0.9 * 8 + 2) / 1.9, (0.81 * 8 + 0.9 * 2 + 2) / 2.71])


def test_progress_in_a_file_is_a_line_now_and_then():
    stream = io.StringIO()
    progress = Progress(50, 0, stream)
    for step in range(1, 51):
        progress.show(step, 2.5, 1.0, 0, 2.0 if step == 30 else None)
    progress.close()
    shown = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert shown == ["1/50", "30/50", "50/50"]


@pytest.mark.parametrize(
    "number, unit, base, text",
    [
        (0, "B", 1024, "0 B"),
        (1023, "B", 1024, "1023 B"),
        (1536, "B", 1024, "1.50 KiB"),
        (20 * 2**40, "B", 1024, "20.0 TiB"),
        (853_100, "parameters", 1000, "853.1 k parameters"),
        (2.5e16, "FLOP", 1000, "25.0 P FLOP"),
        (2.5e22, "FLOP", 1000, "25000.0 E FLOP"),
    ],
)
def test_numbers_for_people(number, unit, base, text):
    assert human(number, unit, base) == text


def test_curve_shows_both_losses(tmp_path):
    log = tmp_path / "log.jsonl"
    records = [{"step": 0, "validation_loss": 5.5}]
    records += [{"step": step, "loss": 5 / step, "validation_loss": 5.1 / step} for step in range(1, 30)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    draw(log, tmp_path / "loss.png", "a run")
    from matplotlib import image

    pixels = image.imread(tmp_path / "loss.png")[..., :3]
    blue = (pixels[..., 2] > 0.6) & (pixels[..., 0] < 0.3)
    orange = (pixels[..., 0] > 0.9) & (pixels[..., 2] < 0.2)
    assert blue.sum() > 200 and orange.sum() > 200
    assert not list(tmp_path.glob("*.partial"))
