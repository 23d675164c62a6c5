"""moba-cp verify: everything holds on ranks as they are, and each thing that one rank computes wrongly is found."""

import contextlib
import io
import json
import os
from dataclasses import replace

import pytest
import torch

from moba_cp import cli, verify
from moba_cp.bench.cluster import check, measure
from moba_cp.bench.cluster.ranks import Ranks
from moba_cp.train.config import TrainConfig
from moba_cp.train.loop import Trainer
from moba_cp.train.yaml_config import load
from tests.helpers.distributed import run_ranks
from tests.helpers.train_runs import DEMO, SHRUNKEN


def _printed(*words):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = cli.main(["verify", *words])
    return code, shown.getvalue()


def _small():
    return [word for setting in SHRUNKEN for word in ("--set", setting)]


def _broken(rank):
    """What the command prints, and what fails when rank 1 computes this or that wrongly."""
    results = [_printed(str(DEMO), *_small(), "--json")]
    config = load(TrainConfig, DEMO, SHRUNKEN)
    ranks = Ranks("cpu", 120)
    shape, n_tokens = verify.scaled_shape(config, ranks, None)
    small = verify.scaled_config(config, shape, n_tokens, 2)

    def failing(found):
        return sorted({one.part for one in found if not one.holds})

    real_attention, real_select, real_step = measure.moba_attention, check.select, Trainer.train_step

    def scaled(q, k, v, *rest, **options):
        # Within the output alone: 0.1 %, far less than 16 bit would show.
        return real_attention(q, k, v, *rest, **options) * (1 + 1e-3 * (rank == 1))

    def other_selection(*inputs):
        return real_select(*inputs).flip(-1) if rank == 1 else real_select(*inputs)

    def step(trainer):
        record = real_step(trainer)
        if trainer.mesh.size == 2 and rank == 1:
            for parameter in trainer.module.parameters():
                parameter.data.mul_(1.1)
        return record

    measure.moba_attention = scaled
    results.append(failing(check.deviations(shape, n_tokens, ["auto"], (2,), ranks)))
    measure.moba_attention, check.select = real_attention, other_selection
    results.append(failing(check.deviations(shape, n_tokens, ["kv"], (2,), ranks)))
    check.select, Trainer.train_step = real_select, step
    results.append(failing(verify._steps(small, ranks)))
    ranks.close()
    return results


def test_two_ranks_hold_and_a_wrong_one_is_found():
    everybody = run_ranks(2, _broken)
    (code, printed), wrong_output, wrong_selection, wrong_step = everybody[0]
    content = json.loads(printed)
    assert code == 0 and content["passed"] and content["ranks"] == 2
    whats = {one["what"] for one in content["comparisons"]}
    for way in ("auto", "kv", "query", "allgather", "allgather-nccl"):
        assert f"MoBA by {way} on 2 ranks" in whats
    assert {"full by ring on 2 ranks", "full by allgather on 2 ranks", "training on 2 ranks, float32"} <= whats
    parts = {one["part"] for one in content["comparisons"]}
    assert parts >= {"selection", "out", "dq", "dk", "dv", "loss, step 1", "gradient, step 2"}
    assert everybody[1][0] == (0, "")
    assert wrong_output == ["dk", "dq", "dv", "out"]
    assert "selection" in wrong_selection
    assert wrong_step == ["gradient, step 2", "loss, step 2"], "the first step was right"
    # All ranks come to the same verdict, whoever was wrong.
    assert everybody[1][1:] == everybody[0][1:]


def test_one_process_and_its_table(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    code, printed = _printed(str(DEMO), *_small(), "--set", "run.device=cpu", "--tokens", "256")
    lines = printed.splitlines()
    assert code == 0 and lines[0].startswith(
        "1 ranks on CPUs; 256 tokens, 4 query heads, 2 KV heads, head dim 8, block 16"
    )
    assert lines[-1] == "all 8 comparisons hold" and lines[2].endswith("PASS")
    real = measure.moba_attention
    monkeypatch.setattr(measure, "moba_attention", lambda *a, **b: real(*a, **b) * 1.1)
    code, printed = _printed(str(DEMO), *_small(), "--set", "run.device=cpu", "--tokens", "256")
    assert code == verify.WRONG and "4 of 8 comparisons fail" in printed and "FAIL" in printed


@pytest.mark.parametrize(
    "changes, n_layers, full",
    [
        ({"full_layers": "none"}, 32, "none"),
        ({"full_layers": "last 1"}, 32, "last 1"),
        ({"full_layers": (1, 5)}, 32, "last 1"),
        ({"full_layers": (1,)}, 1, (1,)),
        ({"default": "full"}, 32, "none"),
    ],
)
def test_a_large_config_is_scaled_down(monkeypatch, changes, n_layers, full):
    config = load(TrainConfig, DEMO, ["model.n_heads=64", "model.n_kv_heads=8", "model.hidden_size=8192"])
    config = replace(
        config,
        model=replace(config.model, n_layers=n_layers),
        attention=replace(config.attention, block_size=4096, top_k=12, **changes),
        data=replace(config.data, seq_len=1 << 20),
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks = Ranks("cpu", 60)
    try:
        ranks.size = 6
        shape, n_tokens = verify.scaled_shape(config, ranks, None)
    finally:
        ranks.close()
    assert (shape.heads, shape.kv_heads, shape.dim) == (8, 2, 128)
    assert n_tokens % 12 == 0 and 1024 <= n_tokens < 1100
    assert shape.moba.block_size == 32 and n_tokens // 32 >= 2 * 12
    small = verify.scaled_config(config, shape, n_tokens, 6)
    assert small.attention.full_layers == full and small.model.n_layers == min(2, n_layers)
    assert small.model.hidden_size == 1024 and small.data.seq_len == n_tokens


def _on_gpus(rank):
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    code, printed = _printed("demo", "--set", "model.n_heads=8", "--set", "model.n_kv_heads=2", "--tokens", "4096")
    more = _printed("demo", "--set", "run.dtype=bfloat16", "--tokens", "2048") if code == 0 else (code, "")
    if rank == 0:
        print(printed, more[1], sep="\n")
    return code, more[0], printed


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 4], ids=["one-gpu", "four-gpus"])
def test_four_nccl_ranks(gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    everybody = run_ranks(4, _on_gpus, backend="cpu:gloo,cuda:nccl", gpus=gpus, timeout=600)
    assert [code for code, *_ in everybody] == [0] * 4, everybody[0][2]
    assert [code for _, code, _ in everybody] == [0] * 4
