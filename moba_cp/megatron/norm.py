"""A norm for sequence parallelism without TransformerEngine and Apex."""

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class TorchNorm:
    """PyTorch's RMSNorm or LayerNorm where a layer spec wants a norm, under sequence parallelism too.

    There a norm sees a part of the sequence on each tensor-parallel rank, so that its weights' gradients must be
    summed over the ranks: Megatron does that for the parameters that are marked ``sequence_parallel``. Megatron's own
    wrapper marks none, and refuses sequence parallelism instead.

    Raises:
        ValueError: a kind of norm, or an option of one, that PyTorch has not.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> nn.Module:
        kinds = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
        if config.normalization not in kinds:
            raise ValueError(f"normalization={config.normalization!r} is not served; use one of {', '.join(kinds)}")
        for name, flag in (
            ("persist_layer_norm", "--no-persist-layer-norm"),
            ("layernorm_zero_centered_gamma", "no --apply-layernorm-1p"),
            ("memory_efficient_layer_norm", "no --memory-efficient-layer-norm"),
        ):
            if getattr(config, name, False):
                raise ValueError(f"{name}=True needs TransformerEngine or Apex; without them set it to False ({flag})")
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
