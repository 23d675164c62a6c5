"""Checks of one machine, each for itself: no rendezvous, so that a machine that hangs stops no other one.

Each GPU is looked at by a process of its own with a time limit: what hangs inside a driver cannot be interrupted, but a
process can be left behind.
"""

import importlib.metadata
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil
from packaging.version import Version

from .finding import Finding, guarded

GIB = 1024**3
NEEDED = {"torch": "2.6", "triton": "3.2", "numpy": "1.26"}
TOLD = ("megatron-core", "transformers")
CLOCK_SECONDS = 2.0
WRITE_SECONDS = 5.0
PORTS = (29400, 29500)
"""Of launchers/multinode.sh, and of torchrun where no other is given."""
_SMI_SECONDS = 20.0
_SEES_SECONDS = 120.0
_SEES = """import json, torch
n = torch.cuda.device_count()
nccl = ".".join(map(str, torch.cuda.nccl.version())) if n else None
names = [torch.cuda.get_device_name(i) for i in range(n)]
print(json.dumps({"names": names, "cuda": torch.version.cuda, "nccl": nccl}))"""


@dataclass(frozen=True)
class Options:
    """What is expected of a machine."""

    folder: Path
    """On the file system that runs are written to."""
    gpus: int | None = None
    """How many there should be; None: as many as the driver has."""
    disk_gib: float = 10.0
    memory_gib: float = 4.0
    gpu_seconds: float = 180.0
    """Time limit for the checks of one GPU; the first use of kernels compiles them."""
    launched: bool = False
    """Whether a launcher has taken its port already."""


def check_node(options: Options) -> list[Finding]:
    """All checks of this machine."""
    checks = [
        ("versions", versions),
        ("host memory", lambda: host_memory(options.memory_gib)),
        ("disk", lambda: disk(options.folder, options.disk_gib)),
        ("file system", lambda: file_system(options.folder)),
        ("clock", lambda: clock(options.folder)),
        ("ports", lambda: ports(PORTS if not options.launched else ())),
        ("driver", driver),
        ("devices", lambda: devices(options.gpus)),
    ]
    found = [finding for name, check in checks for finding in guarded(name, check)]
    # Where PyTorch cannot even say how many there are, each is asked for itself, and can fail.
    counted = guarded("GPUs", lambda: Finding("GPUs", True, str(visible_gpus())))[0]
    count = int(counted.text) if counted.passed else len(driver_gpus())
    for index in range(count):
        found += gpu(index, options.gpu_seconds)
    if count == 0:
        from .compute import check_compute

        found += check_compute("cpu")
    return found


def versions() -> Finding:
    """The packages that compute are there and not too old."""
    seen, wrong = [f"python {sys.version.split()[0]}"], []
    for name, least in NEEDED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        seen.append(f"{name} {version}")
        if Version(version) < Version(least):
            wrong.append(f"{name} {version} is older than {least}")
    for name in TOLD:
        try:
            seen.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    fix = 'pip install -c constraints.txt -e ".[train]"'
    return Finding("versions", not wrong, ", ".join(wrong or seen), fix)


def host_memory(least_gib: float) -> Finding:
    """Memory for the ranks' processes, shared memory for NCCL, and memory that InfiniBand may pin."""
    free, shm = psutil.virtual_memory().available / GIB, _shm_gib()
    wrong = []
    if free < least_gib:
        wrong.append(f"{free:.1f} GiB are free, less than {least_gib:g}")
    if visible_gpus() > 1 and shm is not None and shm < 1:
        wrong.append(f"/dev/shm has {shm:.2f} GiB, less than the 1 GiB that NCCL wants (docker run --ipc host)")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if has_infiniband() and limit != resource.RLIM_INFINITY:
        wrong.append(f"ulimit -l is {limit // 1024} KiB: InfiniBand cannot pin memory; set it to unlimited")
    text = f"{free:.1f} GiB free" + (f", /dev/shm {shm:.1f} GiB" if shm is not None else "")
    return Finding("host memory", not wrong, "; ".join(wrong) or text, "end what else runs here")


def disk(folder: Path, least_gib: float) -> Finding:
    """Room for checkpoints."""
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.1f} GiB free in {folder}"
    return Finding("disk", free >= least_gib, text, f"at least {least_gib:g} GiB are expected (--disk-gib)")


def file_system(folder: Path) -> Finding:
    """What a checkpoint needs: write, fsync, rename, fsync of the folder, and to read back what was written."""
    began, data = time.monotonic(), os.urandom(1 << 20)
    first, second = (folder / f".moba-cp-doctor-{uuid.uuid4().hex}{ending}" for ending in ("", ".renamed"))
    try:
        with open(first, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(first, second)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        same = second.read_bytes() == data
    except OSError as error:
        return Finding("file system", False, f"{folder}: {error.strerror}", "choose another folder for runs (--folder)")
    finally:
        for path in (first, second):
            path.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    if not same:
        return Finding("file system", False, f"{folder}: what was read is not what was written", "use another one")
    text = f"{folder}: 1 MiB written, synced, renamed and read in {seconds:.2f} s"
    return Finding("file system", seconds < WRITE_SECONDS, text, f"slower than {WRITE_SECONDS:g} s; is it overloaded?")


def clock(folder: Path) -> Finding:
    """This machine's clock against the file server's."""
    path = folder / f".moba-cp-doctor-{uuid.uuid4().hex}"
    try:
        before = time.time()
        path.touch()
        stamp = path.stat().st_mtime
        after = time.time()
    finally:
        path.unlink(missing_ok=True)
    off = max(before - stamp, stamp - after, 0.0)
    text = f"{off:.1f} s off the clock of {folder}'s file system"
    return Finding("clock", off <= CLOCK_SECONDS, text, "synchronize it (chronyc tracking, timedatectl)")


def ports(wanted: tuple[int, ...]) -> Finding:
    """The ports of the rendezvous are free, and this machine reaches its own by its name."""
    taken = []
    for port in wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                taken.append(str(port))
    fix = "another program listens there: end it, or use another port (multinode.sh --head HOST:PORT, --master-port)"
    if taken:
        return Finding("ports", False, f"taken: {', '.join(taken)}", fix)
    with socket.create_server(("", 0)) as server, socket.create_connection(server.getsockname()[:2], timeout=5):
        free = ", ".join(map(str, wanted)) or "some"
    return Finding("ports", True, f"free: {free}")


def driver() -> Finding:
    """What nvidia-smi says of the GPUs' health; a driver that is about to hang is slow to answer first."""
    if shutil.which("nvidia-smi") is None:
        there = bool(driver_gpus())
        return Finding("driver", not there, "no nvidia-smi" + (", but GPUs" if there else ", no GPU"), "mend PATH")
    fields = ("driver_version", "index", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending")
    fields += ("clocks_throttle_reasons.hw_slowdown",)
    try:
        done = _smi(fields)
        if done.returncode and "not a valid field" in done.stdout + done.stderr:
            done = _smi(fields[:2])
    except subprocess.TimeoutExpired:
        return Finding("driver", False, f"nvidia-smi gave no answer in {_SMI_SECONDS:g} s", "reboot the machine")
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or [""]
        return Finding("driver", False, f"nvidia-smi: {said[0]}", "reinstall or reload the driver")
    wrong, version = [], "?"
    for line in done.stdout.strip().splitlines():
        version, index, *health = (word.strip() for word in line.split(","))
        ecc, pending, slowdown = health or ("", "", "")
        if ecc.isdigit() and int(ecc):
            wrong.append(f"GPU {index} has {ecc} uncorrected memory errors")
        if pending == "Yes":
            wrong.append(f"GPU {index} has pages to be retired")
        if slowdown == "Active":
            wrong.append(f"GPU {index} is slowed down by its hardware (heat or power)")
    return Finding("driver", not wrong, "; ".join(wrong) or f"{version}", "reset the GPU or take the machine out")


def devices(expected: int | None) -> Finding:
    """PyTorch finds every GPU that the driver has, or that was asked for."""
    found, there = visible_gpus(), len(driver_gpus())
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = expected if expected is not None else (found if hidden is not None else there)
    if found < wanted:
        import torch

        why = "PyTorch is built for the CPU" if torch.version.cuda is None else f"PyTorch for CUDA {torch.version.cuda}"
        fix = "install a PyTorch for this driver, or mend CUDA_VISIBLE_DEVICES" + (f" ({hidden})" if hidden else "")
        return Finding("devices", False, f"{found} of {wanted} GPUs ({why})", fix)
    if not found:
        return Finding("devices", True, "no GPU: gloo on the CPU")
    sees = torch_sees()
    names = sorted(set(sees["names"]))
    text = f"{found} x {', '.join(names)}; CUDA {sees['cuda']}, NCCL {sees['nccl']}"
    return Finding("devices", len(names) == 1, text, "the GPUs are of different kinds: the slowest sets the pace")


def gpu(index: int, seconds: float) -> list[Finding]:
    """The checks of one GPU (:mod:`.compute`), in a process that is killed after ``seconds``."""
    command = [sys.executable, "-m", "moba_cp.doctor.compute", f"cuda:{index}"]
    name = f"GPU {index}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [Finding(name, False, f"gave no answer in {seconds:g} s", "reset it (nvidia-smi -r) or reboot")]
    try:
        return [Finding(**fields) for fields in json.loads(done.stdout.strip().splitlines()[-1])]
    except (IndexError, ValueError, TypeError):
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [Finding(name, False, f"its process failed: {said[-1]}", "reset it (nvidia-smi -r) or reboot")]


def visible_gpus() -> int:
    """GPUs that PyTorch finds."""
    return len(torch_sees()["names"])


@lru_cache
def torch_sees() -> dict:
    """The names of the GPUs that PyTorch finds, and its versions of CUDA and NCCL; asked in another process, since a
    driver that hangs cannot be interrupted.

    Raises:
        TimeoutError, RuntimeError: it gave no answer.
    """
    if not driver_gpus() and shutil.which("nvidia-smi") is None:
        return {"names": [], "cuda": None, "nccl": None}
    try:
        done = subprocess.run([sys.executable, "-c", _SEES], capture_output=True, text=True, timeout=_SEES_SECONDS)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"CUDA gave no answer in {_SEES_SECONDS:g} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["PyTorch cannot be imported"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _smi(fields: tuple[str, ...]) -> subprocess.CompletedProcess:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)


def driver_gpus() -> list[str]:
    """The driver's device files, one for each GPU."""
    return [path.name for path in Path("/dev").glob("nvidia[0-9]*")]


def has_infiniband() -> bool:
    """Whether there is an InfiniBand or RoCE card."""
    return Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())


def _shm_gib() -> float | None:
    try:
        return shutil.disk_usage("/dev/shm").total / GIB
    except OSError:
        return None
