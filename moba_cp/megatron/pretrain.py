"""Pretraining with Megatron-LM's own trainer, attention by MoBA.

    torchrun --nproc-per-node 8 -m moba_cp.megatron.pretrain --moba-block-size 512 --moba-top-k 8 MEGATRON_FLAGS...

What Megatron-LM's ``pretrain_gpt.py`` does, from the ``megatron.training`` that the wheels of megatron-core hold from
0.19 on, with MoBA's flags in the parser and ``--spec moba_cp.megatron.spec moba_block_spec`` by default.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .arguments import add_moba_args, attention_from_args

try:
    from megatron.core import parallel_state
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.enums import ModelType
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args, get_timers, pretrain, print_rank_0
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"moba_cp.megatron.pretrain: Megatron-LM's trainer cannot be imported ({error}); it needs Python 3.12 and "
        'pip install "megatron-core>=0.19", or a checkout of Megatron-LM in PYTHONPATH'
    )

_DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer", "spec": ["moba_cp.megatron.spec", "moba_block_spec"]}
_BATCH = ("tokens", "labels", "loss_mask", "position_ids")


def main() -> None:
    """Parse Megatron-LM's and MoBA's flags, then train."""
    if not {"-h", "--help"} & set(sys.argv) and not torch.cuda.is_available():
        # Megatron says so too, but after a page of arguments, and by an assertion.
        sys.exit("moba_cp.megatron.pretrain: no CUDA GPU; Megatron-LM trains on GPUs only (moba-cp train: on CPUs too)")
    args = parse_and_validate_args(extra_args_provider=add_moba_args, args_defaults=_DEFAULTS)
    try:
        check_args(args)
        attention = attention_from_args(args)
    except ValueError as error:
        sys.exit(f"moba_cp.megatron.pretrain: {error}")
    print_rank_0(f"MoBA: {attention}")
    model_config = gpt_config_from_args(args)
    # megatron-core 0.19 leaves this flag out.
    model_config.rope_scaling_factor = args.rope_scaling_factor
    config = pretrain_cfg_container_from_args(args, model_config)
    build_datasets.is_distributed = True
    use_compiled_helpers()
    pretrain(config, build_datasets, ModelType.encoder_or_decoder, forward_step)


def check_args(args) -> None:
    """Raise ValueError for a flag that this script does not implement."""
    for name, neutral, fix in (
        ("sft", False, "use Megatron-LM's pretrain_gpt.py with a --spec of your own (moba_cp.megatron.layer_spec)"),
        ("fim_data", False, "use Megatron-LM's pretrain_gpt.py with a --spec of your own"),
        ("dataloader_inter_document_masking", False, "documents of a sequence see one another here; leave it off"),
        ("reset_attention_mask", False, "MoBA takes no mask; leave it off"),
        ("hybrid_context_parallel", False, "the context-parallel group is the same for every batch; leave it off"),
        ("hybrid_layer_pattern", None, "the model is Megatron's GPTModel; leave it out"),
        ("hybrid_override_pattern", None, "the model is Megatron's GPTModel; leave it out"),
        ("yaml_cfg", None, "MoBA's flags are no part of it; give flags"),
        ("perform_rl_step", False, "this script pretrains; leave it off"),
        ("logits_save_dir", None, "this script pretrains, without a teacher; leave it out"),
        ("logits_load_dir", None, "this script pretrains, without a teacher; leave it out"),
        ("modelopt_enabled", False, "this script pretrains without ModelOpt; leave it off"),
        ("inprocess_restart", False, "use Megatron-LM's pretrain_gpt.py with a --spec of your own"),
        ("create_attention_mask_in_dataloader", False, "MoBA is causal; add --no-create-attention-mask-in-dataloader"),
    ):
        value = getattr(args, name, neutral)
        if value != neutral:
            raise ValueError(f"{name}={value!r} is not served by moba_cp.megatron.pretrain: {fix}")
    if getattr(args, "position_embedding_type", None) == "relative":
        raise ValueError(
            "position_embedding_type='relative' is not served by moba_cp.megatron.pretrain: MoBA adds no bias to its "
            "scores; use rope, learned_absolute or none"
        )
    if args.use_distributed_optimizer and not _fused_adam():
        print_rank_0(
            "WARNING: --use-distributed-optimizer without TransformerEngine or Apex: training is right, but "
            "megatron-core cannot resume from its checkpoints; resume with --no-load-optim or leave the flag out"
        )


def use_compiled_helpers() -> None:
    """Make the trainer use the compiled index builder of the wheel.

    The trainer first runs ``make`` in that folder, and exits if it fails; the Makefile is in a checkout of Megatron-LM
    but not in the wheel.
    """
    if not (Path(dataset_utils.__file__).parent / "Makefile").exists():
        from megatron.core.datasets import helpers_cpp  # noqa: F401

        dataset_utils.compile_helpers = lambda: None


def _fused_adam() -> bool:
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    return not USING_PYTORCH_OPTIMIZER


def forward_step(data_iterator, model):
    """Output of the model on the next micro-batch, and the function that makes a loss of it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    tokens, labels, loss_mask, position_ids = next_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    return model(tokens, position_ids, None, labels=labels, loss_mask=loss_mask), partial(loss_function, loss_mask)


def next_batch(data_iterator, vp_stage: int | None) -> list[Tensor | None]:
    """tokens, labels, loss_mask, position_ids, each [b, L] or None: this rank's share, zigzag over the context."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return [None] * len(_BATCH)
    args = get_args()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {name: sample[name].cuda(non_blocking=True) for name in _BATCH}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )
    group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return [batch[name] for name in _BATCH]


def loss_function(loss_mask: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses of this rank's tokens that count, their number, and both for the log.

    Sums and counts, not means: ranks of a context-parallel group have unequal numbers of tokens that count, and
    Megatron adds two-element reports over all of them, in training and in validation.
    """
    loss_mask = loss_mask.view(-1).float()
    total = (loss.view(-1).float() * loss_mask).sum()
    count = loss_mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=total, rejection_func=rejected, message=f"{what} in the local loss", tolerance=0.0, fatal=True
            )
    return total, count, {"lm loss": torch.cat([total.detach().view(1), count.view(1)])}


def build_datasets(n_samples: list[int], vp_stage: int | None = None):
    """Training, validation and test sets of ``n_samples`` each, from Megatron-LM's flags."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, n_samples, partial(_reads_data, vp_stage=vp_stage), config).build()


def _reads_data(vp_stage: int | None = None) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) and parallel_state.get_tensor_model_parallel_rank() == 0


if __name__ == "__main__":
    main()
