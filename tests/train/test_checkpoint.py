"""Which checkpoint is found, and that none is ever half a checkpoint."""

import contextlib
import enum
import json
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moba_cp.train import checkpoint, manifest, storage
from moba_cp.train.background import Background
from moba_cp.train.checkpoint import CheckpointMeta
from moba_cp.train.storage import StorageError
from tests.helpers.distributed import run_ranks


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def meta(step: int) -> CheckpointMeta:
    return CheckpointMeta(step, {"model": {"n_layers": 2, "recompute": "none"}}, "abc", 0)


def trained(seed: int):
    """A module and its optimizer after one step, both other ones for another seed."""
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(1, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return module, optimizer


def test_round_trip_restores_weights_and_optimizer(tmp_path):
    saved = trained(0)
    path = checkpoint.save(tmp_path, meta(7), *saved, keep=2)
    other = trained(1)
    checkpoint.load(path, *other)
    for a, b in zip(saved[0].parameters(), other[0].parameters()):
        assert torch.equal(a, b)
        assert all(torch.equal(saved[1].state[a][name], other[1].state[b][name]) for name in ("exp_avg", "step"))
    assert checkpoint.read_meta(path) == replace(meta(7), format=2)


def test_oldest_are_deleted_and_the_newest_is_found(tmp_path):
    for step in (5, 20, 100):
        checkpoint.save(tmp_path / "checkpoints", meta(step), *trained(0), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000020", "step-00000100"]
    newest = tmp_path / "checkpoints" / "step-00000100"
    assert {checkpoint.find(path) for path in (tmp_path, tmp_path / "checkpoints", newest)} == {newest}
    checkpoint.save(tmp_path / "checkpoints", meta(200), *trained(0), keep=0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


class FullDisk:
    """Writers to a disk that is full after some bytes; what DCP makes of it is its own affair."""

    def __init__(self, monkeypatch, allowed=100):
        from torch.distributed.checkpoint import filesystem

        class Stream:
            def __init__(self, path):
                self.file, self.left = open(path, "wb"), allowed

            def write(self, data):
                self.left -= len(data)
                if self.left < 0:
                    raise OSError(28, "No space left on device")
                return self.file.write(data)

            def __getattr__(self, name):
                return getattr(self.file, name)

        create = filesystem.FileSystem.create_stream

        @contextlib.contextmanager
        def limited(fs, path, mode):
            if "w" not in mode:
                with create(fs, path, mode) as stream:
                    yield stream
            else:
                stream = Stream(path)
                with stream.file:
                    yield stream

        monkeypatch.setattr(filesystem.FileSystem, "create_stream", limited)


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, meta(5), *trained(0), keep=2)
    with monkeypatch.context() as patch:
        FullDisk(patch)
        with pytest.raises(StorageError, match=f"{tmp_path}/step-00000010.* could not be written: rank 0: .+"):
            checkpoint.save(tmp_path, meta(10), *trained(0), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert checkpoint.verify(checkpoint.find(tmp_path)) is None
    assert checkpoint.save(tmp_path, meta(10), *trained(0), keep=2) == checkpoint.find(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_words_of_pytorch_s_writer_are_told_with_the_room_that_is_left(tmp_path, monkeypatch):
    def fails(*arguments, **keywords):
        raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", fails)
    with pytest.raises(
        StorageError, match=r"RuntimeError: unexpected pos 704 vs 598 \([\d,]+ bytes free on its disk\)"
    ):
        checkpoint.save(tmp_path, meta(5), *trained(0), keep=2)


def test_ctrl_c_in_a_save_is_no_failed_save(tmp_path, monkeypatch):
    """PyTorch's writer catches it with everything else, and the run would go on."""

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, meta(5), *trained(0), keep=2)


def test_what_an_earlier_save_could_not_remove_goes_with_the_next(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        FullDisk(patch)
        patch.setattr("shutil.rmtree", lambda *arguments, **keywords: None)
        with pytest.raises(StorageError):
            checkpoint.save(tmp_path, meta(5), *trained(0), keep=2)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("step-00000005.partial-")
    checkpoint.save(tmp_path, meta(10), *trained(0), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("name", ["write_synced", "entry", "sync_folder"])
def test_a_manifest_that_cannot_be_written_leaves_no_checkpoint(tmp_path, monkeypatch, name):
    checkpoint.save(tmp_path, meta(5), *trained(0), keep=2)

    def full(*arguments):
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.manifest, name, full)
        with pytest.raises(StorageError, match="No space left on device"):
            checkpoint.save(tmp_path, meta(10), *trained(0), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_folder_without_checkpoint(tmp_path):
    (tmp_path / "step-00000003.partial").mkdir()
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: no checkpoint there; .*{tmp_path}/step-00000004/meta.json: No"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 1}'])
def test_damaged_meta(tmp_path, text):
    (tmp_path / checkpoint.META).write_text(text)
    with pytest.raises(ValueError, match="meta.json: not a checkpoint of this library"):
        checkpoint.read_meta(tmp_path)


def test_meta_is_readable_json(tmp_path):
    path = checkpoint.save(tmp_path, meta(5), *trained(0), keep=1)
    assert json.loads((path / checkpoint.META).read_text())["step"] == 5


def test_another_model_is_refused_and_another_way_to_compute_is_not(tmp_path):
    checkpoint.check_same_model(tmp_path, meta(1), {"n_layers": 2, "recompute": "full"})
    with pytest.raises(
        ValueError,
        match="another model: model.n_layers is 2 there and 3 here, model.n_heads is "
        "None there and 4 here; set the same values, or start anew in another folder",
    ):
        checkpoint.check_same_model(tmp_path, meta(1), {"n_layers": 3, "recompute": "none", "n_heads": 4})


@pytest.mark.parametrize("keep, left", [(1, [3]), (2, [3, 6]), (3, [3, 5, 6]), (0, [2, 5, 6, 3])])
def test_the_one_just_written_is_never_the_oldest(tmp_path, keep, left):
    for step in (2, 5, 6):
        checkpoint.save(tmp_path, meta(step), *trained(0), keep=0)
    checkpoint.save(tmp_path, meta(3), *trained(0), keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in sorted(left)]


def test_an_optimizer_keeps_its_configuration(tmp_path):
    """What the config says holds, not what held when the checkpoint was written."""
    path = checkpoint.save(tmp_path, meta(7), *trained(0), keep=2)
    module, optimizer = trained(1)
    optimizer.param_groups[0].update(weight_decay=0.25, betas=(0.5, 0.75), eps=1e-3)
    checkpoint.load(path, module, optimizer)
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 1e-3)


SHARD = "__0_0.distcp"


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << 4
    path.write_bytes(data)


DAMAGE = {
    "flipped": lambda path: flip(path, 0.6),
    "first byte": lambda path: flip(path, 0.0),
    "last byte": lambda path: flip(path, 1.0),
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "gone": lambda path: path.unlink(),
    "of another step": lambda path: path.write_bytes((path.parent.parent / "step-00000005" / path.name).read_bytes()),
}


@pytest.mark.parametrize("name", [SHARD, ".metadata", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(tmp_path, name, damage):
    """By what is read of every checkpoint that a run goes on from; the one before is whole."""
    torch.manual_seed(0)
    for step in (5, 10):
        checkpoint.save(tmp_path, meta(step), *trained(step), keep=0)
    newest = tmp_path / "step-00000010"
    assert checkpoint.find(tmp_path) == newest and checkpoint.verify(newest) is None
    DAMAGE[damage](newest / name)
    problem = checkpoint.verify(newest)
    # What was swapped for a whole file of another step disagrees with the rest: either may be named.
    assert problem is not None and (name in problem or damage == "of another step"), problem
    damaged = {newest: problem}
    assert checkpoint.find(tmp_path, damaged) == tmp_path / "step-00000005"
    assert checkpoint.verify(tmp_path / "step-00000005") is None


def test_a_checkpoint_under_another_step_s_name_is_damage(tmp_path):
    checkpoint.save(tmp_path, meta(5), *trained(0), keep=0).rename(tmp_path / "step-00000010")
    with pytest.raises(ValueError, match=r"no checkpoint there; .*step-00000010: its manifest is of step 5"):
        checkpoint.find(tmp_path)


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    checkpoint.save(tmp_path, meta(5), *trained(0), keep=1)
    module, optimizer = trained(1)
    with torch.no_grad():
        module.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not written, for model.weight on rank 0 holds infinity or NaN"):
        checkpoint.save(tmp_path, meta(10), module, optimizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_folder_that_was_taken_over_is_left_alone(tmp_path):
    checkpoint.save(tmp_path, meta(5), *trained(0), keep=1)

    def refuse():
        raise ValueError("no longer this run's")

    with pytest.raises(ValueError, match="no longer this run's"):
        checkpoint.save(tmp_path, meta(10), *trained(0), keep=1, check=refuse)
    assert [path.name for path in checkpoint.find_all(tmp_path)] == ["step-00000005"]


def test_a_half_deleted_checkpoint_is_none(tmp_path, monkeypatch):
    """Killed while it deletes: the name is gone before the first file is."""
    checkpoint.save(tmp_path, meta(5), *trained(0), keep=0)

    def killed(path, ignore_errors=False):
        (path / SHARD).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, meta(10), *trained(0), keep=1)
    assert [path.name for path in checkpoint.find_all(tmp_path)] == ["step-00000010"]
    assert checkpoint.verify(tmp_path / "step-00000010") is None
    checkpoint.set_aside_after(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"], "what is left of it goes at the next start"


def full_disk(*arguments):
    raise OSError(28, "No space left on device", "somewhere")


def test_saving_in_the_background(tmp_path, monkeypatch):
    """What is saved is what was there when the save began; what fails is told at the next."""
    background = Background(dist.new_group(backend="gloo"))
    module, optimizer = trained(0)
    before, write, gate = module.weight.detach().clone(), storage.write, threading.Event()

    def slow_write(*arguments):
        assert gate.wait(60)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", slow_write)
        path = checkpoint.save(tmp_path, meta(5), module, optimizer, keep=2, background=background)
        with torch.no_grad():
            module.weight.fill_(7.0)
        assert not path.exists()
        gate.set()
        background.finish()
    assert checkpoint.verify(path) is None
    other = trained(1)
    checkpoint.load(path, *other)
    assert torch.equal(other[0].weight, before)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.manifest, "entry", full_disk)
        checkpoint.save(tmp_path, meta(10), module, optimizer, keep=2, background=background)
        with pytest.raises(StorageError, match="No space left"):
            background.finish()
    checkpoint.save(tmp_path, meta(15), module, optimizer, keep=1, background=background)
    background.finish()
    background.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000015"]


class Malice:
    """Runs a command where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (__import__("os").system, (f"touch {self.marker}",))


@pytest.mark.parametrize("place", ["metadata", "shard"])
def test_reading_a_checkpoint_runs_nothing(tmp_path, monkeypatch, place):
    module, optimizer = trained(0)
    marker = tmp_path / "ran"
    if place == "shard":
        optimizer.param_groups[0]["lr"] = Malice(marker)
    monkeypatch.setattr(checkpoint, "_first_nonfinite", lambda *arguments: None)
    path = checkpoint.save(tmp_path / "run", meta(5), module, optimizer, keep=1)
    if place == "metadata":
        (path / ".metadata").write_bytes(pickle.dumps(Malice(marker)))
    with pytest.raises(ValueError, match="could not be read: rank 0: .*"):
        checkpoint.load(path, *trained(1))
    assert not marker.exists()


def test_enumerations_as_python_3_11_2_writes_them_are_read(tmp_path, monkeypatch):
    """By getattr, which is nothing else here."""
    with monkeypatch.context() as patch:
        patch.setattr(enum.Enum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self._name_)))
        path = checkpoint.save(tmp_path / "run", meta(5), *trained(0), keep=1)
    assert b"getattr" in (path / ".metadata").read_bytes()
    other = trained(1)
    checkpoint.load(path, *other)
    assert torch.equal(other[0].weight, trained(0)[0].weight)
    (path / ".metadata").write_bytes(pickle.dumps(Asks()))
    with pytest.raises(ValueError, match="asks .*Path.* for 'home', which no checkpoint does"):
        checkpoint.load(path, *trained(1))


class Asks:
    """Asks an attribute of a class that a checkpoint may name."""

    def __reduce__(self):
        return getattr, (Path, "home")


def test_files_outside_of_the_folder_are_not_read(tmp_path):
    path = checkpoint.save(tmp_path / "run", meta(5), *trained(0), keep=1)
    (path / SHARD).rename(tmp_path / "elsewhere")
    data = (path / ".metadata").read_bytes()
    # The name's length stands before it in the pickle.
    (path / ".metadata").write_bytes(data.replace(b"\x0c" + SHARD.encode(), b"\x0c../elsewhere"))
    with pytest.raises(ValueError, match="outside of its folder"):
        checkpoint.load(path, *trained(1))


def _sharded(rank, folder):
    """Save steps 5 and 10 of a module over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for step in (5, 10):
        torch.manual_seed(step)
        module = fully_shard(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8)), mesh=mesh)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        module(torch.ones(1, 16)).sum().backward()
        optimizer.step()
        checkpoint.save(folder, meta(step), module, optimizer, keep=0, facts={"ranks": dist.get_world_size()})


@pytest.fixture(scope="module")
def of_four_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    run_ranks(4, _sharded, folder)
    return folder


def test_every_damage_to_every_file_of_four_ranks_is_found(of_four_ranks, tmp_path):
    """Deleted, cut to 0, 1 byte, half, all but the last; 16 bits flipped; of another step: 7 files, 154 cases."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(of_four_ranks, folder)
    newest, before = folder / "step-00000010", folder / "step-00000005"
    names = sorted(path.name for path in newest.iterdir())
    assert names == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4)), "manifest.json", "meta.json"]
    assert manifest.read(newest)["ranks"] == 4
    cases = 0
    for name in names:
        path, whole = newest / name, (newest / name).read_bytes()
        size, other = len(whole), (before / name).read_bytes()
        damaged = {f"{n} bytes": whole[:n] for n in {0, 1, size // 2, size - 1}}
        damaged |= {f"bit {bit}": _flipped(whole, (2 * bit + 1) * size // 32, bit % 8) for bit in range(16)}
        damaged |= {"deleted": None, "of step 5": other}
        for what, data in damaged.items():
            cases += 1
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)
            problem = checkpoint.verify(newest)
            assert problem is not None, f"{name}, {what}: not found"
            assert name in problem or what == "of step 5", f"{name}, {what}: {problem}"
            assert checkpoint.find(folder, {newest: problem}) == before
        path.write_bytes(whole)
        assert checkpoint.verify(newest) is None
    assert cases == 7 * 22


def _flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
