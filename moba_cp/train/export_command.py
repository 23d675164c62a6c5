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


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    import torch

    from ..megatron.hf import save_hf
    from ..megatron.hf_config import hf_config_of
    from ..megatron.model import build_model
    from . import checkpoint, megatron_lm, storage
    from .config import TrainConfig
    from .yaml_config import build

    if arguments.shard_gb <= 0:
        raise ValueError(f"--shard-gb={arguments.shard_gb} is not above 0")
    path = checkpoint.find(Path(arguments.run))
    meta = checkpoint.read_meta(path)
    config = build(TrainConfig, meta.config)
    model = build_model(config.model, config.attention.at(max(meta.step, 1), config.run.steps), device="meta")
    folder, dtype = Path(arguments.to), getattr(torch, arguments.dtype)

    def read(wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {"model": {name: torch.empty(x.shape, dtype=x.dtype) for name, x in wanted.items()}}
        storage.read(state, path)
        return state["model"]

    if arguments.format == "megatron":
        megatron_lm.save(model, read, folder, meta, config, dtype)
        flags = " ".join(megatron_lm.flags(config.model))
        print(f"written: {folder}, the model after {meta.step} steps, for Megatron-LM's --load {folder} {flags}")
        return 0
    tokenizer = _tokenizer_of(arguments.tokenizer, config)
    ids = tokenizer.special_ids() if tokenizer is not None else {}
    hf = hf_config_of(config.model, config.data.seq_len, arguments.dtype, **ids)
    # What transformers does not know, it keeps.
    hf["moba"] = {"block_size": config.attention.block_size, "top_k": config.attention.top_k,
                  "full_layers": sorted(config.attention.full_layer_numbers(config.model.n_layers))}  # fmt: skip
    generation = {"_from_model_config": True, **ids}
    save_hf(model, folder, hf, dtype, round(arguments.shard_gb * 1e9), read,
            {"generation_config.json": json.dumps(generation, indent=2) + "\n"})  # fmt: skip
    if tokenizer is not None:
        tokenizer.copy_to(folder)
    without = "" if tokenizer is not None else "; without a tokenizer: its tokens are bytes, or none is known"
    print(f"written: {folder}, the model after {meta.step} steps as {hf['model_type']}{without}")
    if config.attention.default == "moba" and len(hf["moba"]["full_layers"]) < config.model.n_layers:
        print("note: transformers attends fully in all layers; moba-cp eval says what that changes (--attention full)")
    return 0


def _tokenizer_of(path: str | None, config):
    """The encoder of the tokenizer that was named, or that belongs to the data or to the first weights; None: none."""
    from ..data.encode import TOKENIZER, TokenizerEncoder
    from ..data.indexed import prefix_of

    if path is not None:
        return TokenizerEncoder(path)
    data = config.data
    prefixes = [prefix_of(x) for x in (data.path, *(corpus.path for corpus in data.corpora)) if x is not None]
    folders = [p.with_name(p.name + ".tokenizer") for p in prefixes if p is not None]
    folders += [Path(config.run.start_from)] if config.run.start_from is not None else []
    found = next((folder for folder in folders if (folder / TOKENIZER).is_file()), None)
    return None if found is None else TokenizerEncoder(found)
