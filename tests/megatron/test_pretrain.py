"""Megatron-LM's own trainer on a GPU: 20 steps on mock data on one rank and on two NCCL ranks, and a resume.

Needs ``megatron.training``, which the wheels of megatron-core hold from 0.19 on (Python 3.12).
"""

import argparse
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers.distributed import TIME_SCALE, environment_of, store_of

pytestmark = pytest.mark.gpu
pytest.importorskip("megatron.training", reason="megatron-core has it from 0.19 on, for Python 3.12")
pytest.importorskip("megatron.core.tokenizers.utils", reason="megatron-core has it from 0.19 on, for Python 3.12")

STEPS, TIMEOUT_S = 20, 240 * TIME_SCALE
# 32 blocks a sequence, of which a query attends to 3; the last layer is full.
FLAGS = """
--moba-block-size 64 --moba-top-k 3 --moba-full-layers last 1
--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --normalization RMSNorm --disable-bias-linear
--swiglu --untie-embeddings-and-output-weights --position-embedding-type rope --attention-dropout 0
--hidden-dropout 0 --no-create-attention-mask-in-dataloader --mock-data --tokenizer-type NullTokenizer
--vocab-size 255 --num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --seq-length 2048 --max-position-embeddings 2048
--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 20 --lr-warmup-iters 2
--clip-grad 1.0 --split 90,5,5 --log-interval 1 --eval-iters 4 --eval-interval 10 --train-iters 20 --seed 1234
--num-workers 0 --distributed-timeout-minutes 3
""".split()


def start(folder, name, n_ranks, *flags):
    """Ranks of one training, all on GPU 0, each with its log in ``folder``, and the store where they meet: keep it."""
    store, ranks = store_of(n_ranks), []
    for rank in range(n_ranks):
        # NCCL refuses two ranks on one GPU unless they look like two hosts. What Megatron compiles before the first
        # step are fused kernels that the flags switch off: without dynamo it does not.
        env = os.environ | environment_of(rank, n_ranks, store.port)
        env |= dict(LOCAL_RANK="0", NCCL_HOSTID=f"{store.port}-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1",
                    CUDA_DEVICE_MAX_CONNECTIONS="1", OMP_NUM_THREADS="2", TORCHDYNAMO_DISABLE="1")  # fmt: skip
        with open(folder / f"{name}.{rank}", "w") as log:
            command = [sys.executable, "-m", "moba_cp.megatron.pretrain", *FLAGS, "--context-parallel-size",
                       str(n_ranks), *flags]  # fmt: skip
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    return ranks, store


def finish(folder, runs):
    """Wait for all ranks of all runs; {name: (training losses, validation losses by step)}."""
    deadline, results = time.monotonic() + TIMEOUT_S, {}
    for name, (ranks, _) in runs.items():
        for rank, process in enumerate(ranks):
            try:
                code = process.wait(max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = "too slow"
            if code != 0:
                for others, _ in runs.values():
                    for other in others:
                        other.kill()
            log = (folder / f"{name}.{rank}").read_text()
            assert code == 0, f"{name}, rank {rank}: {code}\n{log[-3000:]}"
        text = "".join((folder / f"{name}.{rank}").read_text() for rank in range(len(ranks)))
        steps = re.findall(r"iteration +(\d+)/.*?lm loss: ([\d.E+-]+)", text)
        tests = re.findall(r"validation loss at iteration (\d+ ?(?:on \w+ set)?) \| lm loss value: ([\d.E+-]+)", text)
        results[name] = {int(i): float(x) for i, x in steps}, {i.strip(): float(x) for i, x in tests}
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.cuda.init()
    folder = tmp_path_factory.mktemp("megatron")
    save = ["--save", str(folder / "checkpoint"), "--save-interval", "10"]
    results = finish(folder, {
        "fp32": start(folder, "fp32", 1, *save),
        "fp32 cp2": start(folder, "fp32 cp2", 2),
        "bf16": start(folder, "bf16", 1, "--bf16"),
        "bf16 cp2": start(folder, "bf16 cp2", 2, "--bf16"),
    })  # fmt: skip
    (folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("10")
    load = ["--load", str(folder / "checkpoint"), "--exit-on-missing-checkpoint"]
    results |= finish(folder, {
        "resumed": start(folder, "resumed", 1, *load),
        "resumed on cp2": start(folder, "resumed on cp2", 2, *load),
    })  # fmt: skip
    for name, (losses, validation) in results.items():
        print(name, *(f"{i}: {x:.4f}" for i, x in losses.items()), *validation.items())
    return results


@pytest.mark.parametrize("dtype, rel", [("fp32", 2e-4), ("bf16", 2e-2)])
def test_losses_of_two_ranks_are_those_of_one(trained, dtype, rel):
    (one, validation), (two, validation_of_two) = trained[dtype], trained[f"{dtype} cp2"]
    assert list(one) == list(two) == list(range(1, STEPS + 1))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=rel)
    assert len(validation) == 4 and validation_of_two == pytest.approx(validation, rel=rel)
    assert one[STEPS] < one[1] - 0.3


@pytest.mark.parametrize("name", ["resumed", "resumed on cp2"])
def test_checkpoint_goes_on_where_it_was(trained, name):
    (expected, validation), (losses, again) = trained["fp32"], trained[name]
    assert list(losses) == list(range(11, STEPS + 1))
    # Step 12 is left out: after a resume Megatron logs its mean with step 11.
    for step in (11, *range(13, STEPS + 1)):
        assert losses[step] == pytest.approx(expected[step], rel=2e-4)
    assert again["20"] == pytest.approx(validation["20"], rel=2e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sft": True}, "sft=True is not served by moba_cp.megatron.pretrain: use Megatron-LM's pretrain_gpt.py"),
        ({"reset_attention_mask": True}, "reset_attention_mask=True is not served"),
        ({"create_attention_mask_in_dataloader": True}, "add --no-create-attention-mask-in-dataloader"),
    ],
    ids=str,
)
def test_what_the_script_does_not_do_is_refused(change, message):
    from moba_cp.megatron.pretrain import check_args

    plain = {"sft": False, "reset_attention_mask": False, "create_attention_mask_in_dataloader": False}
    check_args(argparse.Namespace(**plain, use_distributed_optimizer=False))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_args(argparse.Namespace(**{**plain, **change}, use_distributed_optimizer=False))
