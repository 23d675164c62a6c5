"""Files of a checkpoint: the index is followed, an export is replaced as a whole, and contradictions are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moba_cp.megatron import AttentionConfig, ModelConfig, build_model, load_hf, save_hf

SHAPE = ModelConfig(vocab_size=32, n_layers=2, hidden_size=32, n_heads=2, ffn_hidden_size=32)
HF = {
    "model_type": "llama", "vocab_size": 32, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
INDEX = "model.safetensors.index.json"


def model(seed):
    return build_model(SHAPE, AttentionConfig(default="full"), seed=seed)


def assert_holds(path, seed):
    """The checkpoint has the weights of ``model(seed)``."""
    loaded = model(seed=99)
    load_hf(loaded, path)
    expected = model(seed).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items() if x is not None)


def export(path, seed, shards):
    save_hf(model(seed), path, HF, shard_bytes=9_000 if shards else 10**9)


@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True), (False, False)])
def test_an_export_takes_the_place_of_the_older_one(before, after, tmp_path):
    export(tmp_path, 1, before)
    (tmp_path / "tokenizer.json").write_text("{}")
    if before:
        # More files than the next export has.
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        (tmp_path / "model-00009-of-00009.safetensors").write_bytes(b"left over")
    export(tmp_path, 2, after)
    assert_holds(tmp_path, 2)
    weights = {file.name for file in tmp_path.glob("*.safetensors")}
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1, "who may read one file may read all"
    if after:
        assert weights == set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    else:
        assert weights == {"model.safetensors"} and not (tmp_path / INDEX).exists()
    assert {file.name for file in tmp_path.iterdir()} - weights - {INDEX} == {"config.json", "tokenizer.json"}


def test_an_export_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    export(tmp_path, 1, shards=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("moba_cp.megatron.hf.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export(tmp_path, 2, shards=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert_holds(tmp_path, 1)


@pytest.mark.parametrize("shards", [False, True])
def test_cut_off_at_any_move_an_export_is_the_old_one_the_new_one_or_refused(shards, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    replace, outcomes = Path.replace, []
    for moves in range(40):
        folder = tmp_path / str(moves)
        export(folder, 1, shards=True)
        left = [moves]

        def move(self, target, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", move)
        try:
            export(folder, 2, shards)
        except Killed:
            monkeypatch.setattr(Path, "replace", replace)
            try:
                load_hf(model(seed=99), folder)
            except ValueError as error:
                assert "save_hf was cut off" in str(error)
                outcomes.append("refused")
                with pytest.raises(ValueError, match="holds two checkpoints, in new and in old"):
                    export(folder, 3, shards)
            else:
                assert_holds(folder, 1)
                outcomes.append("old")
        else:
            monkeypatch.setattr(Path, "replace", replace)
            assert_holds(folder, 2)
            break
    assert outcomes[0] == "old" and set(outcomes[1:]) == {"refused"} and len(outcomes) > 5


def _rewrite_index(path, **changes):
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] |= changes
    (path / INDEX).write_text(json.dumps(index))


FIRST = "model.embed_tokens.weight"


def test_only_the_files_of_the_index_are_read(tmp_path):
    export(tmp_path, 1, shards=True)
    shard = json.loads((tmp_path / INDEX).read_text())["weight_map"][FIRST]
    left_over = {name: torch.zeros_like(x) for name, x in load_file(tmp_path / shard).items()}
    for name in ("model-00001-of-00099.safetensors", "zzz.safetensors", "consolidated.safetensors"):
        save_file(left_over, tmp_path / name)
    assert_holds(tmp_path, 1)


def test_beside_model_safetensors_other_files_are_not_read(tmp_path):
    export(tmp_path, 1, shards=False)
    save_file({FIRST: torch.zeros(32, 32)}, tmp_path / "zzz.safetensors")
    assert_holds(tmp_path, 1)


def test_a_single_file_of_another_name_is_read(tmp_path):
    export(tmp_path, 1, shards=False)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert_holds(tmp_path, 1)


def _both_kinds(path):
    save_file({FIRST: torch.zeros(32, 32)}, path / "model.safetensors")


def _lost_index(path):
    (path / INDEX).unlink()


def _lost_index_beside_an_older_file(path):
    _both_kinds(path)
    _lost_index(path)


def _lost_shard(path):
    (path / json.loads((path / INDEX).read_text())["weight_map"][FIRST]).unlink()


def _cut_shard(path):
    file = path / json.loads((path / INDEX).read_text())["weight_map"][FIRST]
    file.write_bytes(file.read_bytes()[:-100])


def _shard_of_another_export(path):
    file = path / json.loads((path / INDEX).read_text())["weight_map"][FIRST]
    save_file({"lm_head.weight": torch.zeros(32, 32)}, file)


def _extra_tensor(path):
    file = path / json.loads((path / INDEX).read_text())["weight_map"][FIRST]
    save_file({**load_file(file), "model.layers.9.mlp.up_proj.weight": torch.zeros(2)}, file)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_both_kinds, f"holds both model.safetensors and {INDEX}, which does not name it; remove the older one"),
        (_lost_index, f"but no {INDEX}, which says what belongs together"),
        (_lost_index_beside_an_older_file, f"but no {INDEX}, which says what belongs together"),
        (_lost_shard, "which is not there; export it again"),
        (_cut_shard, "is no whole safetensors file"),
        (_shard_of_another_export, "lm_head.weight is in"),
        (_extra_tensor, f"model.layers.9.mlp.up_proj.weight, which {INDEX} does not name"),
        (lambda path: _rewrite_index(path, more="model-00001-of-00099.safetensors"), "which is not there"),
        (lambda path: _rewrite_index(path, more="../elsewhere.safetensors"), "has no weight_map from names to files"),
        (lambda path: _rewrite_index(path, more="model-00001-of-00007.safetensors"), "which does not hold it"),
        (lambda path: (path / INDEX).write_text("{}"), "has no weight_map from names to files of the folder"),
        (lambda path: (path / INDEX).write_text("half"), "has no weight_map from names to files of the folder"),
    ],
)  # fmt: skip
def test_files_that_contradict_one_another_are_refused(spoil, message, tmp_path):
    export(tmp_path, 1, shards=True)
    assert (tmp_path / "model-00001-of-00007.safetensors").exists()
    spoil(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load_hf(model(seed=99), tmp_path)
    assert "\n" not in str(refusal.value)


def test_two_files_and_nothing_that_says_which_are_refused(tmp_path):
    export(tmp_path, 1, shards=False)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({FIRST: torch.zeros(32, 32)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="holds a.safetensors and b.safetensors but neither model.safetensors nor"):
        load_hf(model(seed=99), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 33}, "vocab_size=33 in hf_config but the model has 32 rows of embeddings"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True in hf_config but the model has an output layer"),
        ({"model_type": "gemma"}, "model_type='gemma' in hf_config is not served"),
    ],
    ids=str,
)
def test_a_config_that_is_not_the_models_is_not_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        save_hf(model(1), tmp_path / "never", {**HF, **changes})
    assert not (tmp_path / "never").exists()
