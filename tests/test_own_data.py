"""docs/own_data.md: every command as printed, at small size, and the model that comes out in transformers."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from moba_cp import CPContext, cli
from moba_cp.megatron import build_model, load_hf, model_config_of
from moba_cp.model.attention import AttentionConfig
from moba_cp.train.log import read_log
from tests.helpers.data_files import write_jsonl, write_tokenizer
from tests.helpers.distributed import TIME_SCALE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own_data.md").read_text()
SMALL = ["model.vocab_size=400", "model.n_layers=2", "model.hidden_size=32", "model.n_heads=4", "model.n_kv_heads=2",
         "attention.block_size=16", "attention.top_k=3", "data.seq_len=256", "data.sequences_per_step=2",
         "data.validation_share=0.2", "data.validation_sequences=2", "optimizer.warmup_steps=2", "run.steps=4",
         "run.validate_every=4", "run.dtype=float32"]  # fmt: skip


def test_every_command_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("documents.jsonl"), 60)
    write_tokenizer(Path("tokenizer"))
    Path("my.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    assert yaml.safe_load(Path("my.yaml").read_text())["data"]["path"] == "data/documents"
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    ran = []
    for words in commands:
        if words[0] == "pip":
            continue
        at = words.index("moba-cp")
        command = words[at + 1 :]
        if "my.yaml" in command:
            command += [word for setting in SMALL for word in ("--set", setting)]
        ran.append(command[0])
        if at:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*launcher, "-m", "moba_cp", *command], env=environment, capture_output=True,
                                  text=True, timeout=200 * TIME_SCALE)  # fmt: skip
            assert done.returncode == 0, done.stderr
        else:
            assert cli.main(command) == 0, (command, capsys.readouterr().err)
    assert ran == ["data", "data", "plan", "train", "train", "plot", "eval", "eval", "export"]
    assert [record["step"] for record in read_log(Path("runs/mine/log.jsonl"))] == [0, 1, 2, 3, 4]

    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    tokens = names["tokenizer"](write_jsonl(Path("documents.jsonl"), 9)[8], return_tensors="pt").input_ids
    ours = build_model(model_config_of("exported"), AttentionConfig("full"))
    load_hf(ours, "exported")
    with torch.no_grad():
        expected = names["model"].eval()(tokens).logits[0]
        got = ours(tokens[0], context=CPContext(None, "contiguous", tokens.shape[1]))
    assert tokens.shape[1] > 20 and (got - expected).abs().max() < 1e-5 * expected.abs().max()
