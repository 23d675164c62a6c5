"""The layer's own schedule against Megatron's forward and autograd: values, gradients, and what is kept where."""

from dataclasses import replace

import pytest
import torch

from moba_cp import CPContext
from moba_cp.megatron import AttentionConfig, ModelConfig, build_model
from moba_cp.model import layer as layer_module
from moba_cp.model.layer import LayerMemory

MODEL = ModelConfig(vocab_size=61, n_layers=3, hidden_size=48, n_heads=4, n_kv_heads=2, head_dim=10, init_std=0.2)
SPARSE = AttentionConfig(block_size=16, top_k=2, full_layers=[2])
T = 100
SHAPES = {
    "grouped heads": MODEL,
    "norms and biases": replace(MODEL, qk_norm=True, qkv_bias=True),
    "tied, one KV head": replace(MODEL, n_kv_heads=1, tie_embeddings=True, qk_norm=True),
}
POLICIES = [LayerMemory(recompute, host) for recompute in ("none", "attention_kept", "full") for host in (False, True)]


def build(shape, dtype=torch.float64):
    model = build_model(shape, SPARSE, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms of ones and biases of ones would hide what multiplies or adds them.
            if parameter.dim() < 2:
                parameter.copy_(torch.empty(parameter.shape).normal_(1.0, 0.3, generator=generator))
    return model


def batch(shape=(T,)):
    tokens = torch.randint(61, shape, generator=torch.Generator().manual_seed(0))
    return tokens, tokens.roll(-1, -1)


def loss_and_grads(model, *inputs):
    model.zero_grad()
    loss = model(*inputs)
    (loss * torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)).sum().backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def with_hooks(model):
    """The model, whose layers then leave everything to Megatron and autograd."""
    return [layer.mlp.register_forward_hook(lambda *_: None) for layer in model.decoder.layers]


@pytest.mark.parametrize("slice_len", [T, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_policy_equals_autograd(shape, slice_len, monkeypatch):
    monkeypatch.setattr(layer_module, "SHORTEST_SLICE", 8)
    if slice_len < T:
        monkeypatch.setattr(layer_module, "SLICE_ELEMENTS", 1)
    model = build(SHAPES[shape])
    assert all(layer._has_own_schedule(torch.zeros(1, dtype=torch.float64)) for layer in model.decoder.layers)
    hooks = with_hooks(model)
    assert not any(layer._has_own_schedule(torch.zeros(1, dtype=torch.float64)) for layer in model.decoder.layers)
    expected = loss_and_grads(model, *batch())
    for hook in hooks:
        hook.remove()
    for memory in POLICIES:
        model.set_memory([memory] * 3)
        torch.testing.assert_close(loss_and_grads(model, *batch()), expected, rtol=0, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(model(*batch()), expected[0], rtol=0, atol=1e-11)


def test_policies_mixed_over_the_layers_and_sequences_side_by_side():
    model = build(MODEL)
    context = CPContext(None, "contiguous", T, cu_seqlens=torch.tensor([0, 37, 37, 40, T]))
    hooks = with_hooks(model)
    expected = loss_and_grads(model, *batch((2, T)), context)
    for hook in hooks:
        hook.remove()
    for memory in ([POLICIES[5], POLICIES[2], POLICIES[0]], [POLICIES[3], POLICIES[1], POLICIES[3]]):
        model.set_memory(memory)
        torch.testing.assert_close(loss_and_grads(model, *batch((2, T)), context), expected, rtol=0, atol=1e-11)


def test_float32_policies_agree():
    """Slices change the order of sums over tokens, and nothing else."""
    model = build(SHAPES["norms and biases"], torch.float32)
    expected = loss_and_grads(model, *batch())
    for memory in POLICIES[1:]:
        model.set_memory([memory] * 3)
        torch.testing.assert_close(loss_and_grads(model, *batch()), expected, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient():
    model = build(SHAPES["norms and biases"])
    expected = loss_and_grads(model, *batch())[1]
    frozen = {name for name, _ in model.named_parameters() if "linear_fc1" in name or "layernorm" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    got = loss_and_grads(model, *batch())[1]
    assert {name for name, grad in got.items() if grad is None} == frozen
    for name in expected.keys() - frozen:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


def test_a_second_backward_pass_is_refused():
    loss = build(MODEL)(*batch()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="leave retain_graph out"):
        loss.backward()


def test_under_autocast_megatron_computes():
    model = build(MODEL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not model.decoder.layers[0]._has_own_schedule(torch.zeros(1))
        model(*batch()).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_host_buffers_are_used_again():
    model = build(MODEL)
    model.set_memory([LayerMemory("attention_kept", True)] * 3)
    host = model.offloader(torch.device("cpu")).host
    loss_and_grads(model, *batch())
    nbytes = host.nbytes
    assert nbytes > 3 * T * MODEL.hidden_size * 8
    for length in (T, 60, T):
        loss_and_grads(model, *batch((length,)))
    # A forward pass without a backward pass gives them back too.
    model(*batch())
    loss_and_grads(model, *batch())
    assert host.nbytes == nbytes


def test_what_is_computed_again_names_its_layer():
    """In counters and messages; on every rank the passes of a layer are the same calls."""
    named = []
    context = CPContext(None, "contiguous", T, observer=lambda layer, *_: named.append(layer))
    model = build_model(MODEL, AttentionConfig(block_size=16, top_k=2), dtype=torch.float64)
    model.set_memory([LayerMemory("full")] * 3)
    loss_and_grads(model, *batch(), context)
    assert named == ["layer 1", "layer 2", "layer 3", "layer 3", "layer 2", "layer 1"]
