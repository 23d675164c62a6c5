"""Models whose keys are convolved: tokens one by one and prompts in pieces, against the trainer's pass over all."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from moba_cp.hf import MoBACache, decoding_graph, use_moba
from moba_cp.hf import graph as graphs
from moba_cp.hf.answer import answer
from moba_cp.hf.key_conv import add_key_conv
from moba_cp.megatron import AttentionConfig, ModelConfig, build_model
from moba_cp.megatron.hf import hf_tensors, save_hf
from moba_cp.megatron.hf_config import hf_config_of
from moba_cp.model.attention import KEY_CONV_WEIGHT
from tests.helpers.hf_models import VOCABULARY, close, tokens

MODEL = ModelConfig(VOCABULARY, n_layers=3, hidden_size=48, n_heads=4, n_kv_heads=2, head_dim=12, init_std=0.2,
                    qk_norm=True)  # fmt: skip
HF = hf_config_of(MODEL, 512, "float64")


@pytest.fixture(scope="module", params=[3, 5])
def models(request):
    """The trainer's model, and transformers' with its weights; the second of three layers is full."""
    trained = build_model(MODEL, AttentionConfig(block_size=16, top_k=2, full_layers=[2], key_conv=request.param),
                          dtype=torch.float64).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, x in trained.named_parameters():
            if name.endswith(KEY_CONV_WEIGHT):
                x.normal_(0.0, 0.5, generator=generator)
    ours = AutoModelForCausalLM.from_config(AutoConfig.for_model(**HF), dtype=torch.float64).eval()
    add_key_conv(ours, request.param)
    missing, unexpected = ours.load_state_dict(dict(hf_tensors(trained, VOCABULARY)), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return trained, use_moba(ours, 16, 2, [2])


@pytest.mark.parametrize("graph", [False, True], ids=["host", "steps"])
@pytest.mark.parametrize("sizes", [[1], [2], [7], [40], [1, 1, 3, 12, 30], [4, 5, 6, 20]], ids=str)
@torch.no_grad()
def test_pieces_and_tokens_are_the_whole(models, sizes, graph, monkeypatch):
    """Every step twice: it may run more than once, as before a CUDA graph is made."""
    trained, ours = models
    run = graphs._Decoder._run
    monkeypatch.setattr(graphs._Decoder, "_run", lambda self: (run(self), run(self))[1])
    ids, outs, at = tokens(2, 54), [], 0
    cache = MoBACache(ours, capacity=54 if graph else 0)
    with decoding_graph(ours, cache) if graph else nullcontext():
        for size in [*sizes, *[1] * (54 - sum(sizes))]:
            outs.append(ours(ids[:, at : at + size], past_key_values=cache).logits)
            at += size
    close(torch.cat(outs, 1), trained(ids))


@torch.no_grad()
def test_answers_are_those_of_whole_passes(models):
    trained, ours = models
    for n in (1, 2, 33):
        ids = tokens(1, n)
        for _ in range(10):
            ids = torch.cat([ids, trained(ids)[:, -1:].argmax(-1)], 1)
        for piece, graph in ((64, False), (64, True), (3, True)):
            assert torch.equal(answer(ours, ids[0, :n], 10, piece, cuda_graph=graph), ids[0, n:])


@torch.no_grad()
def test_a_cache_that_is_reordered_and_reset(models):
    trained, ours = models
    ids, cache = tokens(2, 40), MoBACache(ours)
    ours(ids[:, :30], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    order = torch.tensor([1, 1, 0, 0])
    close(ours(ids[order, 30:], past_key_values=cache).logits, trained(ids)[order, 30:])
    cache.reset()
    close(ours(ids, past_key_values=cache).logits, trained(ids))


@torch.no_grad()
def test_what_is_not_done_is_refused(models, tmp_path):
    trained, ours = models
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    cases = [{"use_cache": False}, {"past_key_values": DynamicCache(config=ours.config)},
             {"past_key_values": MoBACache(ours.config)},
             {"past_key_values": MoBACache(ours), "attention_mask": mask}]  # fmt: skip
    for how in cases:
        with pytest.raises(ValueError, match="keys are convolved, .*pass past_key_values=MoBACache"):
            ours(ids, **how)
    cache = MoBACache(ours)
    ours(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="crop to 15 of 20 tokens: the model's keys are convolved"):
        cache.crop(-5)
    with pytest.raises(ValueError, match="convolutions over keys .*build the model without them"):
        save_hf(trained, tmp_path / "x", HF)
    assert not (tmp_path / "x").exists()
