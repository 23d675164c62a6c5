"""Processes that start quickly: forked from one that has imported everything already.

A campaign of kills starts hundreds of ranks; importing PyTorch and Megatron takes most of a short run's time.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Forked:
    """One process, as :class:`subprocess.Popen` is: ``pid``, ``poll``, ``wait``, ``send_signal``."""

    def __init__(self, pid: int, status: Path):
        self.pid, self._status, self.returncode = pid, status, None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None and self._status.exists() and (text := self._status.read_text()).endswith("\n"):
            self.returncode = int(text)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code of a process that ends in time."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def started(arguments: list[str], variables: dict[str, str], folder: Path, output: Path, script: str):
    """:meth:`Nursery.start` without a fork: CUDA does not survive one where the parent has looked for GPUs."""
    code = f"import sys\n{script}\nfrom moba_cp import cli\nsys.exit(cli.main(sys.argv[1:]))"
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
    with open(output, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=environment, cwd=folder, stdout=file, stderr=file
        )


class Nursery:
    """The process that the others are forked from; started at the first use, gone with this one."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def start(self, arguments: list[str], variables: dict[str, str], folder: Path, output: Path, script: str) -> Forked:
        """``moba-cp`` with ``arguments`` after the Python code ``script``, in ``folder``, printing into ``output``."""
        status = output.with_name(output.name + ".code")
        request = {"arguments": arguments, "variables": variables, "folder": str(folder), "script": script}
        request |= {"output": str(output), "status": str(status)}
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.helpers.nursery"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                )
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return Forked(int(self._process.stdout.readline()), status)


nursery = Nursery()


def main() -> None:
    """Fork what is asked for on stdin, and write down how each process ended."""
    import matplotlib.pyplot  # noqa: F401
    import torch

    import moba_cp.train.start  # noqa: F401

    torch.set_num_threads(1)
    running: dict[int, str] = {}
    lock = threading.Lock()

    def reap() -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                time.sleep(0.01)
                continue
            with lock:
                path = running.pop(pid)
            Path(path).write_text(f"{os.waitstatus_to_exitcode(status)}\n")

    threading.Thread(target=reap, daemon=True).start()
    for line in sys.stdin:
        request = json.loads(line)
        with lock:
            pid = os.fork()
            if pid:
                running[pid] = request["status"]
        if pid == 0:
            _child(request)
        print(pid, flush=True)
    for pid in list(running):
        os.kill(pid, signal.SIGKILL)


def _child(request: dict) -> None:
    code = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.environ.update(request["variables"])
        os.chdir(request["folder"])
        sys.argv = ["moba-cp", *request["arguments"]]
        exec(request["script"], {"__name__": "script"})
        from moba_cp import cli

        code = cli.main(request["arguments"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
