"""Checkpoints of Hugging Face's Llama and Qwen models into Megatron-core's GPTModel, and back.

Weights are read and written tensor by tensor through safetensors; nothing is rounded on the way.

Legend: g key/value heads, D head dim, H hidden size; "whole" is a parameter before tensor parallelism splits it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..index.config import INDEX_WEIGHT
from ..model.attention import KEY_CONV_WEIGHT
from .batch import group_size
from .hf_check import check_same_model
from .hf_config import describe, read_config
from .hf_files import CONFIG, INDEX, WEIGHTS, CheckpointFiles, Export, is_inverse_frequency

# Megatron's name of a layer's parameter: the checkpoint's names of what it consists of.
_LAYER = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.layer_norm_weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "self_attention.linear_qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
    # No checkpoint has it, see moba_cp.hf.key_conv.
    "self_attention.core_attention.key_conv.weight": ["self_attn.key_conv"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.layer_norm_weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_MODEL = {
    "embedding.word_embeddings.weight": [_EMBEDDING],
    "decoder.final_layernorm.weight": ["model.norm.weight"],
    "output_layer.weight": [_OUTPUT],
}


@torch.no_grad()
def load_hf(model: nn.Module, path: str | Path, same_rotary: bool = True) -> None:
    """Fill the parameters of a GPTModel from a checkpoint's safetensors.

    Works on a pipeline stage, on a tensor-parallel rank's part, and after FSDP2 has sharded the model; each rank reads
    the files. Rows that pad the vocabulary, which the checkpoint does not have, become zero.

    Args:
        model: as built, or inside of Megatron's wrappers.
        path: folder with ``config.json`` and ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        same_rotary: refuse a model whose rotary embedding is another one; training for longer sequences changes it.

    Raises:
        ValueError: the checkpoint's model is not served, or not the one that was built; its files contradict one
            another; names, shapes or dtypes of model and checkpoint do not fit.
    """
    model, path = _unwrap(model), Path(path)
    files = CheckpointFiles(path)
    hf = describe(read_config(path), f"{path}/config.json")
    check_same_model(model, hf, f"{path}/config.json", same_rotary)
    used = set()
    for name, parameter in model.named_parameters():
        if name.endswith((INDEX_WEIGHT, KEY_CONV_WEIGHT)):
            # No such model has index branches or convolutions over keys: they stay as they are, and learn.
            continue
        names = _names(model, name)
        if names == [_OUTPUT] and hf.tie_embeddings:
            names = [_EMBEDDING]
        whole = _join(model, [files.read(n, wanted_by=name) for n in names])
        used.update(names)
        if torch.promote_types(whole.dtype, parameter.dtype) != parameter.dtype:
            raise ValueError(
                f"{names[0]} is {whole.dtype} in the checkpoint, which {name} of {parameter.dtype} cannot hold "
                f"exactly; build the model in {whole.dtype} or float32 and convert it afterwards"
            )
        parameter.copy_(_distribute_like(_part(model, name, parameter, whole), parameter))
    if group_size(model.pg_collection.pp) == 1:
        left = {n for n in files.names() - used if not is_inverse_frequency(n)}
        if hf.tie_embeddings:
            left.discard(_OUTPUT)
        if left:
            raise ValueError(
                f"the checkpoint holds {len(left)} tensors that the model has no place for, such as {min(left)}; "
                "give the model the same parts (layers, biases, norms of queries and keys)"
            )


@torch.no_grad()
def save_hf(
    model: nn.Module,
    path: str | Path,
    hf_config: dict,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    read: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write the parameters of a GPTModel as a checkpoint that Hugging Face's classes load.

    A checkpoint that ``path`` holds already is replaced once the new one is whole, with all its files; other files
    stay. Under FSDP2 every rank must call it, rank 0 writes, and no rank returns before that is done.

    Args:
        model: not split by tensor or pipeline parallelism.
        path: folder; made if need be.
        hf_config: what becomes ``config.json``, usually that of the checkpoint the training began with;
            ``vocab_size`` cuts off the rows that pad the vocabulary.
        dtype: of the written tensors; the parameters' own by default.
        shard_bytes: one file holds at most so much, and so much is held in memory.
        read: gives the values of some parameters, by name, where the model's are not there (on the meta device).
        files: other files to write, name -> text, such as ``generation_config.json``.

    Raises:
        ValueError: the model is split, or is not the one that ``hf_config`` describes.
    """
    model, path = _unwrap(model), Path(path)
    for name in ("tp", "pp"):
        if (size := group_size(getattr(model.pg_collection, name))) > 1:
            raise ValueError(
                f"{name}_size={size}: save_hf writes whole models; save with Megatron's torch_dist format, load that "
                "without tensor and pipeline parallelism, and write it then"
            )
    if any(name.endswith(KEY_CONV_WEIGHT) for name, _ in model.named_parameters()):
        raise ValueError(
            "the model has convolutions over keys (attention.key_conv), which no Llama or Qwen checkpoint has; build "
            "the model without them"
        )
    hf = describe(hf_config, "hf_config")
    check_same_model(model, hf, "hf_config")
    rows = model.embedding.word_embeddings.weight.shape[0]
    if rows < hf.vocab_size:
        raise ValueError(f"vocab_size={hf.vocab_size} in hf_config but the model has {rows} rows of embeddings")
    if hf.tie_embeddings and not model.share_embeddings_and_output_weights:
        raise ValueError(
            "tie_word_embeddings=True in hf_config but the model has an output layer of its own; set it to False"
        )
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    export = Export(path) if not dist.is_initialized() or dist.get_rank() == 0 else None
    try:
        _write(model, export, hf_config, dtype, _shards(model, dtype, shard_bytes), read, files or {})
    except BaseException:
        if export is not None:
            export.discard()
        raise
    if export is not None:
        export.commit()
    if sharded:
        dist.barrier()


@torch.no_grad()
def hf_tensors(
    model: nn.Module, vocab_size: int, read: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor that :func:`save_hf` would write, and of convolutions over keys, which it refuses;
    arguments as there.

    Args:
        vocab_size: rows of embeddings, without those that pad the vocabulary.
    """
    model = _unwrap(model)
    for parameters in _shards(model, None, 5_000_000_000):
        values = dict(parameters) if read is None else read(dict(parameters))
        for name, parameter in values.items():
            yield from _split(model, name, parameter, vocab_size)


def _write(
    model, export: Export | None, hf_config: dict, dtype: torch.dtype | None, shards: list, read, files: Mapping
) -> None:
    """Every file of the checkpoint into the export's folder; without one only the gathering that others wait for."""
    weight_map, total = {}, 0
    for i, parameters in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors, values = {}, dict(parameters) if read is None else read(dict(parameters))
        for name, parameter in values.items():
            for key, tensor in _split(model, name, parameter, hf_config["vocab_size"]):
                tensors[key] = tensor.to("cpu", dtype or tensor.dtype).contiguous()
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        if export is not None:
            save_file(tensors, export.folder / file, metadata={"format": "pt"})
    if export is not None:
        for file, text in {**files, CONFIG: json.dumps(hf_config, indent=2) + "\n"}.items():
            (export.folder / file).write_text(text, encoding="utf-8")
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (export.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _unwrap(model: nn.Module) -> nn.Module:
    while not hasattr(model, "share_embeddings_and_output_weights"):
        model = model.module
    return model


def _names(model, name: str) -> list[str]:
    """The checkpoint's names of what a parameter consists of."""
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if layer is None and name in _MODEL:
        return _MODEL[name]
    if layer is None or layer[2] not in _LAYER:
        raise ValueError(f"{name} has no counterpart in Llama and Qwen checkpoints; build the model without it")
    number = model.decoder.layers[int(layer[1])].layer_number - 1
    return [f"model.layers.{number}.{rest}" for rest in _LAYER[layer[2]]]


def _join(model, tensors: list[Tensor]) -> Tensor:
    """Queries, keys and values are grouped by key/value head; gate stands before up."""
    if len(tensors) == 3:
        groups = model.config.num_query_groups
        return torch.cat([x.unflatten(0, (groups, -1)) for x in tensors], 1).flatten(0, 1)
    return torch.cat(tensors) if len(tensors) == 2 else tensors[0]


def _split(model, name: str, parameter: Tensor, rows: int) -> Iterator[tuple[str, Tensor]]:
    """The reverse of :func:`_join`, with the checkpoint's names."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
    names = _names(model, name)
    if len(names) == 3:
        config = model.config
        groups, head_dim = config.num_query_groups, config.kv_channels
        sizes = [config.num_attention_heads // groups * head_dim, head_dim, head_dim]
        parts = [x.flatten(0, 1) for x in whole.unflatten(0, (groups, -1)).split(sizes, 1)]
    else:
        parts = whole.chunk(2) if len(names) == 2 else [whole[:rows] if names[0] in (_EMBEDDING, _OUTPUT) else whole]
    yield from zip(names, parts, strict=True)


def _part(model, name: str, parameter: Tensor, whole: Tensor) -> Tensor:
    """This tensor-parallel rank's part of a parameter, with the vocabulary padded."""
    group, shape = model.pg_collection.tp, parameter.shape
    size = group_size(group)
    split = [dim for dim in range(whole.dim()) if shape[dim] * size == whole.shape[dim]] if size > 1 else []
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        missing = shape[0] * size - whole.shape[0]
        if missing > 0:
            whole = torch.cat([whole, whole.new_zeros(missing, whole.shape[1])])
        split = [0] if size > 1 else []
    if split and name.endswith("linear_fc1.weight"):
        # Each rank has its part of the gate before its part of up.
        whole = torch.cat([half.chunk(size)[group.rank()] for half in whole.chunk(2)])
    elif split:
        whole = whole.chunk(size, split[0])[group.rank()]
    if whole.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(shape)} but the checkpoint's {tuple(whole.shape)}; build the model in "
            "the checkpoint's shape (model_config_of)"
        )
    return whole


def _shards(model, dtype: torch.dtype | None, shard_bytes: int) -> list[list[tuple[str, Tensor]]]:
    """Parameters in files of at most ``shard_bytes``, a parameter in one file."""
    shards, size = [[]], 0
    for name, parameter in model.named_parameters():
        n_bytes = parameter.numel() * (dtype or parameter.dtype).itemsize
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, parameter))
        size += n_bytes
    return shards


def _distribute_like(full: Tensor, parameter: Tensor) -> Tensor:
    """``full`` as ``parameter`` is sharded; every rank has all of it."""
    if not isinstance(parameter, DTensor):
        return full
    # Every rank has the same tensor, so each cuts its own shard and nothing is sent.
    full = full.to(parameter.device, parameter.dtype)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
