"""Caches and generation: pieces of a prompt and single tokens against the whole."""

import pytest
import torch
from transformers import DynamicCache

from moba_cp import MoBAConfig
from moba_cp.hf import MoBACache, use_moba
from tests.helpers.hf_models import FAMILIES, both, close, tiny, tokens


def _in_pieces(model, ids, sizes, cache, mask=None):
    outs, at = [], 0
    for size in sizes:
        piece, at = ids[:, at : at + size], at + size
        how = {} if mask is None else {"attention_mask": mask[:, :at]}
        outs.append(model(piece, past_key_values=cache, **how).logits)
    assert cache.get_seq_length() == at == ids.shape[1]
    return torch.cat(outs, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["moba", "dynamic"])
@torch.no_grad()
def test_pieces_and_tokens_are_the_whole(family, kind):
    ours, plain = both(family)
    ids = tokens(2, 90)
    whole = plain(ids).logits
    for sizes in ([40, 40, 10], [70, *[1] * 20]):
        cache = MoBACache(ours) if kind == "moba" else DynamicCache(config=ours.config)
        close(_in_pieces(ours, ids, sizes, cache), whole)


@torch.no_grad()
def test_other_gates_in_pieces_and_tokens():
    for gate in ({"shared_by_group": "max", "score": "max", "sink": True}, {"shared_by_group": "sum", "min_recent": 1}):
        ours, plain = both("qwen3", **gate)
        ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
        mask[1, :20] = 0
        logits = _in_pieces(ours, ids * mask, [40, 40, *[1] * 10], MoBACache(ours), mask)
        for row, keep in enumerate(mask.bool()):
            close(logits[row, keep], plain(ids[row, keep][None]).logits[0])


@pytest.mark.parametrize("kind", ["moba", "dynamic"])
@torch.no_grad()
def test_padded_on_the_left(kind):
    ours, plain = both()
    ids, mask = tokens(3, 90), torch.ones(3, 90, dtype=torch.long)
    mask[0, :20], mask[2, :61] = 0, 0
    ids = ids * mask
    for sizes in ([50, 30, *[1] * 10], [10, 80]):
        cache = MoBACache(ours, capacity=90) if kind == "moba" else DynamicCache(config=ours.config)
        logits = _in_pieces(ours, ids, sizes, cache, mask)
        for row, keep in enumerate(mask.bool()):
            close(logits[row, keep], plain(ids[row, keep][None]).logits[0])


@pytest.mark.parametrize("kind", ["moba", "dynamic"])
@torch.no_grad()
def test_a_mask_of_tokens_still_to_come(kind):
    """As transformers' own attention takes it; one of too few tokens is refused."""
    ours, plain = both()
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :20], mask[1, :5], mask[1, 80:] = 0, 0, 0
    cache, outs = MoBACache(ours) if kind == "moba" else DynamicCache(config=ours.config), []
    for piece in (slice(0, 40), slice(40, 70), slice(70, 80)):
        outs.append(ours(ids[:, piece], past_key_values=cache, attention_mask=mask).logits)
    logits = torch.cat(outs, 1)
    for row, keep in enumerate(mask[:, :80].bool()):
        close(logits[row, keep], plain(ids[row, :80][keep][None]).logits[0])
    with pytest.raises(ValueError, match="attention_mask has 30 tokens but there are 90, .* pass one of all tokens"):
        ours(ids[:, 80:], past_key_values=cache, attention_mask=mask[:, :30])


@pytest.mark.parametrize("beams", [1, 2])
def test_generate(beams):
    """With either cache, the prompt whole or in pieces, padded or not, the same tokens, those of whole passes."""
    ours, plain = both()
    prompt, how = tokens(2, 60), dict(max_new_tokens=12, do_sample=False, num_beams=beams, eos_token_id=None)
    expected = plain.generate(prompt, use_cache=False, **how)
    assert torch.equal(ours.generate(prompt, **how), expected)
    assert torch.equal(ours.generate(prompt, past_key_values=MoBACache(ours), **how), expected)
    if beams == 1:
        cache = MoBACache(ours, capacity=72)
        assert torch.equal(ours.generate(prompt, past_key_values=cache, prefill_chunk_size=16, **how), expected)
        padded, mask = torch.cat([0 * prompt[:, :9], prompt], 1), torch.ones(2, 69, dtype=torch.long)
        mask[:, :9] = 0
        answers = ours.generate(padded, attention_mask=mask, past_key_values=MoBACache(ours), **how)
        assert torch.equal(answers[:, 69:], expected[:, 60:])


@torch.no_grad()
def test_full_attention_while_decoding():
    """The prompt with MoBA, tokens after it with all keys there are."""
    model = tiny(layers=1)
    ids = tokens(2, 90)
    dense = model(ids).logits
    use_moba(model, 16, 2, decoding="full")
    moba = model(ids).logits
    for cache in (MoBACache(model), DynamicCache(config=model.config)):
        logits = _in_pieces(model, ids, [80, *[1] * 10], cache)
        # In a model of one layer keys do not depend on how the prompt attended.
        close(logits[:, 80:], dense[:, 80:])
        close(logits[:, :80], moba[:, :80])
    assert (moba - dense)[:, 80:].abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_that_is_cropped_reset_and_reordered():
    ours, plain = both()
    ids = tokens(2, 90)
    cache = MoBACache(ours)
    ours(ids[:, :80], past_key_values=cache)
    cache.crop(-23)
    assert cache.get_seq_length() == 57
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    order = torch.tensor([1, 1, 0, 0])
    close(ours(ids[order, 57:], past_key_values=cache).logits, plain(ids).logits[order, 57:])
    assert cache.nbytes > 3 * 2 * 4 * 90 * 2 * 8 * 8
    cache.reset()
    assert cache.get_seq_length() == 0
    close(ours(ids, past_key_values=cache).logits, plain(ids).logits)


def test_what_a_cache_does_not_do_is_named():
    ours, _ = both()
    with pytest.raises(ValueError, match=r"config.moba=None"):
        MoBACache(tiny())
    with pytest.raises(ValueError, match="no gradient|none flows through a cache"):
        ours(tokens(1, 40), past_key_values=MoBACache(ours))
    ends = torch.tensor([0, 15, 40], dtype=torch.int32)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="cu_seq_lens_q with a MoBACache, .* leave past_key_values out"),
    ):
        ours(tokens(1, 40), past_key_values=MoBACache(ours), cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    cache = MoBACache(ours)
    use_moba(ours, 32, 3)
    with torch.no_grad(), pytest.raises(ValueError, match="cache was made for block_size=16"):
        ours(tokens(1, 40), past_key_values=cache)
    with pytest.raises(ValueError, match="MoBACache stays on its device"):
        cache.layers[0].offload()
    assert cache.layers[0].tokens.block_size == MoBAConfig(16, 3).block_size
