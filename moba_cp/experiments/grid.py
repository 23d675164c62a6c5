"""Runs a grid of training runs: several side by side, those that are done skipped, none begun that cannot end in time.

Each run is ``moba-cp train`` on a config of its own. When it is done its folder gets ``summary.json``, with what charts
need, and its checkpoints go, unless another run begins with its weights or it finds keys again. Runs are trained one
after another in processes that stay, since starting PyTorch takes longer than the smallest runs.
"""

import contextlib
import gc
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread

from ..train.config import TrainConfig
from ..train.log import CHECKPOINTS, LOG, read_log
from ..train.predict import GPUS, forecast
from ..train.yaml_config import load, to_dict, to_yaml
from .runs import RESULTS, Run
from .tokens import bytes_per_token

SUMMARY = "summary.json"
DAY = 8.64e19
"""FLOP of a PFLOP/s-day."""
# Keys of a config that do not change what is learned.
_PLACES = {"run": ("directory", "start_from", "device", "timeout_seconds"), "data": ("path", "validation_path")}
SECONDS_TO_SAVE = 20.0
"""How long a run that is asked to stop may take."""
# Seconds of the host for each layer and sequence, forward and backward; of a run's beginning, validations and end; and
# how much slower small models are than the rates of large ones. Of 95 runs on an H200, four at a time, nine in ten took
# 0.8 to 1.5 times what 9.3 ms and 1.9 times say, the others 0.67 to 2.1 times. An H100 takes 15 % longer.
_LAYER_SECONDS, _RUN_SECONDS, _SMALL_MODELS = 1.07e-2, 15.0, 2.2

_RETRIEVAL = "retrieval"
# Runs that fail before the first that does not.
_HOPELESS = 3


@dataclass(frozen=True)
class Slot:
    """A process that trains one run at a time."""

    index: int
    gpu: str | None
    """What CUDA_VISIBLE_DEVICES is set to; None to leave it."""


def identity(config: TrainConfig) -> dict:
    """What has to be equal for two configs to be the same run."""
    values = to_dict(config)
    for section, names in _PLACES.items():
        for name in names:
            values[section].pop(name)
    return values


def summary_of(run: Run) -> dict | None:
    """What the run's folder says of a run that is done; None if it is not.

    Raises:
        ValueError: the folder holds another run.
    """
    file = Path(run.config.run.directory) / SUMMARY
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["config"] != identity(run.config):
        raise ValueError(f"{file.parent}: holds a run of another config; name another --directory, or remove it")
    return found


def flops(run: Run) -> float:
    """6 * parameters * tokens, without embeddings and attention, as the paper counts compute; its parent's included."""
    return 6.0 * run.n_parameters * run.tokens


def estimate(run: Run, correction: float = 1.0) -> float:
    """Seconds on an H100; ``correction``: how much longer steps took than they were estimated to."""
    return _RUN_SECONDS + correction * run.config.run.steps * _step_seconds(run)


def _step_seconds(run: Run) -> float:
    config, data = run.config, run.config.data
    per_step = data.seq_len * data.sequences_per_step
    # A document sees itself alone, however many are packed together.
    alone = replace(data, seq_len=run.length, sequences_per_step=max(1, per_step // run.length))
    step = _SMALL_MODELS * forecast(replace(config, data=alone), 1, GPUS["h100"]).step_seconds
    return step + data.sequences_per_step * _LAYER_SECONDS * config.model.n_layers


class Grid:
    """The runs that are to be done.

    Args:
        runs: in the order in which they are begun; those that they begin with are added before them.
        corpus: hash of the text, which a run that is done must have been trained on; None for any. What gives it later
            is waited for: until then runs that find keys are trained alone.
        slots: processes.
        deadline: in seconds of ``time.monotonic()``, when all must have ended; None for never.
        say: takes a line for people.
    """

    def __init__(
        self,
        runs: Iterable[Run],
        folder: Path,
        corpus: str | Future[str] | None,
        slots: list[Slot],
        deadline: float | None = None,
        say: Callable[[str], None] = print,
    ):
        self.runs = list({each.name: each for run in runs for each in run.lineage}.values())
        self.folder, self.slots, self.deadline, self.say = folder, slots, deadline, say
        self._coming = corpus if isinstance(corpus, Future) else None
        self.corpus = None if isinstance(corpus, Future) else corpus
        self._estimated = self._measured = 0.0
        self._children = {
            run.name: [x for x in self.runs if x.parent is not None and x.parent.name == run.name] for run in self.runs
        }

    def done(self, run: Run) -> bool:
        """Whether nothing is left to do of a run: it was trained, on this text, and its weights are there if needed."""
        found = summary_of(run)
        if found is None:
            return False
        if self.corpus is not None and found["corpus"] not in (None, self.corpus):
            raise ValueError(
                f"{run.config.run.directory}: was trained on other text ({found['corpus']}, not {self.corpus}); name "
                "another --directory"
            )
        needed = not all(map(self.done, self._children[run.name]))
        return not needed or (Path(run.config.run.directory) / CHECKPOINTS).is_dir()

    def execute(self) -> list[str]:
        """Train what is not done; returns the names of the runs that failed, twice and in two processes.

        At the deadline the runs that are not done save and end, as they do when asked to stop, or are ended.
        """
        waiting = [run for run in self.runs if not self.done(run)]
        self.say(f"{len(self.runs)} runs, {len(self.runs) - len(waiting)} of them done")
        workers = {slot: Worker(slot) for slot in self.slots} if waiting else {}
        busy: dict[Future, tuple[Slot, Run, float]] = {}
        failed: list[str] = []
        tried: list[str] = []
        try:
            while waiting or busy or self._coming is not None:
                if waiting and len(failed) >= _HOPELESS and not self._measured:
                    self.say(f"{len(failed)} runs failed and none went well: nothing more is begun")
                    waiting.clear()
                for slot in self.slots:
                    if all(slot is not used for used, _, _ in busy.values()):
                        run = self._next(waiting, busy, failed)
                        if run is not None:
                            waiting.remove(run)
                            busy[self._begin(workers[slot], run)] = slot, run, time.monotonic()
                if not busy and self._coming is None:
                    break
                coming = [] if self._coming is None else [self._coming]
                ended, _ = wait([*busy, *coming], self._patience(), FIRST_COMPLETED)
                if self._coming in ended:
                    self.corpus, self._coming = self._coming.result(), None
                    # Those that are done must have seen it.
                    for run in self.runs:
                        self.done(run)
                    continue
                for slot, _, _ in () if ended else busy.values():
                    workers[slot].stop()
                for future in ended:
                    slot, run, begun = busy.pop(future)
                    if self._finish(future, run, time.monotonic() - begun):
                        continue
                    if not workers[slot].stopping:
                        (failed if run.name in tried else tried).append(run.name)
                        if run.name not in failed:
                            waiting.insert(0, run)
                    # Whatever went wrong is not to be found by the next run.
                    workers[slot].close()
                    workers[slot] = Worker(slot)
        finally:
            for worker in workers.values():
                worker.close()
        if waiting:
            self.say(f"left for another time: {', '.join(run.name for run in waiting)}")
        return failed

    def _patience(self) -> float | None:
        """Seconds until runs that go on are asked to stop, and after that until they are asked for the second time."""
        if self.deadline is None:
            return None
        left = self.deadline - time.monotonic()
        return left if left > 0 else SECONDS_TO_SAVE

    def seconds_of(self, run: Run) -> float:
        """What a run takes, by what the steps of those before took."""
        return estimate(run, self._measured / self._estimated if self._estimated else 1.0)

    def _next(self, waiting: list[Run], busy: dict, failed: list[str]) -> Run | None:
        """The first run that can be begun: its parent is done, and there is time for it."""
        going = {run.name for _, run, _ in busy.values()}
        for run in waiting:
            parent = run.parent
            if self._coming is not None and not run.finds_keys:
                continue
            if parent is not None and (parent.name in going or parent.name in failed or not self.done(parent)):
                continue
            if self.deadline is None or time.monotonic() + self.seconds_of(run) < self.deadline:
                return run
        return None

    def _begin(self, worker: "Worker", run: Run) -> Future:
        file = write_config(run, self.folder)
        return worker.pool.submit(_train, str(file), str(self.folder / "output" / f"{run.name}.txt"), run.tests)

    def _finish(self, future: Future, run: Run, seconds: float) -> bool:
        error = future.exception()
        if error is not None:
            self.say(f"{run.name}: not done ({str(error) or type(error).__name__}); see output/{run.name}.txt")
            return False
        found = summarize(run, None if run.finds_keys else self.corpus, seconds)
        # The first steps of a process compile, so take the median.
        self._measured += run.config.run.steps * found["step_seconds"]
        self._estimated += run.config.run.steps * _step_seconds(run)
        # Some runs need the weights of others, and what finds keys again answers in `moba-cp generate`.
        for x in (run, run.parent):
            if x is not None and _RETRIEVAL not in x.tests and all(map(self.done, self._children[x.name])):
                shutil.rmtree(Path(x.config.run.directory) / CHECKPOINTS, ignore_errors=True)
        for name in run.tests:
            if name not in found:
                self.say(f"{run.name}: the test {name} failed; see output/{run.name}.txt")
        loss = found["validation_loss"]
        self.say(f"{run.name}: loss {loss:.4f}, {seconds:.0f} s")
        return True


class Worker:
    """The process of a slot."""

    def __init__(self, slot: Slot):
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _start_worker, (slot.gpu,))
        self.stopping = False
        self._pid = self.pool.submit(os.getpid)

    def stop(self) -> None:
        """Ask the run to save and end; the second time, end it."""
        with contextlib.suppress(ProcessLookupError, BrokenProcessPool):
            os.kill(self._pid.result(), signal.SIGKILL if self.stopping else signal.SIGTERM)
        self.stopping = True

    def close(self) -> None:
        """End the process when it is idle."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def write_config(run: Run, folder: Path) -> Path:
    """Write the config that ``moba-cp train`` takes; beside the run's folder, which the trainer wants to itself."""
    file = folder / "configs" / f"{run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(run.config), encoding="utf-8")
    return file


def take_over(run: Run, corpus: str | None) -> bool:
    """Summarize a run that was trained by ``moba-cp train`` itself; whether there was one to its last step."""
    records = read_log(Path(run.config.run.directory) / LOG)
    complete = bool(records) and records[-1]["step"] == run.config.run.steps and "validation_loss" in records[-1]
    # What it has to be put to is asked when the grid trains it.
    if summary_of(run) is not None or run.tests or not complete:
        return False
    summarize(run, None if run.finds_keys else corpus, sum(record.get("seconds") or 0 for record in records))
    return True


def summarize(run: Run, corpus: str | None, seconds: float) -> dict:
    """Write and return ``summary.json`` of a run that was trained to its last step.

    Raises:
        ValueError: its log does not end with a validation at the last step.
    """
    folder = Path(run.config.run.directory)
    records = read_log(folder / LOG)
    last = records[-1] if records else {}
    if last.get("step") != run.config.run.steps or not math.isfinite(last.get("validation_loss") or math.nan):
        raise ValueError(f"{folder / LOG}: does not end with a validation of step {run.config.run.steps}")
    found = {
        "name": run.name,
        "facts": run.facts,
        "length": run.length,
        "parameters": run.n_parameters,
        "tokens": run.tokens,
        "flop": flops(run),
        "pflops_days": flops(run) / DAY,
        "validation_loss": last["validation_loss"],
        "bytes_per_token": bytes_per_token(run.config.data.validation_path or ""),
        "by_position": last.get("validation_by_position", []),
        "training_loss": last["loss"],
        "seconds": round(seconds, 1),
        "step_seconds": statistics.median(record["seconds"] for record in records if record.get("seconds")),
        "corpus": corpus,
        **(json.loads((folder / RESULTS).read_text(encoding="utf-8")) if run.tests else {}),
        "config": identity(run.config),
    }
    partial = folder / f"{SUMMARY}.partial"
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / SUMMARY)
    return found


def _start_worker(gpu: str | None) -> None:
    # PyTorch reads it when it first looks for GPUs, which nothing has done yet in this process.
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if (parent := parent_process()) is not None:
        # A first process that is killed cannot end the others, which would train on beside those of the next one.
        Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _train(config: str, output: str, tests: dict) -> None:
    """Train one run in this process, and put it to the ``tests``; what it prints goes into the file ``output``."""
    from ..train import command
    from ..train.mesh import close_mesh

    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with (
        open(output, "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            code = command.main(
                Namespace(config=config, overrides=[], resume="auto", overwrite=False, dry_run=False, ranks=None)
            )
            if tests and not code:
                from .tests import run_tests

                run_tests(load(TrainConfig, config), tests)
        except BaseException:
            import traceback

            traceback.print_exc(file=file)
            raise
        finally:
            close_mesh()
            _free_memory()
    if code:
        raise RuntimeError(f"ended with exit code {code}")


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
