"""``moba-cp export RUN --to FOLDER``: a trained model for transformers, or for Megatron-LM."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="where the model is written")
    parser.add_argument("--format", choices=("hf", "megatron"), default="hf", help="hf: safetensors, config.json and "
                        "the tokenizer, for transformers; megatron: a torch_dist checkpoint for Megatron-LM's --load "
                        "(default: hf)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the written weights (default: float32, as they are trained)")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or a folder with one (default: that "
                        "of the data or of the weights that the run began with)")  # fmt: skip
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in FOLDER; other files stay")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    import torch

    from ..megatron.hf import save_hf
    from ..outputs import check_new
    from . import megatron_lm
    from .checkpoint import META
    from .exported import trained_model
    from .log import LOG

    if arguments.shard_gb <= 0:
        raise ValueError(f"--shard-gb={arguments.shard_gb} is not above 0")
    folder, dtype = Path(arguments.to), getattr(torch, arguments.dtype)
    if any((folder / name).exists() for name in (LOG, META)):
        raise ValueError(f"--to={folder}: is a run's folder or a checkpoint; name another")
    check_new("--to", folder, arguments.overwrite)
    trained = trained_model(arguments.run, arguments.tokenizer)
    model, meta, config, tokenizer = trained.model, trained.meta, trained.config, trained.tokenizer
    if config.attention.key_conv:
        raise ValueError(
            f"attention.key_conv={config.attention.key_conv}: no model of transformers, and none of Megatron-LM's own, "
            "has a convolution over its keys, and without it the model is another one; it cannot be exported, but "
            "moba-cp generate and moba-cp eval take the run"
        )
    if arguments.format == "megatron":
        megatron_lm.save(model, trained.read, folder, meta, config, dtype)
        if config.attention.index is not None:
            print("note: index branches are left out; the model attends fully, or by mean keys with MoBA's flags")
        flags = " ".join(megatron_lm.flags(config.model))
        print(f"written: {folder}, the model after {meta.step} steps, for Megatron-LM's --load {folder} {flags}")
        return 0
    hf = trained.hf_config(arguments.dtype)
    ids = tokenizer.special_ids() if tokenizer is not None else {}
    generation = {"_from_model_config": True, **ids}
    save_hf(model, folder, hf, dtype, round(arguments.shard_gb * 1e9), trained.read,
            {"generation_config.json": json.dumps(generation, indent=2) + "\n"})  # fmt: skip
    if tokenizer is not None:
        tokenizer.copy_to(folder)
    without = "" if tokenizer is not None else "; without a tokenizer: its tokens are bytes, or none is known"
    print(f"written: {folder}, the model after {meta.step} steps as {hf['model_type']}{without}")
    if len(hf["moba"]["full_layers"]) < config.model.n_layers:
        print(
            "note: transformers attends fully in all layers (moba-cp eval --attention full says what that changes); "
            'with moba_cp.hf imported, attn_implementation="moba" attends as trained'
        )
    return 0
