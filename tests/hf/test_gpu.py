"""A model in bfloat16 on a GPU, where kernels serve."""

from contextlib import nullcontext

import pytest
import torch

from moba_cp.hf import MoBACache, decoding_graph, use_moba
from moba_cp.hf.answer import answer
from tests.helpers.hf_models import tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _model(**options):
    wide = dict(hidden_size=256, intermediate_size=256, head_dim=64, initializer_range=0.06)
    return tiny(**(wide | {"max_position_embeddings": 4096} | options)).cuda().bfloat16()


def _error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def test_with_all_blocks_it_is_as_good_as_sdpa():
    model, ids = _model(), tokens(2, 1000).cuda()
    mask = torch.ones_like(ids)
    mask[0, :300] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    def run(model):
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits[mask.bool()].float(), ids[mask.bool()])
        model.zero_grad()
        loss.backward()
        return logits[mask.bool()].detach(), [x.grad.clone() for x in model.parameters()]

    sdpa = run(model)
    exact = run(_model().double())
    ours = run(use_moba(model, 128, 8))
    assert _error(ours[0], exact[0]) <= 2 * _error(sdpa[0], exact[0]) + 1e-5
    for x, y, z in zip(ours[1], sdpa[1], exact[1], strict=True):
        assert _error(x, z) <= 3 * _error(y, z) + 1e-2


@torch.no_grad()
def test_pieces_and_tokens_are_the_whole():
    model, ids = use_moba(_model(), 64, 3, "last 1"), tokens(2, 1500).cuda()
    whole = model(ids, use_cache=False).logits.double()
    cache, at = MoBACache(model), 0
    for piece in (1000, 400, *[1] * 80, 20):
        logits = model(ids[:, at : at + piece], past_key_values=cache).logits.double()
        expected = whole[:, at : at + piece]
        at += piece
        # Rounded keys, and with them selections, are those of matrix products of another shape.
        differs = (logits - expected).abs().amax(-1) / expected.abs().max() > 0.1
        assert differs.float().mean() <= 0.1, f"{piece} tokens"
    assert at == ids.shape[1]


def test_generate():
    model, ids = use_moba(_model(), 64, 3), tokens(2, 700).cuda()
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    how = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, attention_mask=mask)
    answer = model.generate(ids, past_key_values=MoBACache(model, 720), prefill_chunk_size=256, **how)
    assert answer.shape == (2, 720) and (answer < 61).all()


@torch.no_grad()
@pytest.mark.parametrize("decoding", ["moba", "full"])
def test_a_graph_of_a_token_computes_what_its_pass_does(decoding, recwarn):
    """Over a border of blocks, with logits of the same passes launched one by one."""
    model = use_moba(_model(), 64, 3, "last 1", decoding=decoding)
    ids, logits = tokens(1, 1100).cuda(), []
    for graph in (False, True):
        cache = MoBACache(model, capacity=1100)
        with decoding_graph(model, cache) if graph else nullcontext():
            model(ids[:, :1000], past_key_values=cache)
            outs = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(1000, 1100)]
        logits.append(torch.cat(outs, 1).double())
    assert not [w for w in recwarn if "without a CUDA graph" in str(w.message)]
    differs = (logits[0] - logits[1]).abs().amax(-1) / logits[0].abs().max() > 0.02
    # Full attention sums in another order, and rounds where the other does not.
    assert differs.float().mean() <= (0.0 if decoding == "moba" else 0.05), differs.nonzero()


def test_answers_by_a_graph(recwarn):
    model, prompt = use_moba(_model(), 64, 3), tokens(1, 700)[0].cuda()
    plain, by_graph = (answer(model, prompt, 150, 300, cuda_graph=graph) for graph in (False, True))
    assert not [w for w in recwarn if "without a CUDA graph" in str(w.message)]
    same = (plain[: len(by_graph)] == by_graph[: len(plain)]).int().cumprod(0).sum()
    assert same == len(plain) == len(by_graph), f"{same} of {len(plain)} tokens are the same"
