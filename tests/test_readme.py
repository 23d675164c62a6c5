"""The README's Python examples run as printed."""

import re
from pathlib import Path

import torch
import torch.distributed as dist

README = (Path(__file__).parents[1] / "README.md").read_text()


def _example(after: str) -> str:
    """The first Python block behind a heading."""
    return re.search(r"```python\n(.*?)```", README.split(f"\n## {after}\n")[1], re.DOTALL)[1]


def test_in_your_own_model():
    example = _example("In your own model")
    assert len(example.strip().splitlines()) <= 13
    names = {}
    exec(example, names)
    names["out"].sum().backward()
    assert names["q"].grad.isfinite().all()


def test_in_megatron_core():
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    example = _example("In Megatron-core")
    assert len(example.strip().splitlines()) <= 12
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
    )
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        tokens = torch.randint(256, (1, 512))
        names = {"config": config, "tokens": tokens, "labels": tokens.roll(-1)}
        exec(example, names)
        names["loss"].mean().backward()
        assert names["model"].decoder.layers[0].self_attention.core_attention.kind == "moba"
        assert names["model"].decoder.layers[1].self_attention.core_attention.kind == "full"
    finally:
        parallel_state.destroy_model_parallel()
        if started:
            dist.destroy_process_group()
