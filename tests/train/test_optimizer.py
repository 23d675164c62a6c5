"""Learning rate by step, decay of matrices alone, clipping by the common norm."""

import math

import pytest
import torch
from torch import nn

from moba_cp.megatron import AttentionConfig, ModelConfig, build_model
from moba_cp.train.optimizer import (
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = OptimizerConfig(lr=1.0 - 1e-9, warmup_steps=10, final_lr_ratio=0.1)
    rates = [learning_rate(config, step, 110) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[59] == pytest.approx(0.55) and rates[109] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


@pytest.mark.parametrize("decay, start", [(0.2, 88), (22, 88), (0.999, 10), (200, 10), (0, 110)])
def test_learning_rate_stays_until_the_decay(decay, start):
    config = OptimizerConfig(lr=0.5, schedule="wsd", warmup_steps=10, decay=decay, final_lr_ratio=0.1)
    rates = [learning_rate(config, step, 110) for step in range(1, 111)]
    assert config.decay_start(110) == start
    assert rates[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert set(rates[10:start]) <= {0.5} and (decay == 0 or rates[-1] == pytest.approx(0.05))
    steps = [a - b for a, b in zip(rates[start - 1 :], rates[start:])]
    assert steps == pytest.approx([0.45 / max(1, 110 - start)] * len(steps)), "it falls linearly"


def test_a_longer_run_has_the_same_rates_before_its_decay():
    config = OptimizerConfig(schedule="wsd")
    assert all(
        learning_rate(config, s, 100) == learning_rate(config, s, 1000) for s in range(1, config.decay_start(100))
    )


def test_warm_up_may_be_absent_or_longer_than_the_run():
    assert learning_rate(OptimizerConfig(lr=0.5, warmup_steps=0), 1, 1) == pytest.approx(0.05)
    assert learning_rate(OptimizerConfig(lr=0.5, warmup_steps=100), 10, 10) == pytest.approx(0.05)


def test_only_matrices_decay():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(module, OptimizerConfig(lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        factor = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("clip_norm, factor", [(1.0, 0.2), (10.0, 1.0), (None, 1.0)])
def test_clipping_scales_all_gradients_by_one_factor(clip_norm, factor):
    module = nn.Linear(2, 1)
    module.weight.grad, module.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert clip_gradients(module, clip_norm) == pytest.approx(5.0)
    assert module.weight.grad[0, 0].item() == pytest.approx(3 * factor, rel=1e-5)
    assert module.bias.grad[0].item() == pytest.approx(4 * factor, rel=1e-5)


def test_index_branches_are_clipped_by_a_norm_of_their_own():
    module = nn.ModuleDict({"rest": nn.Linear(2, 1, bias=False), "index": nn.Linear(2, 1, bias=False)})
    model = nn.ModuleDict({"layer": module})
    grads = lambda: [module["rest"].weight.grad[0, 0].item(), module["index"].weight.grad[0, 0].item()]
    for of_index in (0.5, 30.0):
        module["rest"].weight.grad, module["index"].weight.grad = (
            torch.tensor([[4.0, 0.0]]),
            torch.tensor([[of_index, 0]]),
        )
        assert clip_gradients(model, 2.0) == pytest.approx(4.0)
        assert grads() == [pytest.approx(2.0, rel=1e-5), pytest.approx(min(of_index, 2.0), rel=1e-5)]
    module["index"].weight.grad.fill_(torch.inf)
    assert not clip_gradients(model, 2.0).isfinite()


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", 0.0),
        ("lr", 1.0),
        ("eps", 0.0),
        ("clip_norm", 0.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("final_lr_ratio", 1.5),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("decay", -0.1),
        ("decay", 2.5),
        ("lr", math.nan),
    ],
)
def test_fields_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}"):
        OptimizerConfig(**{field: value})


def test_a_constant_rate_stays_after_warm_up():
    config = OptimizerConfig(lr=0.1, schedule="constant", warmup_steps=2)
    assert [learning_rate(config, step, 6) for step in range(1, 7)] == [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert config.decay_start(6) == 6


@pytest.mark.parametrize("embeddings, vectors", [(1.0, 1.0), (0.5, 1.0), (0.0, 2.0)])
def test_rates_by_group(embeddings, vectors):
    """Every parameter is in one group, and moves by its group's rate."""
    model = build_model(ModelConfig(n_layers=1, hidden_size=32, n_heads=2), AttentionConfig("full"))
    config = OptimizerConfig(embedding_lr_ratio=embeddings, vector_lr_ratio=vectors, weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_learning_rate(optimizer, config, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        apart = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        ratio = embeddings if apart else vectors if parameter.dim() < 2 else 1.0
        # The first step of AdamW is by the rate.
        torch.testing.assert_close(before[name] - parameter.detach(), torch.full_like(parameter, 1e-3 * ratio),
                                   rtol=1e-3, atol=1e-6)  # fmt: skip
