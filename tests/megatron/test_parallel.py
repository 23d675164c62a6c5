"""The model on two gloo ranks against one: context parallelism, and FSDP2 over it.

Spawned ranks import megatron-core, which takes seconds, so that all cases share one pair of them.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from moba_cp import CPContext
from moba_cp.megatron import AttentionConfig, ContextRotaryEmbedding, ModelConfig, build_model, with_moba
from tests.helpers.distributed import run_ranks

T = 192
MODEL = ModelConfig(vocab_size=61, n_layers=3, hidden_size=48, n_heads=4, n_kv_heads=2, init_std=0.2)
SPARSE = AttentionConfig(block_size=16, top_k=3, full_layers="last 1")
PACKED = (0, 52, 52, 56, 96, T)

CASES = {
    "zigzag": ("zigzag", None, MODEL),
    "contiguous": ("contiguous", None, MODEL),
    "zigzag packed": ("zigzag", PACKED, MODEL),
    "contiguous packed": ("contiguous", PACKED, MODEL),
    "zigzag per document": ("zigzag_per_document", PACKED, MODEL),
    "recompute": ("zigzag", PACKED, replace(MODEL, recompute="full")),
    "tied": ("zigzag", None, replace(MODEL, tie_embeddings=True)),
    "two sequences": ("zigzag", None, MODEL),
}


def inputs(case):
    shape = (2, T) if case == "two sequences" else (T,)
    tokens = torch.randint(MODEL.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, -1)
    labels[..., 5:30] = -100
    return tokens, labels, torch.linspace(0.5, 1.5, tokens.numel(), dtype=torch.float64).view(shape)


def context_of(case, group):
    layout, bounds, _ = CASES[case]
    bounds = None if bounds is None else torch.tensor(bounds)
    return CPContext(group, layout=layout if group else "contiguous", seq_len=T, cu_seqlens=bounds)


def loss_and_grads(case, group):
    """Loss of the whole sequence, and the gradients summed over the ranks."""
    model = build_model(CASES[case][2], SPARSE, cp_group=group, dtype=torch.float64)
    context = context_of(case, group)
    tokens, labels, weight = (context.shard(x, dim=-1) for x in inputs(case))
    loss = model(tokens, labels, context)
    (loss * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    if group is not None:
        for grad in grads.values():
            dist.all_reduce(grad, group=group)
    return context.unshard(loss, dim=-1), grads


def sharded(model, mesh, policy=MixedPrecisionPolicy()):
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def fsdp_loss_and_grads(mesh, device):
    """FSDP2 over the ranks that share the sequence; gradients whole again."""
    case = "zigzag packed"
    context = context_of(case, dist.group.WORLD)
    model = build_model(replace(MODEL, recompute="full"), SPARSE, dist.group.WORLD, torch.float64, device)
    model = sharded(model, mesh)
    if device == "meta":
        model.to_empty(device="cpu")
        model.init_weights()
    tokens, labels, weight = (context.shard(x, dim=-1) for x in inputs(case))
    loss = model(tokens, labels, context)
    # FSDP2 averages gradients over the ranks.
    ((loss * weight).sum() * dist.get_world_size()).backward()
    return context.unshard(loss), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def mixed_precision_losses(mesh):
    """float32 parameters with FSDP2's bf16 policy, and a bf16 model; each rank has the whole sequence."""
    tokens, labels, _ = inputs("zigzag")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mixed = sharded(build_model(MODEL, SPARSE), mesh, policy)
    loss = mixed(tokens, labels)
    loss.mean().backward()
    assert {p.grad.dtype for p in mixed.parameters()} == {torch.float32}
    return loss.detach(), build_model(MODEL, SPARSE, dtype=torch.bfloat16)(tokens, labels).detach()


def default_layout_loss():
    """A batch without a context lies in the layout of the attention configuration."""
    context = context_of("contiguous", dist.group.WORLD)
    model = build_model(MODEL, replace(SPARSE, layout="contiguous"), dist.group.WORLD, torch.float64)
    tokens, labels, _ = (context.shard(x) for x in inputs("contiguous"))
    return context.unshard(model(tokens, labels))


def foreign_group_error():
    model = build_model(MODEL, SPARSE, cp_group=None)
    tokens, labels, _ = inputs("zigzag")
    context = context_of("zigzag", dist.group.WORLD)
    try:
        model(context.shard(tokens), context.shard(labels), context)
    except ValueError as error:
        return str(error)


def stock_logits_and_grads(layout):
    """Megatron's GPTModel on its own batches: zigzag, or packed (thd) and zigzag per document."""
    ours = build_model(MODEL, SPARSE, dist.group.WORLD, torch.float64)
    spec = with_moba(get_gpt_layer_local_spec(normalization="RMSNorm"), SPARSE)
    model = GPTModel(ours.config, spec, MODEL.vocab_size, max_sequence_length=T, position_embedding_type="rope")
    model.rotary_pos_emb = ContextRotaryEmbedding(ours.config.kv_channels, group=dist.group.WORLD)
    model.double().load_state_dict(ours.state_dict())
    bounds = torch.tensor(PACKED, dtype=torch.int32)
    params = None if layout == "zigzag" else PackedSeqParams("thd", bounds, bounds, max_seqlen_q=96, max_seqlen_kv=96)
    context = CPContext(dist.group.WORLD, layout, seq_len=T, cu_seqlens=None if layout == "zigzag" else bounds)
    tokens, _, weight = (context.shard(x)[None] for x in inputs(layout))
    logits = model(tokens, None, None, packed_seq_params=params)
    (logits * weight[..., None] * logits.detach()).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    return context.unshard(logits[0]), grads


def two_ranks(rank):
    mesh = init_device_mesh("cpu", (2,))
    results = {case: loss_and_grads(case, dist.group.WORLD) for case in CASES}
    results["fsdp"] = fsdp_loss_and_grads(mesh, "cpu")
    results["fsdp from meta"] = fsdp_loss_and_grads(mesh, "meta")
    results["mixed precision"] = mixed_precision_losses(mesh)
    results["default layout"] = default_layout_loss()
    results["foreign group"] = foreign_group_error()
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    for layout in ("zigzag", "zigzag_per_document"):
        results["stock " + layout] = stock_logits_and_grads(layout)
    parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, two_ranks)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(ranks, case):
    expected = loss_and_grads(case, None)
    for results in ranks:
        torch.testing.assert_close(results[case], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("how", ["fsdp", "fsdp from meta"])
def test_fsdp2_equals_one_rank(ranks, how):
    expected = loss_and_grads("zigzag packed", None)
    for results in ranks:
        torch.testing.assert_close(results[how], expected, rtol=0, atol=1e-10)


def test_mixed_precision_keeps_rotary_angles(ranks):
    """FSDP2 casts floating point arguments of a layer; angles rounded to bf16 would move every token."""
    for results in ranks:
        mixed, low = results["mixed precision"]
        assert torch.equal(mixed, low)


def test_default_layout_is_the_configurations(ranks):
    expected, _ = loss_and_grads("contiguous", None)
    for results in ranks:
        torch.testing.assert_close(results["default layout"], expected, rtol=0, atol=1e-10)


def test_a_context_of_another_group_is_refused(ranks):
    for results in ranks:
        assert "context is for 2 ranks but the layer's context-parallel group has 1" in results["foreign group"]


@pytest.mark.parametrize("layout", ["zigzag", "zigzag_per_document"])
def test_megatrons_model_on_its_own_batches_equals_one_rank(ranks, layout):
    model = build_model(MODEL, SPARSE, dtype=torch.float64)
    tokens, _, weight = inputs(layout)
    logits = model(tokens, context=context_of("zigzag packed" if layout != "zigzag" else "zigzag", None))
    (logits * weight[..., None] * logits.detach()).sum().backward()
    expected = logits.detach(), {name: p.grad for name, p in model.named_parameters()}
    for results in ranks:
        torch.testing.assert_close(results["stock " + layout], expected, rtol=0, atol=1e-9)
