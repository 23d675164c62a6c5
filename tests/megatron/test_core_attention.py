"""The core attention in Megatron's own models, and what it refuses."""

import copy
import dataclasses
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import CPContext, reference
from moba_cp.megatron import (
    AttentionConfig,
    ContextRotaryEmbedding,
    MoBACoreAttention,
    MoBAPackedSeqParams,
    ModelConfig,
    build_model,
    core_attention,
    core_attention_spec,
    with_moba,
)
from moba_cp.megatron.parallel import process_groups

MODEL = ModelConfig(vocab_size=61, n_layers=3, hidden_size=48, n_heads=4, n_kv_heads=2, init_std=0.2)
SPARSE = AttentionConfig(block_size=16, top_k=2, full_layers=[2])


@pytest.fixture(scope="module", autouse=True)
def _parallel_state():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()


def stock_model(ours):
    """Megatron's GPTModel with MoBA in its layer spec and the weights of ours."""
    config, vocab_size = ours.config, ours.vocab_size
    spec = with_moba(get_gpt_layer_local_spec(normalization="RMSNorm"), SPARSE)
    model = GPTModel(config, spec, vocab_size, max_sequence_length=128, position_embedding_type="rope")
    # Megatron's own needs CUDA, and knows no layout but zigzag.
    model.rotary_pos_emb = ContextRotaryEmbedding(config.kv_channels)
    model.double().load_state_dict(ours.state_dict())
    return model


TOKENS = torch.randint(MODEL.vocab_size, (1, 100), generator=torch.Generator().manual_seed(0))


def stock_logits(model, params=None):
    """[1, 100, V]; not the loss, which Megatron computes in float32."""
    return model(TOKENS, position_ids=None, attention_mask=None, packed_seq_params=params)


def test_megatrons_model_takes_the_spec():
    ours = build_model(MODEL, SPARSE, dtype=torch.float64)
    stock = stock_model(ours)
    assert [layer.self_attention.core_attention.kind for layer in stock.decoder.layers] == ["moba", "full", "moba"]
    torch.testing.assert_close(stock_logits(stock), ours(TOKENS), rtol=0, atol=1e-10)
    context = CPContext(None, layout="contiguous", seq_len=100, cu_seqlens=torch.tensor([0, 30, 100]))
    packed = stock_logits(stock, MoBAPackedSeqParams(context))
    torch.testing.assert_close(packed, ours(TOKENS, context=context), rtol=0, atol=1e-10)
    assert (packed - ours(TOKENS)).abs().max() > 1e-3


def test_packed_sequences_of_megatron():
    ours = build_model(MODEL, SPARSE, dtype=torch.float64)
    bounds = torch.tensor([0, 37, 40, 100], dtype=torch.int32)
    params = PackedSeqParams("thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=60, max_seqlen_kv=60)
    packed = stock_logits(stock_model(ours), params)
    alone = [ours(TOKENS[:, a:b]) for a, b in ((0, 37), (37, 40), (40, 100))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-10)


def test_padding_of_documents_is_seen_by_no_token():
    ours = build_model(MODEL, SPARSE, dtype=torch.float64)
    real, padded = torch.tensor([0, 33, 70]), torch.tensor([0, 52, 100])
    params = PackedSeqParams(
        "thd", real, real, cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded, max_seqlen_q=52, max_seqlen_kv=52
    )
    packed = stock_logits(stock_model(ours), params)
    for start, length in ((0, 33), (52, 37)):
        rows = slice(start, start + length)
        torch.testing.assert_close(packed[:, rows], ours(TOKENS[:, rows]), rtol=0, atol=1e-10)


def test_spec_is_a_copy():
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    before = spec.submodules.self_attention.submodules.core_attention
    changed = with_moba(spec, SPARSE)
    assert spec.submodules.self_attention.submodules.core_attention is before
    assert changed.submodules.self_attention.submodules.core_attention == core_attention_spec(SPARSE)
    assert repr(changed.submodules.mlp) == repr(spec.submodules.mlp)


def core(attention=SPARSE, layer_number=1, fields=(), **changes):
    config = copy.copy(build_model(MODEL, SPARSE).config)
    for name, value in dict(fields).items():
        setattr(config, name, value)
    arguments = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "pg_collection": process_groups(None)}
    return MoBACoreAttention(config, layer_number, attention=attention, **{**arguments, **changes})


@pytest.mark.parametrize("scale", [None, 0.7])
def test_softmax_scale_is_passed_on(scale):
    q, k, v = (torch.randn(50, 1, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    for layer_number, expected in (
        (1, reference.moba_attention(q[:, 0], k[:, 0], v[:, 0], 16, 2, softmax_scale=scale)),
        (2, reference.full_attention(q[:, 0], k[:, 0], v[:, 0], softmax_scale=scale)),
    ):
        out = core(layer_number=layer_number, softmax_scale=scale)(q, k, v, None)
        torch.testing.assert_close(out[:, 0], expected.flatten(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: MoBA has no dropout on its scores; set it to 0"),
        ({"fields": {"attention_dropout": 0.2}}, "attention_dropout=0.2: MoBA has no dropout"),
        ({"attn_mask_type": AttnMaskType.no_mask}, "attn_mask_type='no_mask': MoBA is causal"),
        ({"attn_mask_type": AttnMaskType.padding}, "attn_mask_type='padding': MoBA is causal"),
        ({"attention_type": "cross"}, "attention_type='cross': MoBA selects among a sequence's own blocks"),
        ({"cp_comm_type": "a2a"}, "cp_comm_type='a2a': the exchange is MoBA's own; leave it at 'p2p'"),
        ({"fields": {"num_query_groups": 3}}, "num_query_groups=3: it must divide num_attention_heads=4"),
        ({"fields": {"window_size": (128, 0)}}, "window_size=(128, 0): MoBA attends to selected blocks"),
        ({"fields": {"softmax_type": "learnable"}}, "softmax_type='learnable': attention sinks"),
        ({"fields": {"apply_query_key_layer_scaling": True}}, "apply_query_key_layer_scaling=True: scores are"),
        ({"fields": {"multi_latent_attention": True}}, "multi_latent_attention=True: values narrower than keys"),
        ({"fields": {"qk_clip": True}}, "qk_clip=True: the largest score of a head is not recorded; set it to False"),
        ({"fields": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping=50.0: scores are not capped"),
        ({"fields": {"use_kitchen_attention": True}}, "use_kitchen_attention=True: the kernels are MoBA's own"),
        ({"fields": {"flash_attention_version": 3}}, "flash_attention_version=3: the kernels are MoBA's own"),
        ({"fields": {"batch_invariant_mode": True}}, "batch_invariant_mode=True: the kernels' shapes"),
        ({"fields": {"flash_decode": True}}, "flash_decode=True: decoding with a key/value cache"),
        ({"fields": {"experimental_attention_variant": "dsa"}}, "experimental_attention_variant='dsa': the attention"),
        ({"fields": {"linear_attention_freq": 2}}, "linear_attention_freq=2: layers of linear attention"),
        ({"fields": {"hybrid_context_parallel": True}}, "hybrid_context_parallel=True: the context-parallel group"),
        ({"fields": {"context_parallel_size": 2}}, "context_parallel_size=2 but the context-parallel group has 1"),
        ({"attention": AttentionConfig(full_layers="last 9")}, "full_layers='last 9' asks for 9 of 3 layers"),
    ],
    ids=lambda x: str(x)[:50],
)
def test_what_moba_has_not_is_refused_at_build(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        core(**changes)


# What a configuration of Megatron-core (0.16 to 0.19) says of attention and is none of the core attention's business:
# Megatron does it around it, or it says where, in which order and with which kernels other modules run.
AROUND = """
add_qkv_bias qk_layernorm qk_l2_norm attention_output_gate no_rope_freq rotary_interleaved mrope_section
apply_rope_fusion fused_single_qkv_rope masked_softmax_fusion attention_softmax_in_fp32 hidden_dropout use_kitchen
bias_dropout_fusion window_attn_skip_freq qk_clip_alpha qk_clip_threshold kitchen_attention_backend
cuda_graph_retain_backward_graph cuda_graph_scope cuda_graph_modules cuda_graph_use_single_mempool
cuda_graph_warmup_steps inference_cuda_graph_scope moe_pad_experts_for_cuda_graph_inference
delay_offload_until_cuda_graph ep_overlap_early_attn_memory_release tp_comm_overlap_disable_qkv
experimental_attention_variant_loss_scale_func linear_key_head_dim linear_num_key_heads linear_num_value_heads
linear_value_head_dim max_seqlen_per_dp_cp_rank moe_router_pre_softmax mtp_detach_heads mamba_head_dim mamba_num_heads
mup_base_head_dim mup_attn_scale_power
""".split()
SERVED = {
    "num_attention_heads", "num_query_groups", "kv_channels", "attention_dropout", "softmax_scale", "cp_comm_type",
    "context_parallel_size", "attention_backend", "multi_latent_attention", "deterministic_mode",
}  # fmt: skip
ABOUT = """attn attention softmax softcap sink window qk rope rotary head context_parallel cp_ cuda_graph determin
latent_att batch_inv kitchen dropout decode""".split()


def test_each_field_about_attention_is_served_refused_or_none_of_its_business():
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    about = {name for name in fields if any(word in name for word in ABOUT)}
    about = {name for name in about if not name.startswith("dsa_")}  # of an attention variant, which is refused
    assert len(about) > 40
    assert about - SERVED - set(AROUND) - set(core_attention._REFUSED) == set()


@pytest.mark.parametrize("name, refused", core_attention._REFUSED.items())
def test_what_is_refused_is_let_through_where_it_asks_for_nothing(name, refused):
    assert core(fields={name: refused[0]}).kind == "moba"


def test_deterministic_mode_of_megatron_is_served():
    assert core(fields={"deterministic_mode": True}).moba.deterministic
    assert not core().moba.deterministic
    assert core(attention=replace(SPARSE, deterministic=True)).moba.deterministic


def test_refusals_pass_through_megatrons_builder():
    config = copy.copy(build_model(MODEL, SPARSE).config)
    config.attention_dropout = 0.1
    spec = with_moba(get_gpt_layer_local_spec(normalization="RMSNorm"), SPARSE)
    with pytest.raises(ValueError, match="attention_dropout=0.1: MoBA has no dropout"):
        GPTModel(config, spec, 61, max_sequence_length=128)


BOUNDS = torch.tensor([0, 32], dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_mask": torch.ones(1, 1, 32, 32)}, "attention_mask has shape (1, 1, 32, 32), but"),
        ({"attention_bias": torch.ones(32, 32)}, "attention_bias is not None; MoBA adds no bias"),
        ({"attn_mask_type": AttnMaskType.arbitrary}, "attn_mask_type=arbitrary is not served"),
        ({"packed_seq_params": PackedSeqParams("bshd")}, "packed_seq_params.qkv_format='bshd' is not served"),
        ({"packed_seq_params": PackedSeqParams("thd")}, "packed_seq_params.cu_seqlens_q=None"),
        ({"packed_seq_params": PackedSeqParams("thd", BOUNDS, local_cp_size=1)}, "local_cp_size=1"),
        ({"packed_seq_params": PackedSeqParams("thd", BOUNDS // 2)}, "must start at 0, never"),
        ({"packed_seq_params": PackedSeqParams("thd", BOUNDS, torch.tensor([0, 1, 32]))}, "cu_seqlens_kv differs"),
        ({"packed_seq_params": PackedSeqParams("thd", BOUNDS, BOUNDS // 2)}, "cu_seqlens_kv differs"),
        ({"query": torch.zeros(1, 1, 4, 12)}, "1 queries but 32 keys: decoding with a key/value cache"),
    ],
    ids=lambda x: str(x)[:50].split("\n")[0],
)
def test_calls_that_moba_cannot_serve_are_refused(changes, message):
    q, k, v = (torch.zeros(32, 1, h, 12) for h in (4, 2, 2))
    call = {"query": q, "key": k, "value": v, "attention_mask": None, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        core()(**call)


def test_a_batch_needs_a_context():
    with pytest.raises(ValueError, match="context=None is not a CPContext"):
        MoBAPackedSeqParams(None)
