"""Megatron's transformer layer with MoBA as its core attention, configured when the model is built.

The object that ``--spec`` names exists at import, before the trainer has parsed its arguments. So the layer itself asks
Megatron for the submodules that fit its configuration, and replaces the core attention in them.
"""

import copy

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import LayerNormImpl
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from ..cp.options import ExchangeOptions
from ..model.attention import AttentionConfig
from .arguments import options_of_trainer
from .batch import group_size
from .core_attention import MoBACoreAttention
from .index import watch_input
from .norm import TorchNorm


class MoBATransformerLayer(TransformerLayer):
    """Built from the specs in :mod:`moba_cp.megatron.spec`.

    Args:
        config: of the model. ``transformer_impl`` decides where linear layers and norms come from.
        layer_number: counted from 1 within the pipeline stage.
        attention: of the whole model; None takes it, and the exchange, from the flags of Megatron-LM's trainer.
        exchange: between context-parallel ranks.
        whole_block: the norm after the last layer is ours too (:func:`moba_cp.megatron.spec.block_spec`).
        All others: as Megatron's TransformerLayer.

    Raises:
        ValueError: the configuration asks for something that MoBA does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        attention: AttentionConfig | None = None,
        exchange: ExchangeOptions | None = None,
        whole_block: bool = False,
        **kwargs,
    ):
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        if attention is None:
            attention, exchange = options_of_trainer()
        _refuse(config, attention, whole_block)
        pp_rank = pg_collection.pp.rank() if group_size(getattr(pg_collection, "pp", None)) > 1 else 0
        index = layer_number - 1 + get_transformer_layer_offset(config, vp_stage, pp_rank)
        super().__init__(
            config,
            layer_submodules(config, attention, index, exchange),
            layer_number=layer_number,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **kwargs,
        )
        watch_input(self.self_attention)


def layer_submodules(
    config: TransformerConfig, attention: AttentionConfig, index: int, exchange: ExchangeOptions | None = None
) -> TransformerLayerSubmodules:
    """Megatron's submodules of the layer with ``index`` (from 0, through the whole model), with MoBA in them."""
    specs = get_gpt_decoder_layer_specs(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    submodules = copy.deepcopy(specs[index].submodules)
    of_attention = submodules.self_attention.submodules
    params = {"attention": attention, "exchange": exchange}
    of_attention.core_attention = ModuleSpec(module=MoBACoreAttention, params=params)
    for owner in (submodules, of_attention):
        for name, module in vars(owner).items():
            if module is WrappedTorchNorm:
                setattr(owner, name, TorchNorm)
    return submodules


def final_norm(config: TransformerConfig) -> type:
    """The norm after the last layer."""
    return LayerNormImpl if config.transformer_impl == "transformer_engine" else TorchNorm


def _refuse(config: TransformerConfig, attention: AttentionConfig, whole_block: bool) -> None:
    if config.transformer_impl == "transformer_engine" and not HAVE_TE:
        raise ValueError(
            "transformer_impl='transformer_engine' but TransformerEngine is not installed; install it or use "
            "--transformer-impl local"
        )
    if config.transformer_impl not in ("local", "transformer_engine"):
        raise ValueError(
            f"transformer_impl={config.transformer_impl!r} is not for training; use 'local' or 'transformer_engine'"
        )
    if attention.index is not None:
        for name, refused, rule in (
            ("transformer_impl", "transformer_engine", "TransformerEngine norms a layer's input inside its projection"),
            ("fp16", True, "the loss of index branches is not scaled"),
        ):
            if getattr(config, name) == refused:
                raise ValueError(f"{name}={refused!r} with an index branch: {rule}; use another, or no index branch")
    if isinstance(config.cp_comm_type, (list, tuple)):
        raise ValueError(
            f"cp_comm_type={config.cp_comm_type!r}: the exchange is MoBA's own in every layer; leave it at 'p2p'"
        )
    if config.context_parallel_size > 1 and attention.layout != "zigzag":
        raise ValueError(
            f"layout={attention.layout!r} but Megatron-LM's batches are zigzag; use layout='zigzag', or with_moba and "
            "batches and rotary embeddings of your own"
        )
    if config.sequence_parallel and LayerNormImpl is WrappedTorchNorm and not whole_block:
        raise ValueError(
            "sequence_parallel=True: without TransformerEngine the final norm of a layer spec does not know it; use "
            "--spec moba_cp.megatron.spec moba_block_spec"
        )
    for name, neutral, rule in (
        ("mtp_num_layers", None, "layers of multi-token prediction would attend with Megatron's own attention"),
        ("heterogeneous_block_specs", False, "layers of different shapes are not served"),
        ("experimental_attention_variant", None, "the attention is MoBA"),
    ):
        value = getattr(config, name, neutral)
        if value != neutral:
            raise ValueError(f"{name}={value!r}: {rule}; set it to {neutral!r}")
