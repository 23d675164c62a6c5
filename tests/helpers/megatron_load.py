"""Megatron-LM's own ``pretrain`` for one step on the CPU.

    python -m tests.helpers.megatron_load SEQUENCES --load CHECKPOINT FLAGS...

It loads the model in CHECKPOINT, its shape too, and logs the loss of the sequences in the file SEQUENCES, a list of
(tokens [T], labels [T], -100: none).
"""

import sys
from unittest import mock

import torch

from moba_cp.megatron import pretrain
from moba_cp.model.loss import IGNORED_LABEL
from tests.helpers.cuda_stub import cuda_on_cpu

# All layers attend fully. What the checkpoint says of the model's shape is not said here.
FLAGS = """
--moba-full-layers all --exit-on-missing-checkpoint --ckpt-format torch_dist
--distributed-backend gloo --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --attention-dropout 0
--hidden-dropout 0 --no-create-attention-mask-in-dataloader --mock-data --tokenizer-type NullTokenizer
--vocab-size 255 --make-vocab-size-divisible-by 1 --micro-batch-size 1 --lr 1e-9 --min-lr 0 --lr-decay-iters 20
--split 90,5,5 --log-interval 1 --eval-iters 0 --eval-interval 10 --train-iters 1 --seed 1 --num-workers 0
""".split()


def main(file: str, *flags: str) -> None:
    """Run the command."""
    sequences = torch.load(file)
    batches = iter(sequences)

    def next_batch(*_):
        tokens, labels = (x[None].long() for x in next(batches))
        counts = (labels != IGNORED_LABEL).float()
        return [tokens, labels.clamp(min=0), counts, torch.arange(tokens.shape[1])[None]]

    sys.argv = ["pretrain", *flags, "--global-batch-size", str(len(sequences)), *FLAGS]
    gpu = mock.MagicMock(major=9, minor=0, total_memory=2**33, multi_processor_count=1)
    with (
        cuda_on_cpu(),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.accelerator, "is_available", lambda: False),
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: gpu),
        mock.patch.object(pretrain, "next_batch", next_batch),
    ):
        pretrain.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
