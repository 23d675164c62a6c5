"""A real Slurm of two nodes on this machine, for the tests of ``launchers/slurm.sbatch``: its daemons, in a folder."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.helpers.distributed import TIME_SCALE

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
# Two slurmd on one machine stand for two nodes; their names do not resolve, as in clusters without DNS for nodes.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,sched_min_interval=0
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "needs root, to start Slurm's daemons"


class Slurm:
    """The daemons, while it is entered; ``folder`` is theirs."""

    def __init__(self, folder: Path):
        self.folder, self._daemons = folder, []
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Slurm":
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir()
        text = _CONFIG.format(host=socket.gethostname(), folder=self.folder, ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        try:
            self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge)
            self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", node)
            self._wait_for(lambda: self("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self("scancel", "--state=RUNNING")
            self("scancel", "--state=PENDING")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def __call__(self, *command: str, **options) -> str:
        """Run a command of Slurm's; returns what it printed."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60, **options)
        return done.stdout

    def submit(self, cwd: Path, *command: str, **variables: str) -> "Job":
        """``sbatch`` with ``command`` in ``cwd``."""
        environment = self.environment | {"SBATCH_OUTPUT": str(cwd / "slurm-%j.out"), **variables}
        done = subprocess.run(
            ["sbatch", *command], cwd=cwd, capture_output=True, text=True, env=environment, timeout=60, check=True
        )
        return Job(self, int(done.stdout.split()[-1]), cwd)

    def _start(self, *command: str) -> None:
        with open(self.folder / "log" / f"{len(self._daemons)}-{command[0]}", "wb") as log:
            self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment))

    def _wait_for(self, condition, what: str) -> None:
        limit = time.monotonic() + 30 * TIME_SCALE
        while not condition():
            logs = "\n".join(path.read_text() for path in sorted((self.folder / "log").iterdir()))
            assert time.monotonic() < limit, f"{what} did not come:\n{logs}"
            time.sleep(0.2)


class Job:
    """A submitted job."""

    def __init__(self, slurm: Slurm, number: int, cwd: Path):
        self.slurm, self.number = slurm, number
        self._output = cwd / f"slurm-{number}.out"

    @property
    def output(self) -> str:
        """What it has printed so far, of all its starts."""
        return self._output.read_text() if self._output.exists() else ""

    def facts(self) -> dict[str, str]:
        """What Slurm says of it: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm("scontrol", "show", "job", str(self.number))))

    def wait(self, *states: str, seconds: float = 60) -> dict[str, str]:
        """Its facts once it is in one of ``states``."""
        limit = time.monotonic() + seconds * TIME_SCALE
        while (facts := self.facts()).get("JobState") not in states:
            assert time.monotonic() < limit, f"{facts.get('JobState')} instead of {states}:\n{self.output}"
            time.sleep(0.1)
        return facts

    def wait_until(self, condition, seconds: float = 60) -> None:
        """Wait for a condition while it runs."""
        limit = time.monotonic() + seconds * TIME_SCALE
        while not condition():
            state = self.facts().get("JobState")
            # What an ending job did last may have come since the condition was looked at.
            assert state not in ("COMPLETED", "FAILED") or condition(), f"{state}:\n{self.output}"
            assert time.monotonic() < limit, self.output
            time.sleep(0.05)

    def start_now(self) -> None:
        """Slurm keeps a requeued job for two minutes: do not wait for them, but until its old credentials, which are
        revoked up to the second in which it was requeued, cannot be taken for the new ones."""
        time.sleep(2.0)
        self.slurm("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def warn(self) -> None:
        """The signal that Slurm sends to the batch script before the time is over (--signal=B:USR2)."""
        self.slurm("scancel", "--batch", "--signal=USR2", str(self.number))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
