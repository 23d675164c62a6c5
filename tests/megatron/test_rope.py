"""Rotary angles follow a token's position in its document, in every layout."""

import math
import re

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moba_cp import CPContext
from moba_cp.megatron import AttentionConfig, ContextRotaryEmbedding, with_moba
from moba_cp.model.rope import RopeScaling, rope_frequencies
from tests.helpers.cuda_stub import cuda_on_cpu
from tests.helpers.distributed import run_threads

BOUNDS = torch.tensor([0, 16, 16, 28, 48])


def _local_angles(communicator, layout):
    context = CPContext(communicator, layout=layout, seq_len=48, cu_seqlens=BOUNDS)
    return context.positions, ContextRotaryEmbedding(8)(context.document_positions)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_per_document"])
def test_every_layout_gives_a_token_the_angles_of_its_document_position(layout):
    position = torch.cat([torch.arange(16), torch.arange(12), torch.arange(20)])
    expected = ContextRotaryEmbedding(8)(position)
    seen = []
    for where, angles in run_threads(2, _local_angles, layout):
        assert torch.equal(angles, expected[where])
        seen.append(where)
    assert sorted(torch.cat(seen).tolist()) == list(range(48))


def test_rotation_is_megatrons():
    """The first half of a head turns with the second, by position * base ** (-2i / D)."""
    x = torch.randn(40, 1, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True)
    angles = ContextRotaryEmbedding(8, base=500.0)(torch.arange(40))
    turned = apply_rotary_pos_emb(x, angles, config=config, cp_group=object())
    for position in (0, 1, 39):
        for i in range(4):
            angle = position * 500.0 ** (-2 * i / 8)
            first, second = x[position, 0, 1, i].item(), x[position, 0, 1, i + 4].item()
            expected = complex(first, second) * complex(math.cos(angle), math.sin(angle))
            assert turned[position, 0, 1, i].item() == pytest.approx(expected.real, abs=1e-6)
            assert turned[position, 0, 1, i + 4].item() == pytest.approx(expected.imag, abs=1e-6)


def test_positions_of_millions_keep_their_angles():
    position = 10_000_019
    angles = ContextRotaryEmbedding(64, base=1e6)(torch.tensor([position]))[0, 0, 0].double()
    exact = torch.tensor([math.remainder(position * 1e6 ** (-2 * i / 64), 2 * math.pi) for i in range(32)] * 2).double()
    assert (torch.remainder(angles - exact + math.pi, 2 * math.pi) - math.pi).abs().max() < 1e-5


@pytest.fixture(scope="module")
def _parallel_state():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()


SIZES = dict(num_layers=2, hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=12)


def megatrons_model(core="full", kind="rope", fields=(), **rotary):
    """GPTModel with Megatron's own rotary embedding; its attention is Megatron's ("stock") or ours."""
    config = TransformerConfig(
        **SIZES, **dict(fields), attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True,
        init_method_std=0.3, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm
    )
    if core != "stock":
        spec = with_moba(spec, AttentionConfig(default=core, block_size=16, top_k=2))
    torch.manual_seed(0)
    return GPTModel(config, spec, 61, 128, position_embedding_type=kind, **rotary).double()


TOKENS = torch.randint(61, (1, 50), generator=torch.Generator().manual_seed(0))
TURNS = {
    "plain": {},
    "base": {"rotary_base": 300},
    "part": {"rotary_percent": 0.5},
    "interleaved": {"fields": {"rotary_interleaved": True}},
    "interleaved part": {"fields": {"rotary_interleaved": True}, "rotary_percent": 0.5},
    "llama 3 scaling": {"rope_scaling": True, "rope_scaling_factor": 4.0},
    "interpolated": {"seq_len_interpolation_factor": 3.0},
    "layers without": {"fields": {"no_rope_freq": [0, 1]}},
    "norms of queries and keys": {"fields": {"qk_layernorm": True}},
    "l2 norms": {"fields": {"qk_l2_norm": True}},
    "softmax scale": {"fields": {"softmax_scale": 0.7}},
    "gated": {"fields": {"attention_output_gate": True}},
}


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_assigned_to_a_model_it_gives_the_models_logits(turns, _parallel_state):
    """What Megatron does outside of the core attention is served: logits are those of its own attention."""
    stock, ours = megatrons_model("stock", **turns), megatrons_model("full", **turns)
    ours.load_state_dict(stock.state_dict())
    ours.rotary_pos_emb = ContextRotaryEmbedding(12)
    with cuda_on_cpu():
        model_parallel_cuda_manual_seed(1)
        expected = stock(TOKENS, None, None)
    # Megatron computes its angles in float32.
    assert (ours(TOKENS, None, None) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_scaling_is_that_of_megatron_and_transformers():
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = rope_frequencies(128, 5e5, RopeScaling()).float()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    megatrons = RotaryEmbedding(128, 1.0, rotary_base=5e5, rope_scaling=True, use_cpu_initialization=True, cp_group=1)
    torch.testing.assert_close(ours, megatrons.inv_freq, rtol=1e-6, atol=0)
    assert not torch.equal(ours, rope_frequencies(128, 5e5).float())


@pytest.mark.parametrize(
    "kind, turns, arguments, message",
    [
        ("none", {}, {"dim": 12}, "position_embedding_type='none'"),
        ("learned_absolute", {}, {"dim": 12}, "position_embedding_type='learned_absolute'"),
        ("rope", {"rope_scaling": True}, {"dim": 12, "base": 1e4}, "base=10000.0, scaling=None are not what the model"),
        ("rope", {"seq_len_interpolation_factor": 2.0}, {"dim": 12, "base": 1e4}, "leave both out"),
        ("rope", {"rotary_percent": 0.5}, {"dim": 12, "base": 1e4}, "dim=12 but the model turns 6 of kv_channels=12"),
        ("rope", {}, {"dim": 8}, "dim=8 but the model turns 12 of kv_channels=12; use dim=12"),
    ],
    ids=str,
)
def test_angles_that_are_not_the_models_are_refused(kind, turns, arguments, message, _parallel_state):
    model = megatrons_model(kind=kind, **turns)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.rotary_pos_emb = ContextRotaryEmbedding(**arguments)


def test_another_kind_of_angles_is_refused(_parallel_state):
    model = megatrons_model()
    with cuda_on_cpu():
        model.rotary_pos_emb = MultimodalRotaryEmbedding(12, 1.0)
    with pytest.raises(ValueError, match="rotary_pos_emb is a MultimodalRotaryEmbedding, which is not served"):
        model.rotary_pos_emb = ContextRotaryEmbedding(12)


def test_the_group_is_the_models(_parallel_state):
    """Positions of one rank, in a model that is spread over several, would be silently wrong."""
    model = megatrons_model()
    model.rotary_pos_emb = ContextRotaryEmbedding(12)
    assert model.rotary_pos_emb.group is model.pg_collection.cp
    model.config.context_parallel_size = 2
    with pytest.raises(ValueError, match="group has 1 ranks but the model context_parallel_size=2; leave group out"):
        model.rotary_pos_emb = ContextRotaryEmbedding(12, group=model.pg_collection.cp)


def test_a_base_of_its_own_holds(_parallel_state):
    model = megatrons_model(rotary_base=300)
    model.rotary_pos_emb = ContextRotaryEmbedding(12, base=500)
    assert torch.equal(model.rotary_pos_emb.frequencies, rope_frequencies(12, 500))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"factor": 0.5}, "factor=0.5 is less than 1"),
        ({"low_freq_factor": 4.0}, "high_freq_factor=4.0 is not more than low_freq_factor=4.0"),
        ({"original_max_position_embeddings": -1}, "original_max_position_embeddings=-1 is not a positive number"),
    ],
    ids=str,
)
def test_scaling_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RopeScaling(**fields)
