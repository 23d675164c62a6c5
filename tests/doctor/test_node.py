"""moba-cp doctor on one machine: for each check, a broken machine that it catches."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch

from moba_cp import cli
from moba_cp.doctor import command, compute, node
from moba_cp.doctor.finding import WRONG, guarded

DEVICES = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")


def failed(finding, *words):
    assert not finding.passed and str(finding).startswith("FAIL")
    assert all(word in str(finding) for word in words), str(finding)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi that runs ``script`` into PATH."""

    def put(script):
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return put


@pytest.fixture
def sees(monkeypatch):
    """A function that sets how many GPUs PyTorch and the driver have."""

    def set_to(names, in_driver=0):
        monkeypatch.setattr(node, "torch_sees", lambda: {"names": names, "cuda": "13.0", "nccl": "2.28.9"})
        monkeypatch.setattr(node, "driver_gpus", lambda: [f"nvidia{i}" for i in range(in_driver)])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return set_to


def test_versions(monkeypatch):
    assert node.versions().passed
    real = node.importlib.metadata.version
    monkeypatch.setattr(node.importlib.metadata, "version", lambda name: "2.5.1" if name == "torch" else real(name))
    failed(node.versions(), "torch 2.5.1 is older than 2.6", "constraints.txt")


def test_host_memory(monkeypatch, sees):
    sees([])
    assert node.host_memory(0.1).passed
    failed(node.host_memory(1e6), "less than 1e+06", "end what else runs here")
    sees(["H100"] * 2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    failed(node.host_memory(0.1), "/dev/shm has 0.06 GiB", "--ipc host")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 40))
    monkeypatch.setattr(node, "has_infiniband", lambda: True)
    monkeypatch.setattr(node.resource, "getrlimit", lambda what: (64 << 10, 64 << 10))
    failed(node.host_memory(0.1), "ulimit -l is 64 KiB: InfiniBand cannot pin memory")


def test_disk(tmp_path):
    assert node.disk(tmp_path, 0.001).passed
    failed(node.disk(tmp_path, 1e9), "1e+09 GiB are expected (--disk-gib)")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_file_system(tmp_path, monkeypatch, broken):
    assert node.file_system(tmp_path).passed

    def refuse(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(node.os, broken, refuse)
    failed(node.file_system(tmp_path), f"{tmp_path}: Input/output error", "--folder")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_is_slow_or_gives_other_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "WRITE_SECONDS", 0.0)
    failed(node.file_system(tmp_path), "slower than 0 s")
    monkeypatch.setattr(node.Path, "read_bytes", lambda path: b"other")
    failed(node.file_system(tmp_path), "what was read is not what was written")


def test_clock(tmp_path, monkeypatch):
    assert node.clock(tmp_path).passed
    real = time.time
    monkeypatch.setattr(node.time, "time", lambda: real() + 100)
    failed(node.clock(tmp_path), "100.0 s off", "synchronize")


def test_ports():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        failed(node.ports((port,)), f"taken: {port}", "--head HOST:PORT")
    assert node.ports((port,)).passed


def test_driver(smi, sees, monkeypatch):
    sees([], in_driver=8)
    monkeypatch.setattr(node.shutil, "which", lambda name: None)
    failed(node.driver(), "no nvidia-smi, but GPUs")
    monkeypatch.undo()
    smi("echo '580.1, 0, 0, No, Not Active'; echo '580.1, 1, [N/A], [N/A], [N/A]'")
    assert node.driver().passed and "580.1" in str(node.driver())
    smi("echo '580.1, 0, 3, No, Not Active'; echo '580.1, 1, 0, Yes, Active'")
    failed(node.driver(), "GPU 0 has 3 uncorrected memory errors", "GPU 1 has pages to be retired", "slowed down")
    smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    failed(node.driver(), "version mismatch")
    # A field that another version of nvidia-smi does not know is no fault of the machine.
    smi('case "$*" in *ecc*) echo "Field x is not a valid field to query."; exit 2;; esac; echo "580.1, 0"')
    assert node.driver().passed
    smi("exec sleep 30")
    monkeypatch.setattr(node, "_SMI_SECONDS", 0.2)
    failed(node.driver(), "no answer in 0.2 s", "reboot")


def test_devices(sees, monkeypatch):
    sees([])
    assert node.devices(None).passed
    failed(node.devices(8), "0 of 8 GPUs")
    sees(["H100"] * 7, in_driver=8)
    failed(node.devices(None), "7 of 8 GPUs")
    sees(["H100", "A100"], in_driver=2)
    failed(node.devices(None), "different kinds")
    sees(["H100"] * 2, in_driver=8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert node.devices(None).passed


def test_a_gpu_that_hangs_or_dies(monkeypatch, smi, sees):
    real = subprocess.run
    monkeypatch.setattr(node.subprocess, "run", lambda words, **rest: real([sys.executable, "-c", script], **rest))
    script = "import time; time.sleep(60)"
    assert [str(finding) for finding in node.gpu(3, 0.5)][0].startswith("FAIL  GPU 3         gave no answer in 0.5 s")
    script = "import sys; sys.exit('CUDA error: an illegal memory access was encountered')"
    failed(node.gpu(3, 60)[0], "GPU 3", "illegal memory access")
    # Even if PyTorch hangs already where it counts them.
    monkeypatch.setattr(node, "_SEES_SECONDS", 0.5)
    script = "import time; time.sleep(60)"
    smi("exit 1")
    node.torch_sees.cache_clear()
    failed(guarded("devices", lambda: node.devices(None))[0], "CUDA gave no answer in 0.5 s")
    node.torch_sees.cache_clear()


@DEVICES
def test_attention(monkeypatch):
    cpu = torch.device("cpu")
    assert compute.attention(cpu, "attention").passed
    real = compute.moba_attention
    # One row in a thousand, in one head.
    wrong = torch.zeros(1000, 4, 64)
    wrong[999, 3] = 0.05
    monkeypatch.setattr(
        compute, "moba_attention", lambda *a, **b: (lambda out, lse: (out + wrong, lse))(*real(*a, **b))
    )
    failed(compute.attention(cpu, "attention"), "out is wrong by")


@DEVICES
def test_kernels(monkeypatch):
    cpu = torch.device("cpu")
    assert compute.kernels(cpu, "kernels").passed
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    failed(compute.kernels(cpu, "kernels"), "very slow", "unset TRITON_INTERPRET")


def test_what_a_gpu_should_reach(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(compute, "_rates", lambda *a: (700e12, 2500e9))
    assert compute.speed(gpu, "GPU 0 speed").passed
    for rates in ((300e12, 2500e9), (700e12, 900e9)):
        monkeypatch.setattr(compute, "_rates", lambda *a, rates=rates: rates)
        failed(compute.speed(gpu, "GPU 0 speed"), "reaches 450 and 1900", "heat, power")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    failed(compute.memory(gpu, "GPU 0 memory"), "40.0 of 80.0 GiB free", "another process holds it")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 << 30, 80 << 30))
    assert compute.memory(gpu, "GPU 0 memory").passed


@DEVICES
def test_the_command(tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(node, "PORTS", ())
    few = ["--folder", str(tmp_path), "--disk-gib", "0.001", "--memory-gib", "0.01"]
    assert cli.main(["doctor", *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"1 of 1 machines passed; 0 of {len(lines) - 2} checks failed"
    assert all(line.startswith("PASS  ") for line in lines[1:-1]) and len(lines) > 10
    assert cli.main(["doctor", *few, "--json", "--gpus", "8"]) == WRONG
    content = json.loads(capsys.readouterr().out)
    (findings,) = content["nodes"].values()
    assert [f["name"] for f in findings if not f["passed"]] == ["devices"] and not content["passed"]
    assert cli.main(["doctor", "--folder", str(tmp_path / "none")]) == 2
    assert not list(tmp_path.iterdir())


def _nodes(tmp_path, rank, **more):
    return command.Nodes.of(
        {
            "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": str(rank),
            "SLURMD_NODENAME": f"n{rank}", **more,
        },
        tmp_path,
    )  # fmt: skip


def test_machines_report_without_a_rendezvous(tmp_path, monkeypatch):
    """Two of three report, one of them with a fault: the names are sorted out, and the one that hangs has failed."""
    monkeypatch.setattr(command, "_slurm_names", lambda environment: ["n0", "n1", "n2"])
    first, second = _nodes(tmp_path, 0), _nodes(tmp_path, 1)
    assert (first.first, second.first, first.count) == (True, False, 3)
    good, bad = node.Finding("clock", True, "fine"), node.Finding("clock", False, "late", "set it")
    first.report([good])
    second.report([bad])
    found = first.gather(0.3)
    assert found["n0"] == [good] and found["n1"] == [bad]
    failed(found["n2"][0], "did not report within 0.3 s", "--folder")
    first.decide(found)
    assert second.verdict(1.0) == found
    first.leave()
    assert {path.name for path in (tmp_path / "doctor-7").iterdir()} == {"passed-nodes.txt", "failed-nodes.txt"}
    assert (tmp_path / "doctor-7" / "passed-nodes.txt").read_text() == "n0\n"
    assert (tmp_path / "doctor-7" / "failed-nodes.txt").read_text() == "n1\nn2\n"
    # A machine that sees another folder waits for no verdict for ever.
    failed(_nodes(tmp_path / "other", 2).verdict(0.3)["n2"][0], "no verdict", "share")


def test_ranks_do_not_meet_where_a_machine_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(command, "_checked_ranks", lambda arguments: pytest.fail("they meet"))
    monkeypatch.setattr(node, "check_node", lambda options: [node.Finding("clock", False, "late", "set it")])
    assert cli.main(["doctor", "--folder", str(tmp_path)]) == WRONG
    assert "FAIL  clock         late; set it" in capsys.readouterr().out


@pytest.mark.gpu
def test_every_gpu_of_this_machine_is_sound(tmp_path, capsys):
    code = cli.main(["doctor", "--folder", str(tmp_path), "--disk-gib", "1"])
    shown = capsys.readouterr().out
    print(shown)
    # What else runs on a shared machine is no fault of the checks.
    for part in ("attention", "kernels", "memory"):
        assert f"PASS  GPU 0 {part}" in shown, shown
    assert "GPU 0 speed" in shown and "TFLOP/s" in shown and "PASS  devices" in shown
    assert code in (0, WRONG)
