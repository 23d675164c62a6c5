"""The share of the softmax inside chosen blocks, against plain loops, and in a model that is trained."""

import pytest
import torch

from moba_cp.experiments.mass import block_sizes, mass_inside


def test_the_share_is_that_of_loops():
    torch.manual_seed(0)
    length, block, positions = 50, 8, torch.tensor([27, 33, 49])
    q, k = torch.randn(3, 4, 16), torch.randn(length, 2, 16)
    found = mass_inside(q, k, positions, 0.5, block, [1, 2, 4])
    sums = torch.zeros(3)
    for n, t in enumerate(positions.tolist()):
        for h in range(4):
            keys = k[: t + 1, h // 2]
            weights = (keys @ q[n, h] * 0.5).softmax(0)
            # A block before the current one is whole.
            earlier = [(k[b * block : (b + 1) * block, h // 2].mean(0) @ q[n, h], b) for b in range(t // block)]
            order = [t // block] + [b for _, b in sorted(earlier, reverse=True)]
            for i, top_k in enumerate((1, 2, 4)):
                sums[i] += sum(weights[b * block : (b + 1) * block].sum() for b in order[:top_k])
    assert torch.allclose(found, sums / 12, atol=1e-5)
    assert found[0] < found[1] < found[2] < 1


def test_all_blocks_hold_all():
    q, k = torch.randn(2, 2, 8), torch.randn(32, 2, 8)
    assert mass_inside(q, k, torch.tensor([30, 31]), 1.0, 8, [9])[0] == pytest.approx(1, abs=1e-5)


def test_block_sizes_follow_the_length():
    assert block_sizes(32768) == [64, 128, 256, 512, 1024, 2048, 4096] and block_sizes(512) == [16, 32, 64]


def test_keys_are_weighed_as_queries_see_them(tmp_path, monkeypatch):
    """Those of a model with a convolution over keys are the convolved ones."""
    from types import SimpleNamespace

    from moba_cp import CPContext
    from moba_cp.experiments import mass
    from moba_cp.experiments.scales import scale_called
    from moba_cp.megatron import AttentionConfig, ModelConfig, build_model, core_attention
    from moba_cp.train.mesh import close_mesh

    length, config = 128, scale_called("tiny").base
    model = build_model(
        ModelConfig(vocab_size=64, n_layers=2, hidden_size=32, n_heads=2), AttentionConfig("full", key_conv=3),
        dtype=torch.float32,
    )  # fmt: skip
    for layer in model.decoder.layers:
        torch.nn.init.normal_(layer.self_attention.core_attention.key_conv.weight)
    tokens = torch.randint(64, (length,), generator=torch.Generator().manual_seed(0))
    batch = SimpleNamespace(tokens=tokens, labels=tokens, context=CPContext(None, "contiguous", length))
    weighed, seen, attention = [], [], core_attention.full_attention
    monkeypatch.setattr(mass, "model_with", lambda *args: model)
    monkeypatch.setattr(mass, "plan_run", lambda *args: None)
    monkeypatch.setattr(mass, "Batches", lambda *args: SimpleNamespace(validation=lambda: [batch]))
    monkeypatch.setattr(mass, "mass_inside", lambda q, k, *args: weighed.append(k) or torch.zeros(len(mass.TOP_K)))
    monkeypatch.setattr(core_attention, "full_attention", lambda q, k, *args, **kwargs: seen.append(k) or attention(
        q, k, *args, **kwargs))  # fmt: skip
    try:
        mass.weigh(config, length)
    finally:
        close_mesh()
    n_sizes = len(block_sizes(length))
    assert len(seen) == 2 and len(weighed) == 2 * n_sizes
    for layer, keys in enumerate(seen):
        torch.testing.assert_close(weighed[layer * n_sizes], keys)
