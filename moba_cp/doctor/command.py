"""``moba-cp doctor``: the options, and how machines report to one another without a rendezvous.

The first process of each machine checks it and writes what it found into a folder that all see; the first machine waits
for the others and writes a verdict. Only where every machine passed do ranks meet and check what lies between them.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .finding import WRONG, Finding

EXAMPLES = """examples:
  moba-cp doctor                                              this machine
  torchrun --nproc-per-node 8 --no-python moba-cp doctor      this machine, and what lies between its GPUs
  srun --nodes=4 --ntasks-per-node=1 moba-cp doctor           each machine of a Slurm allocation for itself
  sbatch --nodes=4 --gpus-per-node=8 launchers/slurm.sbatch -m moba_cp doctor     and what lies between all GPUs

exit codes: 0 all checks passed, 2 wrong options, 3 a check failed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--folder", type=Path, default=Path("."), help="where runs will be written (default: here)")
    parser.add_argument("--gpus", type=int, help="how many a machine should have (default: as the driver says)")
    parser.add_argument("--disk-gib", type=float, default=10.0, help="room that runs need (default: %(default)s)")
    parser.add_argument("--memory-gib", type=float, default=4.0, help="host memory expected (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=180.0,
        help="limit for a GPU, and for machines to report (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Check, print, and return 0 or :data:`~moba_cp.doctor.finding.WRONG`.

    Raises:
        ValueError: a wrong option.
    """
    if not arguments.folder.is_dir():
        raise ValueError(f"folder={arguments.folder}: no such folder; name one where runs will be written")
    for name in ("disk_gib", "memory_gib", "seconds"):
        if not getattr(arguments, name) >= 0:
            raise ValueError(f"{name.replace('_', '-')}={getattr(arguments, name)} is below 0")
    nodes = Nodes.of(os.environ, arguments.folder.absolute())
    found = _checked_nodes(nodes, arguments)
    passed = all(finding.passed for findings in found.values() for finding in findings)
    across: list[Finding] = []
    if passed and nodes.ranks > 1:
        across = _checked_ranks(arguments)
        passed = all(finding.passed for finding in across)
    if nodes.first:
        _print(found, across, arguments.json, nodes)
        nodes.leave()
    return 0 if passed else WRONG


class Nodes:
    """This process among the machines that check themselves at the same time.

    Args:
        name: this machine's.
        count: machines.
        leads: whether this process checks its machine.
        first: whether it gives the verdict.
        ranks: processes that will meet; 1 where none do.
        folder: where machines report; None where this is the only process.
        names: of all machines, where the scheduler says them.
    """

    def __init__(self, name, count, leads, first, ranks, folder: Path | None, names: list[str], kept: bool):
        self.name, self.count, self.leads, self.first, self.ranks = name, count, leads, first, ranks
        self.folder, self.names, self._kept = folder, names, kept
        self._began = time.time()

    @classmethod
    def of(cls, environment, folder: Path) -> "Nodes":
        """By what a launcher, or srun, has set."""
        ranks, rank = int(environment.get("WORLD_SIZE", 1)), int(environment.get("RANK", 0))
        local, name = int(environment.get("LOCAL_RANK", 0)), environment.get("SLURMD_NODENAME") or socket.gethostname()
        job = environment.get("SLURM_JOB_ID")
        if ranks > 1:
            count = max(1, ranks // int(environment.get("LOCAL_WORLD_SIZE", ranks)))
            leads, first = local == 0, rank == 0
            run = environment.get("TORCHELASTIC_RUN_ID", job or "run")
            token = f"{run}-{environment.get('MASTER_PORT', '')}"
        elif job and "SLURM_STEP_ID" in environment:
            count, leads = int(environment.get("SLURM_STEP_NUM_NODES", 1)), environment.get("SLURM_LOCALID", "0") == "0"
            first, token = environment.get("SLURM_PROCID", "0") == "0", f"{job}.{environment['SLURM_STEP_ID']}"
        else:
            return cls(name, 1, True, True, 1, None, [], False)
        report = folder / f"doctor-{job or token}"
        if ranks > 1 and not job:
            name = f"{name}-{rank // max(1, int(environment.get('LOCAL_WORLD_SIZE', ranks)))}" if count > 1 else name
        # Reports of one job stay, with the names of the machines; each call has a folder of its own in it.
        return cls(name, count, leads, first, ranks, report / token, _slurm_names(environment), bool(job))

    def report(self, findings: list[Finding]) -> None:
        """Tell what this machine found."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / f"{self.name}.json", [asdict(finding) for finding in findings])

    def gather(self, seconds: float) -> dict[str, list[Finding]]:
        """What every machine found, by its name; on the first machine. One that does not report has failed."""
        limit = time.monotonic() + seconds
        while len(found := self._reports()) < self.count and time.monotonic() < limit:
            time.sleep(0.2)
        missing = [name for name in self.names if name not in found] or [
            f"unknown-{i}" for i in range(self.count - len(found))
        ]
        fix = "look at it; is --folder on a file system that all machines share?"
        for name in missing[: self.count - len(found)]:
            found[name] = [Finding("report", False, f"the machine did not report within {seconds:g} s", fix)]
        return found

    def decide(self, found: dict[str, list[Finding]]) -> None:
        """Write the verdict, and the names of the machines that passed and of those that failed."""
        passed = [name for name, findings in found.items() if all(finding.passed for finding in findings)]
        failed = [name for name in found if name not in passed]
        for title, names in (("passed", passed), ("failed", failed)):
            (self.folder.parent / f"{title}-nodes.txt").write_text("".join(f"{name}\n" for name in sorted(names)))
        _write(self.folder / "verdict", {name: [asdict(f) for f in findings] for name, findings in found.items()})

    def verdict(self, seconds: float) -> dict[str, list[Finding]]:
        """Wait for the verdict."""
        limit, path = time.monotonic() + seconds, self.folder / "verdict"
        while not (path.exists() and path.stat().st_mtime > self._began - 60):
            if time.monotonic() > limit:
                fix = "is --folder on a file system that all machines share?"
                return {self.name: [Finding("report", False, f"no verdict in {path} within {seconds:g} s", fix)]}
            time.sleep(0.2)
        return {name: [Finding(**f) for f in findings] for name, findings in json.loads(path.read_text()).items()}

    def leave(self) -> None:
        """Remove the reports, except a scheduler's job's lists of names."""
        if self.folder is not None:
            # The other processes have read the verdict, or do so within moments.
            time.sleep(1.0 if self.ranks > 1 or self.count > 1 else 0.0)
            shutil.rmtree(self.folder if self._kept else self.folder.parent, ignore_errors=True)

    def _reports(self) -> dict[str, list[Finding]]:
        paths = self.folder.glob("*.json") if self.folder.is_dir() else ()
        return {path.stem: [Finding(**fields) for fields in json.loads(path.read_text())] for path in sorted(paths)}


def _checked_nodes(nodes: Nodes, arguments: argparse.Namespace) -> dict[str, list[Finding]]:
    """What each machine found, on every process."""
    if nodes.leads:
        from .node import Options, check_node

        expected = arguments.gpus, arguments.disk_gib, arguments.memory_gib, arguments.seconds
        mine = check_node(Options(arguments.folder.absolute(), *expected, launched=nodes.ranks > 1))
        if nodes.folder is None:
            return {nodes.name: mine}
        nodes.report(mine)
        if nodes.first:
            found = nodes.gather(arguments.seconds)
            nodes.decide(found)
            return found
    return nodes.verdict(arguments.seconds * (2 if nodes.ranks > 1 else 3))


def _checked_ranks(arguments: argparse.Namespace) -> list[Finding]:
    from datetime import timedelta

    from ..train.mesh import close_mesh, device_of, launched_size, start_process_group
    from .ranks import check_ranks

    device = device_of("auto")
    try:
        start_process_group(device, timedelta(seconds=max(1.0, arguments.seconds)))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        text = f"{launched_size()} ranks do not meet: {type(error).__name__}: {lines[0]}"
        return [
            Finding("ranks", False, text, "is MASTER_ADDR reached from everywhere? GLOO_SOCKET_IFNAME names the card")
        ]
    try:
        return check_ranks(device, arguments.folder.absolute())
    finally:
        close_mesh()


def _print(found: dict[str, list[Finding]], across: list[Finding], as_json: bool, nodes: Nodes) -> None:
    every = [finding for findings in found.values() for finding in findings] + across
    passed = all(finding.passed for finding in every)
    if as_json:
        content = {"passed": passed, "nodes": {n: [asdict(f) for f in fs] for n, fs in found.items()}}
        print(json.dumps(content | {"ranks": [asdict(finding) for finding in across]}, indent=1))
        return
    print(f"{nodes.name}:")
    print(*found.get(nodes.name, ()), sep="\n")
    for name, findings in found.items():
        # Of the other machines what failed is enough to read.
        if name != nodes.name and not all(finding.passed for finding in findings):
            print(f"{name}:", *(finding for finding in findings if not finding.passed), sep="\n")
    if across:
        print("between ranks:", *across, sep="\n")
    good = sum(all(finding.passed for finding in findings) for findings in found.values())
    failed = sum(not finding.passed for finding in every)
    where = f" (names: {nodes.folder.parent}/passed-nodes.txt)" if nodes.folder and nodes._kept else ""
    print(f"{good} of {max(nodes.count, len(found))} machines passed{where}; {failed} of {len(every)} checks failed")
    sys.stdout.flush()


def _slurm_names(environment) -> list[str]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes or shutil.which("scontrol") is None:
        return []
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()


def _write(path: Path, content) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)
