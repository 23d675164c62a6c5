"""Which checkpoint is found, and that none is ever half a checkpoint."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moba_cp.train import checkpoint
from moba_cp.train.checkpoint import CheckpointMeta


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def meta(step: int) -> CheckpointMeta:
    return CheckpointMeta(step, {"model": {"n_layers": 2, "recompute": "none"}}, "abc", 0)


def trained(seed: int):
    """A module and its optimizer after one step."""
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(1, 3)).sum().backward()
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
    assert checkpoint.read_meta(path) == meta(7)


def test_oldest_are_deleted_and_the_newest_is_found(tmp_path):
    for step in (5, 20, 100):
        checkpoint.save(tmp_path / "checkpoints", meta(step), *trained(0), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000020", "step-00000100"]
    newest = tmp_path / "checkpoints" / "step-00000100"
    assert {checkpoint.find(path) for path in (tmp_path, tmp_path / "checkpoints", newest)} == {newest}
    checkpoint.save(tmp_path / "checkpoints", meta(200), *trained(0), keep=0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, meta(5), *trained(0), keep=2)

    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp, "save", fail)
        with pytest.raises(OSError):
            checkpoint.save(tmp_path, meta(10), *trained(0), keep=2)
    assert checkpoint.find(tmp_path).name == "step-00000005"
    # The next attempt clears what the failed one left.
    assert checkpoint.save(tmp_path, meta(10), *trained(0), keep=2) == checkpoint.find(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_folder_without_checkpoint(tmp_path):
    (tmp_path / "step-00000003.partial").mkdir()
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: no checkpoint there"):
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
