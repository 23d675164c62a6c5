"""Tokens one by one with lengths on the device, as a CUDA graph needs them: equal to what the host drives."""

import pytest
import torch

from moba_cp import MoBAConfig
from moba_cp.cache import KVCache
from moba_cp.hf import MoBACache, decoding_graph, use_moba
from moba_cp.hf import graph as graphs
from moba_cp.hf.answer import answer
from moba_cp.steps import Step
from tests.helpers.hf_models import FAMILIES, both, close, tiny, tokens


@pytest.fixture
def steps(monkeypatch):
    """How many passes were steps."""
    counted, run = [], graphs._Decoder._run
    monkeypatch.setattr(graphs._Decoder, "_run", lambda self: counted.append(1) or run(self))
    return counted


def _one_by_one(model, cache, ids, first: int):
    """Logits of ids[:, first:], token by token behind a prompt."""
    outs = [model(ids[:, :first], past_key_values=cache).logits[:, -1:]]
    for at in range(first, ids.shape[1]):
        outs.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_steps_are_the_whole(family, steps):
    """Over two borders of blocks, with MoBA and full layers."""
    ours, plain = both(family)
    ids = tokens(2, 70)
    cache = MoBACache(ours, capacity=70)
    with decoding_graph(ours, cache):
        logits = _one_by_one(ours, cache, ids, 30)
    assert len(steps) == 40
    close(logits, plain(ids).logits[:, 29:])


@pytest.mark.parametrize("first", [1, 2, 15, 16, 17, 31, 32])
@pytest.mark.parametrize("decoding", ["moba", "full"])
@torch.no_grad()
def test_wherever_they_begin(first, decoding, steps):
    model = use_moba(tiny(), 16, 3, "last 1", decoding=decoding)
    ids = tokens(1, first + 20)
    expected = _one_by_one(model, MoBACache(model), ids, first)
    cache = MoBACache(model, capacity=first + 20)
    with decoding_graph(model, cache):
        close(_one_by_one(model, cache, ids, first), expected)
    assert len(steps) == 20 - (first == 1), "a single key is a prompt's"
    assert cache.layers[0].keys.shape[2] == first + 20 == cache.get_seq_length()


@torch.no_grad()
def test_prompts_between_steps_and_room_that_ends(steps):
    """A cache without room for a token grows as ever, and is stepped through again; the means are right afterwards."""
    ours, plain = both()
    ids = tokens(2, 500)
    cache, at, outs = MoBACache(ours, capacity=40), 0, []
    with decoding_graph(ours, cache):
        for piece in (38, 1, 1, 1, 1, 90, 1, 1):
            outs.append(ours(ids[:, at : at + piece], past_key_values=cache).logits)
            at += piece
    assert len(steps) == 2 + 1 + 2
    outs.append(ours(ids[:, at : at + 60], past_key_values=cache).logits)
    close(torch.cat(outs, 1), plain(ids[:, : at + 60]).logits)
    assert "forward" not in ours.__dict__


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_answers_are_the_same(how, steps):
    model, prompt, answers = use_moba(tiny(), 16, 3), tokens(1, 50)[0], []
    for graph in (False, True):
        torch.manual_seed(3)
        seen = []
        answers.append(answer(model, prompt, 40, 20, cuda_graph=graph, on_token=seen.append, **how))
        assert seen == answers[-1].tolist()
    assert torch.equal(*answers) and len(answers[0]) > 4
    # transformers 4.57 takes the last token of a prompt in pieces by itself.
    assert len(steps) - len(answers[0]) in (-1, 0)


@torch.no_grad()
def test_what_cannot_be_stepped_through_is_as_ever(steps):
    ours, plain = both()
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = 0
    cache = MoBACache(ours, capacity=60)
    with decoding_graph(ours, cache):
        ours(ids[:, :50] * mask[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
        logits = [
            ours(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits
            for at in range(50, 60)
        ]
        other = MoBACache(ours)
        ours(ids[:, :40], past_key_values=other)
        ours(ids[:, 40:41], past_key_values=other)
        with torch.enable_grad(), pytest.raises(ValueError, match="none flows through a cache"):
            ours(ids[:, :1], past_key_values=cache)
    assert not steps
    close(torch.cat(logits, 1)[0], plain(ids[:1, 9:]).logits[0, 41:])


@torch.no_grad()
def test_sequences_with_padding_behind_others_without(steps):
    """In the storage that the steps know; and steps serve again where padding ends."""
    ours, plain = both()
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :20], mask[1, :5] = 0, 0
    cache = MoBACache(ours, capacity=60)
    with decoding_graph(ours, cache):
        _one_by_one(ours, cache, ids, 55)
        cache.crop(-60)
        outs = [ours(ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache).logits]
        for at in range(50, 60):
            seen = mask[:, : at + 1]
            outs.append(ours(ids[:, at : at + 1], attention_mask=seen, past_key_values=cache).logits)
        assert len(steps) == 5
        cache.crop(-60)
        close(_one_by_one(ours, cache, ids, 50), plain(ids).logits[:, 49:])
    assert len(steps) == 15
    for row, keep in enumerate(mask.bool()):
        close(torch.cat(outs, 1)[row, keep], plain(ids[row, keep][None]).logits[0])


@pytest.mark.parametrize(
    "gate",
    [{}, {"shared_by_group": "sum"}, {"min_recent": 1, "sink": True}],
    ids=["plain", "shared", "recent and sink"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_one_cache(batch, gate):
    """Without a model: MoBA and full attention, keys that the host appended before, blocks that are never complete."""
    config, size = MoBAConfig(16, 3, **gate), 16
    g = torch.Generator().manual_seed(batch)
    q, k, v = (torch.randn(batch, 60, h, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    plain, stepped = KVCache(size), KVCache(size, capacity=60)
    step = Step(torch.device("cpu"))
    for cache in (plain, stepped):
        cache.append(k[:, :5], v[:, :5])
    stepped.average()
    for at in range(5, 60):
        here = slice(at, at + 1)
        plain.append(k[:, here], v[:, here])
        expected = plain.moba_attention(q[:, here], config), plain.full_attention(q[:, here])
        stepped.step = step
        step.begin()
        step.position.fill_(at)
        stepped.append(k[:, here], v[:, here])
        found = stepped.moba_attention(q[:, here], config), stepped.full_attention(q[:, here])
        stepped.step = None
        stepped.advance(True)
        for x, y in zip(found, expected, strict=True):
            close(x, y, 1e-12)
    assert stepped.length == 60 and torch.equal(stepped.k, k)
    stepped.step = step
    with pytest.raises(ValueError, match="padding was passed within a Step"):
        stepped.full_attention(q[:, :1], padding=torch.zeros(batch, dtype=torch.int64))
