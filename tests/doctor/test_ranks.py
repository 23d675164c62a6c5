"""moba-cp doctor across ranks: for each check, ranks of which one is broken."""

import time

import pytest
import torch
import torch.distributed as dist

from moba_cp import cli
from moba_cp.doctor import ranks
from moba_cp.doctor.finding import WRONG
from moba_cp.launchers.address import free_port
from tests.helpers.distributed import TIME_SCALE, run_ranks

CPU = torch.device("cpu")


def _sabotaged(rank, folder):
    """What is found on two ranks as they are, and with rank 1 broken in one way after another."""
    found = {"healthy": ranks.check_ranks(CPU, folder)}
    places = ranks.all_values(ranks._place(CPU))
    broken = rank == 1
    real_versions, real_time, real_mm, real_send, real_all = (
        ranks.versions, time.time, torch.mm, ranks._send, dist.all_to_all_single,
    )  # fmt: skip
    ranks.versions = lambda: real_versions() | ({"torch": "2.0.0"} if broken else {})
    found["versions"] = [ranks.same_versions(places)]
    ranks.time.time = lambda: real_time() + 60 * broken
    found["clocks"] = [ranks.clocks(places)]
    ranks.time.time = real_time
    ranks._SEEN_SECONDS = 0.5
    other = folder / "other"
    other.mkdir(exist_ok=True)
    found["shared files"] = [ranks.shared_files(places, other if broken else folder)]

    def slow_mm(*arguments):
        time.sleep(0.1)
        return real_mm(*arguments)

    ranks.torch.mm = slow_mm if broken else real_mm
    ranks.SLOWEST_RANK = {"cpu": 3.0}
    found["skew"] = [ranks.skew(places, CPU)]
    ranks.torch.mm = real_mm

    def slow_send(device, send, receive):
        real_send(device, send, receive)
        # From rank 1 to rank 0.
        time.sleep(2.0 * broken)

    ranks._send = slow_send
    found["pairs"] = ranks.pairs(places, CPU)
    ranks._send = real_send

    def flips_a_bit(out, x):
        real_all(out, x)
        if broken:
            out[5] += 1

    dist.all_to_all_single = flips_a_bit
    found["all-to-all"] = [ranks.all_to_all(places, CPU)]
    dist.all_to_all_single = real_all
    return found


def test_a_broken_rank_is_found_and_named(tmp_path):
    everybody = run_ranks(2, _sabotaged, tmp_path)
    assert everybody[0].keys() == everybody[1].keys()
    found = everybody[0]
    healthy = {finding.name: finding for finding in found.pop("healthy")}
    # On an overloaded machine the speeds of two processes say little; everything else must hold.
    assert all(finding.passed for name, finding in healthy.items() if name != "skew"), healthy
    assert set(healthy) == {
        "ranks", "versions", "clocks", "shared files", "skew", "pairs in a machine", "all-to-all", "copy engines",
    }  # fmt: skip
    words = {
        "versions": "has torch 2.0.0",
        "clocks": "s off",
        "shared files": "see another",
        "skew": "the slowest, rank 1",
        "pairs": "from rank 1",
        "all-to-all": "wrong bytes on rank 1",
    }
    for name, (finding, *_) in found.items():
        assert not finding.passed and words[name] in finding.text and finding.fix, (name, finding)
    for name in ("versions", "shared files", "skew", "all-to-all"):
        assert "rank 1" in found[name][0].text, name


def test_pairs_are_judged_by_their_kind_and_nvlink():
    gpu = torch.device("cuda")
    places = [ranks.Place(i, f"host{i // 2}", f"gpu{i}", "NVIDIA H100 80GB HBM3") for i in range(4)]
    rates = {(a, b): 300.0 for a in range(4) for b in range(4) if a != b}
    assert ranks._judged_pairs("pairs", rates, places, gpu, True).passed
    slow = rates | {(1, 3): 100.0}
    assert (
        "slowest 100.00 from rank 1 (host0) to rank 3 (host1)"
        in ranks._judged_pairs("pairs", slow, places, gpu, False).text
    )
    assert not ranks._judged_pairs("pairs", slow, places, gpu, False).passed
    pcie = dict.fromkeys(rates, 20.0)
    assert "NVLink is not used" in ranks._judged_pairs("pairs", pcie, places, gpu, True).fix
    assert ranks._judged_pairs("pairs", pcie, places, gpu, False).passed
    one = [ranks.Place(i, f"rank{i}", "gpu0", "NVIDIA H100 80GB HBM3") for i in range(4)]
    assert "share a GPU" in ranks._judged_pairs("pairs", slow, one, gpu, True).text


def test_ranks_that_do_not_meet(tmp_path, monkeypatch, capsys):
    """One of two comes: a finding within the time limit, not a hang."""
    for name, value in {
        "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    began = time.monotonic()
    arguments = ["doctor", "--folder", str(tmp_path), "--seconds", "2", "--disk-gib", "0", "--memory-gib", "0"]
    monkeypatch.setattr("moba_cp.doctor.node.check_node", lambda options: [])
    assert cli.main(arguments) == WRONG
    assert time.monotonic() - began < 60 * TIME_SCALE
    assert "FAIL  ranks         2 ranks do not meet" in capsys.readouterr().out


def _checks_on_gpus(rank, folder):
    device = torch.device("cuda", torch.cuda.current_device())
    found = ranks.check_ranks(device, folder)
    if rank == 0:
        print(*found, sep="\n")
    return [(finding.name, finding.passed, finding.text) for finding in found]


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 4], ids=["one-gpu", "four-gpus"])
def test_four_nccl_ranks(tmp_path, gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    everybody = run_ranks(4, _checks_on_gpus, tmp_path, backend="nccl", gpus=gpus, timeout=600)
    assert all(found == everybody[0] for found in everybody)
    wrong = [(name, text) for name, passed, text in everybody[0] if not passed]
    assert not wrong, wrong
    assert ("share a GPU" in str(everybody[0])) is (gpus == 1)
