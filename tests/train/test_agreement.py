"""Ranks that were given different things do not train."""

import copy

import pytest
import torch.distributed as dist

from moba_cp.train.agreement import content_of, from_first, require_equal
from moba_cp.train.config import TrainConfig
from moba_cp.train.plan import plan_run
from moba_cp.train.start import _equal_everywhere
from moba_cp.train.yaml_config import load, to_dict
from tests.helpers.distributed import run_ranks
from tests.helpers.launched import Launched
from tests.helpers.train_runs import DEMO, SHRUNKEN, write_text


def _keys(value, path=()):
    """Paths to all values of a nested dict."""
    if not isinstance(value, dict) or not value:
        return [path]
    return [found for key, x in value.items() for found in _keys(x, (*path, key))]


def _other(value):
    """Another value of the kind that a config may hold."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    return "another" if value is None or isinstance(value, str) else [1]


def _differing(rank, values):
    """What rank 1 differing in each key in turn is told, on both ranks."""
    said = {}
    require_equal(values)
    for path in _keys(values):
        mine = copy.deepcopy(values)
        *sections, key = path
        place = mine
        for section in sections:
            place = place[section]
        if rank == 1:
            place[key] = _other(place[key])
        try:
            require_equal(mine)
            said[".".join(path)] = None
        except ValueError as error:
            said[".".join(path)] = str(error)
    return said


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement") / "text"
    write_text(folder, 3)
    config = load(TrainConfig, DEMO, [*SHRUNKEN, f"data.path={folder}", "data.validation_share=0", "data.seq_len=16"])
    run = plan_run(config, 2)
    return _equal_everywhere(run, content_of(run.corpus.paths))


def test_a_rank_that_differs_in_any_key_is_refused(values):
    """Every key of the config, the versions, and every file of the corpus."""
    config = to_dict(load(TrainConfig, DEMO, SHRUNKEN))
    assert len(values["content of"]) == 3
    assert {path for path in _keys(values) if path[0] in config} == set(_keys(config)), "a key is left out"
    first, second = run_ranks(2, _differing, values)
    assert first == second and len(first) == len(_keys(values)) > 60
    for key, said in first.items():
        assert said is not None and said.startswith(f"{key} is "), (key, said)
        assert " on rank 1 but " in said and " on rank 0; start every rank with the same command" in said
    lr = values["optimizer"]["lr"]
    assert first["optimizer.lr"].startswith(f"optimizer.lr is {_other(lr)} on rank 1 but {lr} on rank 0")


def test_content_is_of_all_bytes_or_of_pieces_of_each_file(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(range(256)) * 4096)
    paths = [tmp_path / name for name in "ab"]
    before = content_of(paths)
    assert before[str(paths[0])] == before[str(paths[1])]

    def changed(at, **limit):
        whole = content_of(paths, **limit)
        data = bytearray(paths[1].read_bytes())
        data[at] ^= 1
        paths[1].write_bytes(data)
        now = content_of(paths, **limit)
        data[at] ^= 1
        paths[1].write_bytes(data)
        assert now[str(paths[0])] == whole[str(paths[0])]
        return now != whole

    assert all(changed(at) for at in (0, 70_000, 500_000, 2**20 - 1))
    # 4 of 16 pieces of each: the first and the last among them.
    assert changed(0, limit=2**19) and changed(2**20 - 1, limit=2**19) and not changed(70_000, limit=2**19)


def test_the_first_rank_s_error_is_everybody_s():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(OSError, match="full"):
            from_first(lambda: (_ for _ in ()).throw(OSError(28, "full")))
        assert from_first(lambda: 7) == 7
    finally:
        dist.destroy_process_group()


def test_a_run_of_ranks_that_differ_does_not_begin(tmp_path):
    write_text(tmp_path / "text")
    with Launched(2, tmp_path, "run.directory=run", by_rank={1: ("optimizer.lr=0.004",)}) as run:
        assert run.wait_all(120) == [2, 2]
        assert "error: optimizer.lr is 0.004 on rank 1 but 0.003 on rank 0; start every rank" in run.output(0)
    assert not (tmp_path / "run" / "log.jsonl").exists()
