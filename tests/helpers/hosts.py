"""Two hosts on this machine: network namespaces with an address each, joined by a cable that can be cut."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.helpers.distributed import TIME_SCALE

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if shutil.which("ip") is None:
        return "needs ip: apt-get install iproute2"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    made = subprocess.run(["ip", "netns", "add", "moba-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "moba-probe"], capture_output=True)
    return None if made.returncode == 0 else f"cannot make network namespaces: {made.stderr.strip()}"


class TwoHosts:
    """The hosts, while it is entered."""

    def __init__(self):
        self._names = [f"moba-{os.getpid()}-{i}" for i in (0, 1)]
        self.commands: list[Command] = []

    def __enter__(self) -> "TwoHosts":
        links = [f"moba{os.getpid() % 10**6}{i}" for i in "ab"]
        for name in self._names:
            _ip("netns", "add", name)
        _ip("link", "add", links[0], "netns", self._names[0], "type", "veth", "peer", links[1], "netns", self._names[1])
        self._links = links
        for name, link, address in zip(self._names, links, ADDRESSES):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", link, "up")
        return self

    def __exit__(self, *exception) -> None:
        for command in self.commands:
            command.kill()
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(self, host: int, output: Path, *command: str, cwd: Path) -> "Command":
        """Start a command on a host; what it prints is added to ``output``."""
        self.commands.append(Command(["ip", "netns", "exec", self._names[host], *command], output, cwd))
        return self.commands[-1]

    def link(self, host: int) -> str:
        """The name of a host's card."""
        return self._links[host]

    def hold_to(self, mbit: int) -> None:
        """Hold the link to so many Mbit/s, in each direction."""
        for name, link in zip(self._names, self._links):
            limit = ["rate", f"{mbit}mbit", "burst", "256kb", "latency", "200ms"]
            done = subprocess.run(
                ["ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", link, "root", "tbf", *limit],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"tc: {done.stderr}"

    def power_off(self, host: int) -> None:
        """Nothing more comes from a host: its cable is cut, then what runs there is killed."""
        _ip("-n", self._names[host], "link", "set", self._links[host], "down")
        listed = subprocess.run(["ip", "netns", "pids", self._names[host]], capture_output=True, text=True).stdout
        for pid in listed.split():
            os.kill(int(pid), signal.SIGKILL)

    def power_on(self, host: int) -> None:
        """The cable is there again."""
        _ip("-n", self._names[host], "link", "set", self._links[host], "up")


class Command:
    """A command that runs on a host."""

    def __init__(self, words: list[str], output: Path, cwd: Path):
        self._output = output
        with open(output, "ab") as file:
            self._process = subprocess.Popen(words, stdout=file, stderr=file, cwd=cwd, start_new_session=True)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def wait(self, seconds: float) -> int:
        """Its exit code; it is killed and an error is raised if it has not ended after ``seconds``."""
        try:
            return self._process.wait(seconds * TIME_SCALE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.output}") from None

    def wait_until(self, condition, seconds: float) -> float:
        """Wait for a condition while it runs; returns the seconds that it took."""
        began = time.monotonic()
        while not condition():
            assert self._process.poll() is None, f"ended with {self._process.returncode}:\n{self.output}"
            assert time.monotonic() - began < seconds * TIME_SCALE, self.output
            time.sleep(0.05)
        return time.monotonic() - began

    def signal(self, number: int) -> None:
        """Send it a signal, and none to what it started."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it and what it started."""
        for pid in _family(self._process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.wait()


def _family(pid: int) -> list[int]:
    import psutil

    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
