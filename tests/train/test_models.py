"""Models of transformers go in, are trained on two ranks, and come out: transformers gives the trainer's loss."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from moba_cp import cli
from moba_cp.data.build import BuildOptions, build
from moba_cp.model.loss import IGNORED_LABEL
from moba_cp.train.config import TrainConfig
from moba_cp.train.evaluate import evaluate, run_of
from moba_cp.train.loop import Trainer
from moba_cp.train.mesh import open_mesh
from moba_cp.train.plan import plan_run
from moba_cp.train.yaml_config import load
from tests.helpers.data_files import END, write_jsonl, write_tokenizer
from tests.helpers.distributed import run_ranks
from tests.helpers.train_runs import logged

SHAPE = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, rms_norm_eps=1e-5,
             bos_token_id=None, eos_token_id=None)  # fmt: skip
LLAMA31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SHAPE, head_dim=8, rope_parameters=LLAMA31, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
# Full attention, so that transformers computes the same; long enough for the loss to fall.
SETTINGS = ["attention.default=full", "data.seq_len=256", "data.sequences_per_step=2", "data.validation_share=0.2",
            "data.validation_sequences=3", "optimizer.lr=3e-3", "optimizer.warmup_steps=2", "run.steps=20",
            "run.validate_every=20", "run.dtype=float32"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models of transformers, data, configs by moba-cp import, and a run of each on two ranks."""
    base = tmp_path_factory.mktemp("models")
    write_tokenizer(base / "tokenizer")
    write_jsonl(base / "a.jsonl", 120)
    build(BuildOptions((str(base / "a.jsonl"),), str(base / "a"), str(base / "tokenizer")), 1)
    configs = []
    for name, config in MODELS.items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(base / name)
        settings = [*SETTINGS, f"data.path={base / 'a'}", f"run.directory={base / 'runs' / name}"]
        words = [word for setting in settings for word in ("--set", setting)]
        assert cli.main(["import", str(base / name), "--to", str(base / f"{name}.yaml"), *words]) == 0
        configs.append(base / f"{name}.yaml")
    run_ranks(2, _train, configs, timeout=240)
    return base


def _train(rank, configs):
    for path in configs:
        config = load(TrainConfig, path)
        mesh = open_mesh(config.run)
        Trainer(plan_run(config, mesh.size), mesh, None).run()
    # The last model on both ranks, by what a run held out.
    figures, mesh = evaluate(*run_of(config.run.directory, []))
    if mesh.first:
        Path(config.run.directory, "evaluated.json").write_text(json.dumps(figures))


def held_out_loss(place, name, model) -> float:
    """The mean loss of transformers' ``model`` over the trainer's validation sequences, document by document."""
    plan = plan_run(load(TrainConfig, place / f"{name}.yaml"), 1)
    total = count = 0
    for index in range(min(3, plan.validation_sequences.per_epoch)):
        sequence = plan.validation_sequences.sequence(index)
        tokens, labels = sequence.read()
        bounds = sequence.cu_seqlens.tolist()
        for a, b in zip(bounds, bounds[1:]):
            logits = model(tokens[None, a:b]).logits[0].double()
            loss = torch.nn.functional.cross_entropy(logits, labels[a:b], ignore_index=IGNORED_LABEL, reduction="sum")
            total, count = total + loss.item(), count + int((labels[a:b] != IGNORED_LABEL).sum())
    return total / count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["hf", "megatron"])
@torch.no_grad()
def test_the_trained_loss_is_that_of_transformers(place, tmp_path, name, way):
    run = place / "runs" / name
    logged_losses = logged(run, "validation_loss")
    before = AutoModelForCausalLM.from_pretrained(place / name).eval()
    assert held_out_loss(place, name, before) == pytest.approx(logged_losses[0], abs=1e-5)
    assert logged_losses[20] < logged_losses[0] - 0.5, "nothing was learned, so an equal loss says little"
    out = tmp_path / "out"
    if way == "hf":
        assert cli.main(["export", str(run), "--to", str(out)]) == 0
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
        assert AutoTokenizer.from_pretrained(out)(END).input_ids == [0]
    else:
        assert cli.main(["export", str(run), "--to", str(tmp_path / "megatron"), "--format", "megatron"]) == 0
        assert cli.main(["import", str(tmp_path / "megatron"), "--hf", str(out), "--to", str(tmp_path / "c.yaml")]) == 0
        assert load(TrainConfig, tmp_path / "c.yaml").model == load(TrainConfig, place / f"{name}.yaml").model
    after = AutoModelForCausalLM.from_pretrained(out).eval()
    assert held_out_loss(place, name, after) == pytest.approx(logged_losses[20], abs=1e-5)


def test_eval_gives_the_trainers_loss_by_position(place, tmp_path, capsys):
    run = place / "runs" / "llama"
    assert cli.main(["eval", str(run), "--sequences", "3", "--json", str(tmp_path / "a.json")]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["loss"] == pytest.approx(logged(run, "validation_loss")[20], abs=1e-6)
    rows = figures["by_position"]
    assert [row["from"] for row in rows] == [0, 128][: len(rows)] and "perplexity" in shown and " all " in shown
    assert sum(row["loss"] * row["labels"] for row in rows) / figures["labels"] == pytest.approx(figures["loss"])
    told = json.loads((place / "a.json").read_text())
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / 0.6931471805599453 / told["bytes_per_token"])
    # Of the model as it came, and with other attention.
    other = ["--data", str(place / "a"), "--seq-len", "64", "--sequences", "2", "--attention", "moba"]
    other += ["--set", "attention.block_size=16", "--json", str(tmp_path / "b.json")]
    assert cli.main(["eval", str(place / "llama"), *other]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["loss"] > figures["loss"] + 0.5


def test_eval_on_two_ranks_gives_the_trainers_loss(place):
    run = place / "runs" / "qwen3"
    figures = json.loads((run / "evaluated.json").read_text())
    assert figures["sequences"] == 3 and figures["loss"] == pytest.approx(logged(run, "validation_loss")[20], abs=1e-6)


def test_weights_of_another_model_are_refused_before_training(place, capsys):
    command = ["train", str(place / "llama.yaml"), "--dry-run", "--overwrite"]
    assert cli.main([*command, "--set", "model.n_layers=3"]) == 2
    shown = capsys.readouterr().err
    assert "another model: model.n_layers is 2 there and 3 here; moba-cp import" in shown and shown.count("\n") == 1
    assert cli.main([*command, "--set", "model.rope_base=1e6"]) == 0
    assert "note: the rotary embedding is another one than that of the weights" in capsys.readouterr().out


def test_bytes_are_refused_as_tokens_of_a_model_with_a_tokenizer(place, tmp_path, capsys):
    shutil.copytree(place / "llama", tmp_path / "model")
    shutil.copy(place / "tokenizer" / "tokenizer.json", tmp_path / "model")
    config = tmp_path / "c.yaml"
    assert cli.main(["import", str(tmp_path / "model"), "--to", str(config), "--set", "data.seq_len=256"]) == 0
    build_it = f"moba-cp data build TEXT --to PREFIX --tokenizer {tmp_path / 'model'}"
    assert build_it in capsys.readouterr().out
    assert cli.main(["train", str(config), "--dry-run", "--set", f"data.path={Path(__file__).parent}"]) == 2
    assert build_it in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert cli.main(["train", str(config), "--dry-run", "--set", f"data.path={place / 'a'}"]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["import", "nowhere", "--to", "x.yaml"], "nowhere: no such folder"),
        (["import", "runs", "--to", "x.yaml"], "path='runs' holds no config.json"),
        (["import", "llama", "--to", "llama.yaml"], "--to=llama.yaml: is there"),
        (["import", "llama", "--to", "x.yaml", "--hf", "y"], "--hf=y: llama is no checkpoint of Megatron-LM"),
        (["export", "nowhere", "--to", "x"], "nowhere"),
        (["export", "runs/llama", "--to", "x", "--shard-gb", "0"], "--shard-gb=0.0 is not above 0"),
        (["export", "runs/llama", "--to", "qwen3"], "--to=qwen3: holds files; name another folder, or replace a"),
        (["export", "runs/llama", "--to", "runs/llama"], "--to=runs/llama: is a run's folder or a checkpoint"),
        (["eval", "nowhere"], "nowhere"),
        (["eval", "runs/llama", "--sequences", "0"], "--sequences=0 is below 1"),
    ],
)
def test_mistakes_get_one_line(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.mark.parametrize("way", ["hf", "megatron"])
def test_an_export_replaces_another_one_only_on_request(place, tmp_path, capsys, way):
    command = ["export", str(place / "runs" / "llama"), "--to", str(tmp_path / "out"), "--format", way]
    assert cli.main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert cli.main(command) == 2 and "holds files" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert cli.main([*command, "--overwrite"]) == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert after.keys() == before.keys() and all(after[path] > before[path] for path in after if path.is_file())
    if way == "megatron":
        back = ["import", str(tmp_path / "out"), "--hf", str(place / "qwen3"), "--to", str(tmp_path / "c.yaml")]
        assert cli.main(back) == 2
        assert "--hf=" in (said := capsys.readouterr().err) and "holds files" in said


def test_a_checkpoint_in_megatrons_old_format_is_refused(tmp_path, capsys):
    (tmp_path / "iter_0000007").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert cli.main(["import", str(tmp_path), "--hf", str(tmp_path / "hf"), "--to", str(tmp_path / "x.yaml")]) == 2
    assert "iter_0000007: not a torch_dist checkpoint" in capsys.readouterr().err
