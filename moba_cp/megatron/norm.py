"""A norm for sequence parallelism without TransformerEngine and Apex."""

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class TorchNorm:
    """PyTorch's RMSNorm or LayerNorm as the norm of a layer spec; works with sequence parallelism.

    With sequence parallelism each tensor-parallel rank normalizes its part of the sequence, so the gradients of the
    norm's weights must be summed over the ranks. Megatron does that for parameters marked ``sequence_parallel``. Its
    own wrapper of PyTorch's norms marks none, and refuses sequence parallelism instead.

    Raises:
        ValueError: a kind of norm, or an option of one, that PyTorch does not have.
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
