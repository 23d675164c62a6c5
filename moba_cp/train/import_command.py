"""``moba-cp import FOLDER``: a training config that begins with the weights of an existing model."""

import argparse
from pathlib import Path

from .command import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="of Llama, Mistral, Qwen2 or Qwen3 weights, or a "
                        "torch_dist checkpoint of Megatron-LM")  # fmt: skip
    parser.add_argument("--to", required=True, metavar="CONFIG", help="the YAML file to write, for moba-cp train")
    parser.add_argument("--hf", metavar="FOLDER", help="of a Megatron-LM checkpoint: write the weights here, as "
                        "Hugging Face's, which the config then begins with")  # fmt: skip
    add_overrides(parser, "config")
    parser.add_argument("--overwrite", action="store_true", help="replace CONFIG, and a model in --hf's FOLDER")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    from ..data.encode import TOKENIZER
    from ..megatron.hf_config import model_config_of
    from ..megatron.hf_files import CheckpointFiles
    from ..outputs import check_new, check_writable
    from . import megatron_lm
    from .config import TrainConfig
    from .yaml_config import build, override, to_dict, to_yaml

    target, folder = Path(arguments.to), Path(arguments.folder)
    # A key that is wrong is told before weights are written.
    for text in arguments.overrides:
        override(TrainConfig, {}, text)
    if target.exists() and not arguments.overwrite:
        raise ValueError(f"--to={target}: is there; name another file, or replace it (--overwrite)")
    check_writable("--to", target.parent)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if megatron_lm.is_checkpoint(folder):
        if arguments.hf is None:
            raise ValueError(f"{folder}: a checkpoint of Megatron-LM; name a folder for its weights (--hf FOLDER)")
        check_new("--hf", Path(arguments.hf), arguments.overwrite)
        megatron_lm.to_hf(folder, Path(arguments.hf))
        folder = Path(arguments.hf)
    elif arguments.hf is not None:
        raise ValueError(f"--hf={arguments.hf}: {folder} is no checkpoint of Megatron-LM; leave --hf out")
    model = model_config_of(folder)
    # Its files are looked at now, not when training begins.
    n_tensors = len(CheckpointFiles(folder).names())
    values = {
        "model": to_dict(model),
        "optimizer": {"lr": 2e-5, "warmup_steps": 50},
        "run": {"start_from": str(folder), "dtype": "bfloat16"},
    }
    for text in arguments.overrides:
        override(TrainConfig, values, text)
    config = build(TrainConfig, values)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        f"# Begins with the weights in {folder}; made by moba-cp import.\n" + to_yaml(config), encoding="utf-8"
    )
    print(f"{folder}: {model.n_parameters(embeddings=True) / 1e6:,.1f} M parameters in {n_tensors} tensors")
    if (folder / TOKENIZER).is_file():
        print(f"for its data: moba-cp data build TEXT --to PREFIX --tokenizer {folder}")
    print(f"written: {target}; next: moba-cp train {target} --set data.path=PREFIX --set run.directory=runs/NAME")
    return 0
