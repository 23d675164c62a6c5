"""Checkpoints of Hugging Face's models: bit-exact there and back, logits those of transformers."""

import json
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
)

from moba_cp.megatron import (
    AttentionConfig,
    ContextRotaryEmbedding,
    ModelConfig,
    RopeScaling,
    build_model,
    load_hf,
    model_config_of,
    save_hf,
)
from moba_cp.megatron.hf_config import hf_config_of
from moba_cp.megatron.spec import layer_spec
from tests.helpers.distributed import run_ranks

FULL = AttentionConfig(default="full")
SHAPE = dict(
    vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
TOKENS = torch.randint(61, (1, 50), generator=torch.Generator().manual_seed(0))
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_theta=5000.0, head_dim=10)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=12)),
}


@pytest.fixture(scope="module", autouse=True)
def _parallel_state():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()


def checkpoint(kind, path, dtype=torch.float32):
    """A random model of transformers, written to ``path``; its config.json is returned."""
    model_class, config = KINDS[kind]
    torch.manual_seed(1)
    model = model_class(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms are ones and biases zeros at first, which would hide a swap.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return model.eval(), json.loads((path / "config.json").read_text())


def megatron_model(hf, dtype=torch.float32, vocab_size=61, tp=1, **rotary):
    """Megatron's GPTModel of the same shape."""
    config = TransformerConfig(
        num_layers=hf["num_hidden_layers"], hidden_size=hf["hidden_size"], num_query_groups=2,
        num_attention_heads=hf["num_attention_heads"], kv_channels=hf.get("head_dim") or 12,
        ffn_hidden_size=hf["intermediate_size"], normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"], gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        add_qkv_bias=hf["model_type"] == "qwen2", qk_layernorm=hf["model_type"] == "qwen3", attention_dropout=0.0,
        hidden_dropout=0.0, use_cpu_initialization=True, perform_initialization=False, transformer_impl="local",
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, apply_rope_fusion=False, persist_layer_norm=False, tensor_model_parallel_size=tp,
    )  # fmt: skip
    tied = hf["tie_word_embeddings"]
    model = GPTModel(
        config, layer_spec(FULL), vocab_size, 128, position_embedding_type="rope",
        share_embeddings_and_output_weights=tied, **rotary,
    )  # fmt: skip
    rope = hf.get("rope_parameters") or hf
    model.rotary_pos_emb = ContextRotaryEmbedding(config.kv_channels, None if rotary else rope["rope_theta"])
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model.to(dtype)


def assert_same_checkpoint(a, b):
    one, two = ({k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in (a, b))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, tmp_path):
    theirs, hf = checkpoint(kind, tmp_path)
    ours = megatron_model(hf)
    load_hf(ours, tmp_path)
    expected = theirs(TOKENS).logits
    got = ours(TOKENS, None, None)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    if kind.startswith("llama"):
        built = build_model(model_config_of(tmp_path), FULL)
        load_hf(built, tmp_path)
        assert (built(TOKENS) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bit_exact(kind, dtype, tmp_path):
    _, hf = checkpoint(kind, tmp_path / "in", dtype)
    # The vocabulary padded as Megatron does, and files of a few tensors.
    model = megatron_model(hf, dtype, vocab_size=64)
    load_hf(model, tmp_path / "in")
    assert model.embedding.word_embeddings.weight[61:].eq(0).all()
    save_hf(model, tmp_path / "out", hf, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same_checkpoint(tmp_path / "in", tmp_path / "out")
    again, _ = KINDS[kind]
    assert torch.equal(
        again.from_pretrained(tmp_path / "out", dtype=dtype)(TOKENS).logits,
        again.from_pretrained(tmp_path / "in", dtype=dtype)(TOKENS).logits,
    )


def test_bf16_checkpoint_survives_a_float32_model(tmp_path):
    _, hf = checkpoint("llama", tmp_path / "in", torch.bfloat16)
    model = build_model(model_config_of(tmp_path / "in"), FULL)
    load_hf(model, tmp_path / "in")
    save_hf(model, tmp_path / "out", hf, dtype=torch.bfloat16)
    assert_same_checkpoint(tmp_path / "in", tmp_path / "out")


def test_after_fsdp2(tmp_path):
    _, hf = checkpoint("llama", tmp_path / "in")
    model = build_model(model_config_of(tmp_path / "in"), FULL, device="meta")
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh).to_empty(device="cpu")
    load_hf(model, tmp_path / "in")
    save_hf(model, tmp_path / "out", hf)
    assert_same_checkpoint(tmp_path / "in", tmp_path / "out")


def _logits_of_a_part(rank, path, hf):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model = megatron_model(hf, vocab_size=64, tp=2)
    load_hf(model, path)
    try:
        save_hf(model, path / "never", hf)
    except ValueError as error:
        refusal = str(error)
    return model(TOKENS, None, None).detach(), refusal


@pytest.mark.slow
def test_tensor_parallel_ranks_load_their_parts(tmp_path):
    theirs, hf = checkpoint("qwen3", tmp_path)
    (left, refusal), (right, _) = run_ranks(2, _logits_of_a_part, tmp_path, hf)
    expected = theirs(TOKENS).logits
    got = torch.cat([left, right], -1)[..., :61]
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert "tp_size=2: save_hf writes whole models" in refusal


def test_what_does_not_fit_is_refused(tmp_path):
    _, hf = checkpoint("llama", tmp_path)
    refusals = {
        "but the checkpoint's (61, 48)": megatron_model(hf, vocab_size=60),
        "which embedding.word_embeddings.weight of torch.bfloat16 cannot hold": megatron_model(hf, torch.bfloat16),
    }
    for message, model in refusals.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            load_hf(model, tmp_path)
    with pytest.raises(ValueError, match="nowhere' holds no \\*.safetensors"):
        load_hf(megatron_model(hf), tmp_path / "nowhere")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no config.json, which says what the weights are for"):
        load_hf(megatron_model(hf), tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=3 in {} but the model has num_layers=2"),
        # Projections of queries are as wide as the checkpoint's.
        (
            {"num_attention_heads": 2, "head_dim": 20},
            "num_attention_heads=4 in {} but the model has num_attention_heads=2",
        ),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-05 in {} but the model has layernorm_epsilon=1e-06"),
        ({"model_type": "qwen2"}, "the model has add_qkv_bias=True, but model_type='llama' in {} needs False"),
        ({"model_type": "qwen3"}, "the model has qk_layernorm=True, but model_type='llama' in {} needs False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=False in {} but the model has share_embeddings"),
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            "the model's rotary frequencies are not those of rope_theta=5000 in",
        ),
    ],
    ids=str,
)
def test_a_model_that_is_not_the_checkpoints_is_refused(change, message, tmp_path):
    _, hf = checkpoint("llama", tmp_path)
    model = megatron_model({**hf, **change})
    for where, call in (
        (f"{tmp_path}/config.json", lambda: load_hf(model, tmp_path)),
        ("hf_config", lambda: save_hf(model, tmp_path / "never", hf)),
    ):
        with pytest.raises(ValueError, match=re.escape(message.format(where))):
            call()
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rotary_interleaved": True}, "the model has rotary_interleaved=True"),
        ({"normalization": "LayerNorm"}, "the model has normalization='LayerNorm'"),
        ({"activation_func": F.gelu}, "the model has activation_func=gelu, but hidden_act"),
        ({"softmax_scale": 1.0}, "the model has softmax_scale=1.0"),
        ({"no_rope_freq": [0, 0, 1]}, "the model has no_rope_freq=[0, 0, 1], but in"),
        ({"qk_l2_norm": True}, "the model has qk_l2_norm=True"),
        ({"layernorm_zero_centered_gamma": True}, "the model has layernorm_zero_centered_gamma=True"),
    ],
    ids=str,
)
def test_a_model_that_computes_something_else_is_refused(fields, message, tmp_path):
    _, hf = checkpoint("llama", tmp_path)
    model = megatron_model(hf)
    for name, value in fields.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_hf(model, tmp_path)


def test_a_model_without_rotary_embedding_is_refused(tmp_path):
    _, hf = checkpoint("llama", tmp_path)
    model = megatron_model(hf)
    model.rotary_pos_emb, model.position_embedding_type = None, "none"
    with pytest.raises(ValueError, match="the model has position_embedding_type='none', but"):
        load_hf(model, tmp_path)


ONE = {"num_hidden_layers": 1, "vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "head_dim": 12,
       "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
WITHOUT_HEAD_DIM = {name: value for name, value in ONE.items() if name != "head_dim"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
OTHERS = {
    "gemma": (GemmaConfig(**ONE), "model_type='gemma' in {} is not served: use one of llama, mistral, qwen2, qwen3"),
    "gemma 2": (Gemma2Config(**ONE), "model_type='gemma2' in {} is not served"),
    "granite": (GraniteConfig(**WITHOUT_HEAD_DIM), "model_type='granite' in {} is not served"),
    "smollm 3": (SmolLM3Config(**WITHOUT_HEAD_DIM, pad_token_id=0), "model_type='smollm3' in {} is not served"),
    "mistral": (MistralConfig(**ONE, sliding_window=16), "sliding_window=16 in {} is not served"),
    "qwen 2": (Qwen2Config(**WITHOUT_HEAD_DIM, use_sliding_window=True, sliding_window=16, max_window_layers=0),
               "use_sliding_window=True in {} is not served"),
    "dynamic": (LlamaConfig(**ONE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
                "rope_type='dynamic' in {} is not served: use 'default', 'linear', 'llama3' or 'yarn'"),
    "biases": (LlamaConfig(**ONE, attention_bias=True), "attention_bias=True in {} is not served"),
    "gelu": (LlamaConfig(**ONE, hidden_act="gelu"), "hidden_act='gelu' in {} is not served"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_transformers_that_are_not_served_are_refused(name, tmp_path):
    config, message = OTHERS[name]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = build_model(ModelConfig(61, 1, 48, 4, 2, 12, 40), FULL)
    for call in (lambda: model_config_of(tmp_path), lambda: load_hf(model, tmp_path)):
        with pytest.raises(ValueError, match=re.escape(message.format(f"{tmp_path}/config.json"))) as refusal:
            call()
        assert "\n" not in str(refusal.value)


SCALED = {
    "llama 3.1": LlamaConfig(**ONE, rms_norm_eps=1e-5, initializer_range=0.3, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**ONE, sliding_window=None, initializer_range=0.3),
    "linear": LlamaConfig(**ONE, initializer_range=0.3,
                          rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "yarn": Qwen3Config(**ONE, initializer_range=0.3, rope_parameters={"rope_type": "yarn", "factor": 8.0,
                        "rope_theta": 1e4, "original_max_position_embeddings": 32}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_logits_with_scaled_angles(name, tmp_path):
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(SCALED[name]).eval()
    theirs.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    expected = theirs(TOKENS).logits
    ours = build_model(model_config_of(tmp_path), FULL)
    load_hf(ours, tmp_path)
    got = ours(TOKENS)
    if name == "linear":
        megatrons = megatron_model(hf, seq_len_interpolation_factor=4.0)
        load_hf(megatrons, tmp_path)
        assert (megatrons(TOKENS, None, None) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    plain = build_model(ModelConfig(61, 1, 48, 4, 2, 12, 40, norm_eps=hf["rms_norm_eps"], qk_norm=name == "yarn"), FULL)
    if name == "mistral":
        load_hf(plain, tmp_path)
    else:
        with pytest.raises(
            ValueError, match="frequencies are not those of rope_theta=10000 and|softmax_scale=None, but"
        ):
            load_hf(plain, tmp_path)


def test_tied_embeddings_are_the_embedding_whatever_the_file_holds(tmp_path):
    """A left-over lm_head.weight is nothing to a model of transformers whose embeddings are tied."""
    theirs, hf = checkpoint("llama tied", tmp_path)
    expected = theirs(TOKENS).logits
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(61, 48)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for tied in (False, True):
        model = megatron_model({**hf, "tie_word_embeddings": tied})
        load_hf(model, tmp_path)
        assert (model(TOKENS, None, None) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_output_layer_that_is_missing_is_refused(tmp_path):
    _, hf = checkpoint("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint has no lm_head.weight, which output_layer.weight needs"):
        load_hf(megatron_model(hf), tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "truncate=False in {}"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' in {}"),
        ({"attention_bias": True}, "attention_bias=True in {}"),
        ({"sliding_window": 4096}, "sliding_window=4096 in {}"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=['sliding_attention'] in {}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 in {}"),
        ({"residual_multiplier": 0.2}, "residual_multiplier=0.2 in {}"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 in {}"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config={{'quant_method': 'fp8'}} in {}"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "{} has no factor, which rope_type='llama3'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, "rope_parameters": None}, "rope_type='dynamic' in {}"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section=[1, 2] in {}"),
    ],
    ids=str,
)
def test_configs_that_are_not_served_are_refused(change, message, tmp_path):
    config = {**KINDS["llama"][1].to_dict(), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(message.format(f"{tmp_path}/config.json"))):
        model_config_of(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [("{", "config.json is no JSON"), ("[]", "config.json holds a list"),
     ('{"model_type": "llama"}', "config.json has no vocab_size")],
)  # fmt: skip
def test_a_broken_config_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        model_config_of(tmp_path)


def test_config_of_older_checkpoints(tmp_path):
    config = {k: v for k, v in KINDS["llama"][1].to_dict().items() if k != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 123.0}))
    model = model_config_of(tmp_path, recompute="full")
    assert (model.rope_base, model.head_dim, model.n_kv_heads, model.recompute) == (123.0, 10, 2, "full")


def test_inverse_frequencies_of_old_checkpoints_are_left_out(tmp_path):
    _, hf = checkpoint("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_hf(build_model(model_config_of(tmp_path), FULL), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_our_model_is_that_of_transformers_and_back(kind, tmp_path):
    """Through ModelConfig and a config.json of our own; with gradients, by the layer's own schedule and Megatron's."""
    theirs, hf = checkpoint(kind, tmp_path / "in")
    model = model_config_of(tmp_path / "in")
    ours = build_model(model, FULL)
    load_hf(ours, tmp_path / "in")
    expected = theirs(TOKENS).logits
    assert (ours(TOKENS) - expected).abs().max() < 1e-5 * expected.abs().max()
    # An adapter's hook makes Megatron's own forward run.
    for layer in ours.decoder.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: None)
    assert (ours(TOKENS) - expected).abs().max() < 1e-5 * expected.abs().max()
    save_hf(ours, tmp_path / "out", hf_config_of(model, 128, eos_token_id=3))
    assert_same_checkpoint(tmp_path / "in", tmp_path / "out")
    assert model_config_of(tmp_path / "out") == model
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.eos_token_id == 3 and torch.equal(again(TOKENS).logits, expected)


@pytest.mark.parametrize("name", ["llama3", "linear", "yarn"])
def test_scaling_survives_our_config(name, tmp_path):
    model = ModelConfig(61, 1, 48, 4, 2, rope_scaling=RopeScaling(4.0, original_max_position_embeddings=32, kind=name))
    ours = build_model(model, FULL)
    save_hf(ours, tmp_path, hf_config_of(model, 128))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = theirs(TOKENS).logits
    assert (ours(TOKENS) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert model_config_of(tmp_path).rope_scaling.score_factor == pytest.approx(model.rope_scaling.score_factor)


def test_parts_that_no_model_has_together_are_refused():
    with pytest.raises(ValueError, match="neither Qwen2 nor Qwen3 has both"):
        hf_config_of(ModelConfig(qk_norm=True, qkv_bias=True), 128)
    with pytest.raises(ValueError, match="Qwen2, whose biases it has, knows hidden_size / n_heads = 64 alone"):
        hf_config_of(ModelConfig(qkv_bias=True, head_dim=32), 128)


def test_a_model_on_the_meta_device_is_written_from_elsewhere(tmp_path):
    """Weights are read a file at a time: no more than that is ever held."""
    model = ModelConfig(61, 2, 48, 4, 2)
    source, held = build_model(model, FULL), []
    state = dict(source.named_parameters())

    def read(wanted):
        held.append(sum(x.numel() for x in wanted.values()))
        return {name: state[name] for name in wanted}

    hf = hf_config_of(model, 128)
    files = {"generation_config.json": "{}"}
    save_hf(build_model(model, FULL, device="meta"), tmp_path / "a", hf, shard_bytes=50_000, read=read, files=files)
    save_hf(source, tmp_path / "b", hf)
    assert_same_checkpoint(tmp_path / "a", tmp_path / "b")
    assert len(held) > 3 and (tmp_path / "a" / "generation_config.json").read_text() == "{}"


def test_biases_begin_at_zero():
    model = build_model(ModelConfig(61, 1, 48, 4, 2, qkv_bias=True), FULL)
    bias = model.decoder.layers[0].self_attention.linear_qkv.bias
    assert not bias.any() and model.decoder.final_layernorm.weight.eq(1).all()
