"""What `moba-cp export --format megatron` writes, Megatron-LM's own trainer loads, and gives the same loss; on the CPU.

Needs ``megatron.training``, which the wheels of megatron-core hold from 0.19 on (Python 3.12).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moba_cp import cli
from moba_cp.train.config import TrainConfig
from moba_cp.train.plan import plan_run
from moba_cp.train.yaml_config import load
from tests.helpers.distributed import TIME_SCALE, environment_of, store_of
from tests.helpers.train_runs import SHRUNKEN, write_text

pytest.importorskip("megatron.training", reason="megatron-core has it from 0.19 on, for Python 3.12")

ROOT = Path(__file__).parents[2]
# Grouped heads are in the demo; the other switches of a model are here.
MODELS = {
    "plain": (),
    "tied, with biases and norms of queries and keys": (
        "model.tie_embeddings=true", "model.qkv_bias=true", "model.qk_norm=true", "model.norm_eps=1e-6",
    ),
    "scaled": ("model.rope_base=500000", "model.rope_scaling={factor: 8.0}"),
    "scaled evenly": ("model.rope_scaling={factor: 4.0, kind: linear}",),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_megatron_lm_loads_an_exported_model(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    settings = [*SHRUNKEN, "data.path=text", "run.directory=run", "run.steps=10", "attention.default=full",
                "data.attend_across=true", "model.init_std=0.3", *MODELS[name]]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(["train", "demo", *words]) == 0
    capsys.readouterr()
    assert cli.main(["export", "run", "--to", "megatron", "--format", "megatron"]) == 0
    flags = capsys.readouterr().out.partition("for Megatron-LM's ")[2].split()
    assert flags[:2] == ["--load", "megatron"]
    assert cli.main(["eval", "run", "--sequences", "3", "--json", "figures.json"]) == 0
    expected = json.loads(Path("figures.json").read_text())["loss"]
    plan = plan_run(load(TrainConfig, "run/config.yaml"), 1)
    torch.save([plan.validation_sequences.sequence(i).read() for i in range(3)], "sequences.pt")

    store = store_of(1)
    environment = os.environ | environment_of(0, 1, store.port)
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    environment |= {"PYTHONPATH": paths, "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    command = [sys.executable, "-m", "tests.helpers.megatron_load", "sequences.pt", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240 * TIME_SCALE)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "successfully loaded checkpoint" in said
    (loss,) = re.findall(r"iteration +1/ +1 .*?lm loss: ([\d.E+-]+)", said)
    assert float(loss) == pytest.approx(expected, abs=2e-6)
