"""A model in bfloat16 on a GPU, where kernels serve."""

import pytest
import torch

from moba_cp.hf import MoBACache, use_moba
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
