"""Training runs as a launcher starts them, one process a rank, which tests stop, kill and starve."""

import signal
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import TIME_SCALE, environment_of, store_of
from tests.helpers.nursery import nursery, started
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged

# The shrunken demo on GPUs, to the bit, with heads of 32, which kernels take.
ON_GPUS = ("model.hidden_size=128", "run.device=cuda", "run.deterministic=true")


def on_two_gpus(test):
    """Marks a test that takes minutes on two GPUs."""
    few = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    return few(pytest.mark.gpu(pytest.mark.slow(pytest.mark.timeout(600)(test))))


class Launched:
    """``moba-cp train`` on ``n`` ranks; ``with`` kills what is left of them.

    Args:
        n: ranks.
        place: the folder of the text (``place / "text"``) and of the ranks' output.
        overrides: of the shrunken demo, ``run.directory`` among them.
        flags: options of the command.
        environment: variables of all ranks.
        preamble: Python code that each rank runs first; it sees ``RANK`` in its environment.
        by_rank: further overrides of some ranks.
        fork: start them quickly; not for GPUs.
    """

    def __init__(
        self,
        n: int,
        place: Path,
        *overrides: str,
        flags: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        preamble: str = "",
        by_rank: dict[int, tuple[str, ...]] | None = None,
        fork: bool = True,
    ):
        settings = [*SHRUNKEN, f"data.path={place / 'text'}", *overrides]
        self._store, self._outputs, self.ranks = store_of(n), [], []
        for rank in range(n):
            own = [*settings, *(by_rank or {}).get(rank, ())]
            words = ["train", str(DEMO), *(word for setting in own for word in ("--set", setting)), *flags]
            variables = {**environment_of(rank, n, self._store.port), **(environment or {})}
            self._outputs.append(place / f"output-{rank}-{time.monotonic_ns()}")
            start = nursery.start if fork else started
            self.ranks.append(start(words, variables, place, self._outputs[-1], preamble))

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def wait(self, rank: int, seconds: float) -> int:
        """The exit code of a rank that ends within ``seconds`` (times TIME_SCALE)."""
        return self.ranks[rank].wait(timeout=seconds * TIME_SCALE)

    def wait_all(self, seconds: float) -> list[int]:
        """The exit codes of all ranks, which end within ``seconds`` (times TIME_SCALE)."""
        end = time.monotonic() + seconds * TIME_SCALE
        return [process.wait(timeout=max(0.0, end - time.monotonic())) for process in self.ranks]

    def wait_for_step(self, folder: Path, step: int, seconds: float = 120) -> None:
        """Return once the log in ``folder`` holds ``step``."""
        end = time.monotonic() + seconds * TIME_SCALE
        while time.monotonic() < end:
            if (folder / "log.jsonl").exists() and step in logged(folder, "step"):
                return
            if all(process.poll() is not None for process in self.ranks):
                break
            time.sleep(0.05)
        raise AssertionError(f"step {step} was not reached:\n" + "\n".join(map(self.output, range(len(self.ranks)))))

    def output(self, rank: int) -> str:
        """What a rank has printed so far."""
        return self._outputs[rank].read_text()
