"""A run's model as transformers knows it: its config.json, its tensors, its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..megatron.hf_config import hf_config_of
from ..megatron.model import build_model
from ..model.attention import AttentionConfig
from . import checkpoint, storage
from .checkpoint import CheckpointMeta
from .config import TrainConfig
from .yaml_config import build


@dataclass(frozen=True)
class TrainedModel:
    """What is written, or answers, after training."""

    model: nn.Module
    """A GPTModel on the meta device."""
    attention: AttentionConfig
    """Of the checkpoint's step."""
    read: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Values of some parameters, by name, from the checkpoint."""
    tokenizer: Any
    """A :class:`moba_cp.data.encode.TokenizerEncoder`; None where tokens are bytes, or no tokenizer is known."""
    config: TrainConfig
    """The run's."""
    meta: CheckpointMeta
    """The checkpoint's."""

    def hf_config(self, dtype: str = "float32") -> dict:
        """Its config.json for weights of ``dtype``, with what layers attend to in ``moba``. It says nothing of a
        convolution over keys, which transformers does not know: see :func:`moba_cp.hf.key_conv.add_key_conv`.

        Raises:
            ValueError: no model of transformers has these parts together.
        """
        if self.config.attention.index is not None:
            raise ValueError(
                "attention.index: the model's MoBA layers attend to what their index branches choose, which "
                "transformers does not know; moba-cp eval takes the run, and export --format megatron writes it "
                "without them, for full attention"
            )
        ids = self.tokenizer.special_ids() if self.tokenizer is not None else {}
        hf = hf_config_of(self.config.model, self.config.data.seq_len, dtype, **ids)
        # What transformers does not know, it keeps; moba_cp.hf reads it.
        hf["moba"] = {"block_size": self.attention.block_size, "top_k": self.attention.top_k,
                      "full_layers": sorted(self.attention.full_layer_numbers(self.config.model.n_layers)),
                      **self.attention.moba.gate.changed()}  # fmt: skip
        return hf


def trained_model(run: str | Path, tokenizer: str | None = None) -> TrainedModel:
    """The model of a run's folder, or of one of its checkpoints.

    Args:
        run: the folder.
        tokenizer: tokenizer.json or a folder with one; by default that of the data or of the first weights.

    Raises:
        ValueError: no checkpoint there, or no such tokenizer.
    """
    path = checkpoint.find(Path(run))
    meta = checkpoint.read_meta(path)
    config = build(TrainConfig, meta.config)
    attention = config.attention.at(max(meta.step, 1), config.run.steps)
    model = build_model(config.model, attention, device="meta")

    def read(wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {"model": {name: torch.empty(x.shape, dtype=x.dtype) for name, x in wanted.items()}}
        storage.read(state, path)
        return state["model"]

    return TrainedModel(model, attention, read, _tokenizer_of(tokenizer, config), config, meta)


def _tokenizer_of(path: str | None, config: TrainConfig):
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
