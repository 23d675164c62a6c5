"""Models in Megatron-LM's torch_dist checkpoints: what ``pretrain --load`` takes, and back.

Such a checkpoint can be read with any tensor, pipeline and context parallelism. A whole model is held in host memory
while one is written or read.
"""

import argparse
import contextlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from ..megatron.hf import save_hf
from ..megatron.hf_config import hf_config_of
from ..megatron.model import build_model
from ..model.attention import AttentionConfig
from ..model.config import ModelConfig
from ..model.rope import RopeScaling
from .checkpoint import CheckpointMeta
from .config import TrainConfig

_LATEST = "latest_checkpointed_iteration.txt"
# Arguments of Megatron-LM that change what a model computes, and the values that are served.
_SERVED = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "num_experts": None,
    "multi_latent_attention": False,
    "rotary_seq_len_interpolation_factor": None,
}


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is one that Megatron-LM's trainer has saved into."""
    return (folder / _LATEST).is_file()


def save(
    model,
    read: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    folder: Path,
    meta: CheckpointMeta,
    config: TrainConfig,
    dtype: torch.dtype,
) -> None:
    """Write the model of a checkpoint of ours into ``folder``, for ``--load``; one of the same step is replaced.

    Args:
        model: on the meta device.
        read: gives the values of its parameters, by name.
        meta, config: of the checkpoint.
        dtype: of the written weights.

    Raises:
        ValueError: Megatron-LM has no such rotary embedding.
    """
    target = folder / f"iter_{meta.step:07d}"
    partial = target.with_name(f"{target.name}.partial")
    arguments = _arguments(config, meta, dtype)
    full = build_model(config.model, AttentionConfig(default="full"), device="meta", dtype=dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            parameter.copy_(read({name: model.get_parameter(name)})[name])
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _one_process():
        state = {
            "args": arguments,
            "checkpoint_version": 3.0,
            "iteration": meta.step,
            "model": full.sharded_state_dict(),
        }
        dist_checkpointing.save(state, str(partial))
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    (folder / _LATEST).write_text(str(meta.step))


def flags(model: ModelConfig) -> list[str]:
    """What has to be said to Megatron-LM beside ``--load``: its ``--use-checkpoint-args`` leaves these out."""
    scaling = model.rope_scaling
    rotary = []
    if scaling is not None and scaling.kind == "linear":
        rotary = [f"--rotary-seq-len-interpolation-factor {scaling.factor:g}"]
    elif scaling is not None:
        rotary = [f"--use-rope-scaling --rope-scaling-factor {scaling.factor:g}"]
    norms = ["--qk-layernorm"] if model.qk_norm else []
    return ["--finetune", "--use-checkpoint-args", f"--norm-epsilon {model.norm_eps:g}", *norms, *rotary]


def to_hf(folder: Path, target: Path) -> None:
    """Write the newest model in ``folder`` into ``target``, as Hugging Face's classes load it.

    Raises:
        ValueError: a kind of checkpoint or of model that is not served.
    """
    named = (folder / _LATEST).read_text().strip()
    path = folder / (f"iter_{int(named):07d}" if named.isdigit() else named)
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ValueError(
            f"{path}: not a torch_dist checkpoint; load it in Megatron-LM and save it with --ckpt-format torch_dist"
        )
    arguments = dist_checkpointing.load_common_state_dict(str(path)).get("args")
    if arguments is None:
        raise ValueError(f"{path}: does not say its arguments, and with them the shape of its model")
    model = _model_of(arguments, path)
    dtype = getattr(arguments, "params_dtype", torch.float32)
    built = build_model(model, AttentionConfig(default="full"), device="meta", dtype=dtype).to_empty(device="cpu")
    with _one_process():
        loaded = dist_checkpointing.load({"model": built.sharded_state_dict()}, str(path))
    built.load_state_dict(loaded["model"])
    seq_len = getattr(arguments, "max_position_embeddings", None) or arguments.seq_length
    save_hf(built, target, hf_config_of(model, seq_len, str(dtype).removeprefix("torch.")))


@contextlib.contextmanager
def _one_process():
    """What Megatron-core's checkpoints ask for though there is one process: groups, and a GPU to wait for."""
    if dist.get_world_size() > 1:
        raise ValueError(f"{dist.get_world_size()} ranks: start this command by itself, without torchrun")
    made, kept = not parallel_state.is_initialized(), (torch.cuda.synchronize, torch.cuda.current_device)
    if made:
        parallel_state.initialize_model_parallel()
    if not torch.cuda.is_available():
        torch.cuda.synchronize, torch.cuda.current_device = (lambda *_: None), (lambda: torch.device("cpu"))
    try:
        with warnings.catch_warnings():
            # Of PyTorch's functions that Megatron-core calls.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.cuda.synchronize, torch.cuda.current_device = kept
        if made:
            parallel_state.destroy_model_parallel()


def _arguments(config: TrainConfig, meta: CheckpointMeta, dtype: torch.dtype) -> argparse.Namespace:
    """The arguments of Megatron-LM that build this model: ``--use-checkpoint-args`` takes them."""
    model, scaling = config.model, config.model.rope_scaling
    llama = RopeScaling(factor=scaling.factor) if scaling is not None else None
    if scaling is not None and scaling not in (llama, RopeScaling(scaling.factor, kind="linear")):
        raise ValueError(
            f"model.rope_scaling={scaling}: Megatron-LM has Llama 3.1's with its own turns and length, and a linear one"
        )
    return argparse.Namespace(
        num_layers=model.n_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.n_heads,
        group_query_attention=model.n_kv_heads != model.n_heads,
        num_query_groups=model.n_kv_heads,
        kv_channels=model.head_dim,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        make_vocab_size_divisible_by=1,
        norm_epsilon=model.norm_eps,
        rotary_base=model.rope_base,
        use_rope_scaling=scaling == llama and scaling is not None,
        rope_scaling_factor=scaling.factor if scaling is not None else 8.0,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        seq_length=config.data.seq_len,
        max_position_embeddings=config.data.seq_len,
        params_dtype=dtype,
        iteration=meta.step,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        **_SERVED
        | {"rotary_seq_len_interpolation_factor": scaling.factor if scaling and scaling.kind == "linear" else None},
    )


def _model_of(arguments: argparse.Namespace, path: Path) -> ModelConfig:
    for name, value in _SERVED.items():
        given = getattr(arguments, name, value)
        if given != value and name != "rotary_seq_len_interpolation_factor":
            raise ValueError(f"{path}: trained with {name}={given!r}, which is not served; it must be {value!r}")
    scaling = None
    if divisor := getattr(arguments, "rotary_seq_len_interpolation_factor", None):
        scaling = RopeScaling(float(divisor), kind="linear")
    elif getattr(arguments, "use_rope_scaling", False):
        scaling = RopeScaling(float(getattr(arguments, "rope_scaling_factor", 8.0)))
    grouped = getattr(arguments, "group_query_attention", False)
    return ModelConfig(
        vocab_size=arguments.padded_vocab_size,
        n_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        n_heads=arguments.num_attention_heads,
        n_kv_heads=arguments.num_query_groups if grouped else arguments.num_attention_heads,
        head_dim=arguments.kv_channels,
        ffn_hidden_size=arguments.ffn_hidden_size,
        rope_base=float(arguments.rotary_base),
        rope_scaling=scaling,
        norm_eps=getattr(arguments, "norm_epsilon", 1e-5),
        tie_embeddings=not arguments.untie_embeddings_and_output_weights,
        qk_norm=bool(getattr(arguments, "qk_layernorm", False)),
        qkv_bias=bool(getattr(arguments, "add_qkv_bias", False)),
    )
