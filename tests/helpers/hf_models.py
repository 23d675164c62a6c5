"""Tiny random models of transformers, and what they should compute."""

import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moba_cp import reference
from moba_cp.config import Gate
from moba_cp.hf import use_moba

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCABULARY = 61


def tiny(family: str = "llama", layers: int = 3, **options):
    """A model with weights so large that attention matters, in float64 (its norms compute in float32)."""
    config_class, model_class = FAMILIES[family]
    fields = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, initializer_range=0.3, pad_token_id=0,
        sliding_window=None, attention_dropout=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return model_class(config_class(**(fields | options))).double().eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """[batch, length] int64, none of them the padding's."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _reference_forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Sequences without padding, whole, in plain loops."""
    options = module.config.moba
    full = options["full_layers"] == "last 1" and module.layer_idx == module.config.num_hidden_layers - 1
    rows = []
    for of_sequence in zip(*(x.transpose(1, 2) for x in (query, key, value))):
        if full:
            rows.append(reference.full_attention(*of_sequence, softmax_scale=scaling))
        else:
            sizes = options["block_size"], options["top_k"]
            gate = {name: options[name] for name in Gate._fields if name in options}
            rows.append(reference.moba_attention(*of_sequence, *sizes, softmax_scale=scaling, **gate))
    return torch.stack(rows), None


AttentionInterface.register("moba_reference", _reference_forward)


def both(
    family: str = "llama", layers: int = 3, block_size: int = 16, top_k: int = 3, full_layers: str = "last 1", **gate
):
    """A model that attends with MoBA, and its twin whose attention is the reference's."""
    ours, plain = tiny(family, layers), tiny(family, layers)
    use_moba(ours, block_size, top_k, full_layers, **gate)
    plain.config.moba = dict(ours.config.moba)
    plain.set_attn_implementation("moba_reference")
    return ours, plain


def gradients(model) -> dict[str, torch.Tensor]:
    """By name; forgotten by the model."""
    grads = {name: x.grad for name, x in model.named_parameters()}
    model.zero_grad()
    return grads


def close(actual, expected, bound: float = 1e-5) -> None:
    """To what float32 leaves of float64, relative to the largest."""
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound * expected.abs().max().item())
