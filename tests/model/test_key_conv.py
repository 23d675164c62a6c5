"""The convolution over keys in a model: every policy of what is kept against autograd, several ranks against one."""

import pytest
import torch

from moba_cp import CPContext, MoBAConfig
from moba_cp.eager import key_conv as eager_key_conv
from moba_cp.megatron import AttentionConfig, ModelConfig, build_model
from moba_cp.model.attention import KEY_CONV_WEIGHT
from moba_cp.model.layer import LayerMemory, LayerRun, LayerWeights, layer_forward
from moba_cp.model.offload import Offloader
from moba_cp.model.schedule import Phase
from moba_cp.passes import AttentionPasses
from tests.helpers.distributed import run_threads

MODEL = ModelConfig(vocab_size=61, n_layers=3, hidden_size=48, n_heads=4, n_kv_heads=2, head_dim=12, init_std=0.2,
                    qk_norm=True)  # fmt: skip
SPARSE = AttentionConfig(block_size=16, top_k=2, full_layers=[2], key_conv=3)
T = 100
BOUNDS = [0, 37, 37, T]
POLICIES = [LayerMemory(recompute, host) for recompute in ("none", "attention_kept", "full") for host in (False, True)]


def build(attention=SPARSE, std=0.5):
    model = build_model(MODEL, attention, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(KEY_CONV_WEIGHT):
                assert not parameter.any()
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
    return model


def loss_and_grads(model, shape=(T,)):
    tokens = torch.randint(61, shape, generator=torch.Generator().manual_seed(0))
    context = CPContext(None, "contiguous", T, cu_seqlens=BOUNDS)
    model.zero_grad()
    loss = model(tokens, tokens.roll(-1, -1), context)
    (loss * torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)).sum().backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(T,), (2, T)], ids=["one", "two"])
def test_every_policy_equals_autograd(shape, monkeypatch):
    monkeypatch.setattr(eager_key_conv, "_SLICE", 16)
    model = build()
    # With a hook the layers leave everything to Megatron and autograd.
    hooks = [layer.mlp.register_forward_hook(lambda *_: None) for layer in model.decoder.layers]
    expected = loss_and_grads(model, shape)
    for hook in hooks:
        hook.remove()
    of_convolutions = [grad for name, grad in expected[1].items() if name.endswith(KEY_CONV_WEIGHT)]
    assert len(of_convolutions) == 3 and all((grad.abs() > 1e-6).all() for grad in of_convolutions)
    for memory in POLICIES:
        model.set_memory([memory] * 3)
        torch.testing.assert_close(loss_and_grads(model, shape), expected, rtol=0, atol=1e-11)


def test_a_new_one_changes_nothing_and_learns():
    without = build(AttentionConfig(block_size=16, top_k=2, full_layers=[2]))
    new = build(std=0.0)
    new.load_state_dict(without.state_dict(), strict=False)
    loss, grads = loss_and_grads(new)
    assert torch.equal(loss, loss_and_grads(without)[0])
    assert all(grad.any() for name, grad in grads.items() if name.endswith(KEY_CONV_WEIGHT))
    assert not torch.equal(loss_and_grads(build(std=0.1))[0], loss)


@pytest.mark.parametrize(
    "attention",
    [SPARSE, AttentionConfig(default="full", key_conv=3), AttentionConfig(schedule=(Phase("full"),), key_conv=3)],
    ids=["full_layers", "full", "schedule"],
)
def test_layers_with_full_attention_have_one_too(attention):
    """Models that differ in attention alone have the same weights, so that either may begin with the other's."""
    names = {name: p for name, p in build(attention).named_parameters() if name.endswith(KEY_CONV_WEIGHT)}
    assert len(names) == 3 and sum(p.numel() for p in names.values()) == attention.key_conv_parameters(3, 2, 12)
    _, grads = loss_and_grads(build(attention))
    assert all(grads[name].any() for name in names)


def test_other_widths_are_refused():
    for width in (1, 4, True, "3"):
        with pytest.raises(ValueError, match="is not 0, 3 or 5"):
            AttentionConfig(key_conv=width)


def _of_a_rank(comm, layout, recompute):
    """Output and gradients of a layer, and the gradients of its weights."""
    model = build()
    layer = model.decoder.layers[0]
    attention = layer.self_attention
    cp = CPContext(comm, layout, T, BOUNDS if layout != "zigzag_per_document" else None)
    angles = model.rotary.angles(cp.document_positions)
    turned = [f(angles.flatten(1)[:, : MODEL.head_dim // 2]) for f in (torch.cos, torch.sin)]
    run = LayerRun(
        AttentionPasses("moba", MoBAConfig(16, 2), MODEL.head_dim**-0.5, cp, "layer 1"), *turned, 2, 1e-5,
        LayerMemory(recompute), Offloader(torch.device("cpu")),
    )  # fmt: skip
    weights = LayerWeights(
        layer.input_layernorm.weight, attention.linear_qkv.weight, None, attention.q_layernorm.weight,
        attention.k_layernorm.weight, attention.linear_proj.weight, layer.pre_mlp_layernorm.weight,
        layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight, attention.core_attention.key_conv.weight,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    hidden, dout = (torch.randn(T, 48, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden = cp.shard(hidden).requires_grad_()
    out, _ = layer_forward(hidden, run, weights)
    grads = torch.autograd.grad(out, [hidden, *(w for w in weights if w is not None)], cp.shard(dout))
    return cp.unshard(out.detach()), cp.unshard(grads[0]), list(grads[1:])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_per_document"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_several_ranks_equal_one(layout, recompute):
    alone = "contiguous" if layout != "zigzag_per_document" else layout
    ((out, dhidden, dweights),) = run_threads(1, _of_a_rank, alone, recompute)
    parts = run_threads(2, _of_a_rank, layout, recompute)
    for there, grad, _ in parts:
        torch.testing.assert_close((there, grad), (out, dhidden), rtol=0, atol=1e-11)
    summed = [sum(grads) for grads in zip(*(of_weights for *_, of_weights in parts))]
    torch.testing.assert_close(summed, dweights, rtol=0, atol=1e-10)
