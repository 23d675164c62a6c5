"""A cache of keys and values: pieces of a prompt, and tokens one by one, against all at once."""

import pytest
import torch

from moba_cp import KVCache, MoBAConfig, eager, full_attention, moba_attention
from moba_cp.steps import Step
from tests.helpers.cases import relative_error

CONFIG = MoBAConfig(16, 3)
T = 120


def _inputs(batch, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, T, h, 8, generator=g, dtype=torch.float64).to(dtype) for h in (4, 2, 2)]


def _whole(kind, q, k, v, padding):
    """Each sequence for itself, without its padding; rows of padding are 0."""
    out = torch.zeros_like(q)
    for i, skip in enumerate([0] * len(q) if padding is None else padding.tolist()):
        of_sequence = q[i, skip:], k[i, skip:], v[i, skip:]
        out[i, skip:] = moba_attention(*of_sequence, CONFIG) if kind == "moba" else full_attention(*of_sequence)
    return out


def _in_pieces(kind, sizes, q, k, v, padding, capacity=0):
    cache, outs, at = KVCache(16, capacity), [], 0
    for size in sizes:
        piece = slice(at, at + size)
        cache.append(k[:, piece], v[:, piece])
        if kind == "moba":
            outs.append(cache.moba_attention(q[:, piece], CONFIG, padding=padding))
        else:
            outs.append(cache.full_attention(q[:, piece], padding=padding))
        at += size
    assert cache.length == at == T
    assert torch.equal(cache.k, k) and torch.equal(cache.v, v)
    return torch.cat(outs, 1), cache


PIECES = [[T], [40, 40, 40], [33, 1, 17, 5, 64], [95, *[1] * 25]]


@pytest.mark.parametrize("kind", ["moba", "full"])
@pytest.mark.parametrize("padding", [None, [0, 37, 90]], ids=["", "padded"])
@pytest.mark.parametrize("sizes", PIECES, ids=lambda x: f"{len(x)}-pieces")
def test_pieces_are_the_whole(kind, padding, sizes):
    q, k, v = _inputs(3)
    padding = None if padding is None else torch.tensor(padding)
    expected = _whole(kind, q, k, v, padding)
    for capacity in (0, T):
        out, _ = _in_pieces(kind, sizes, q, k, v, padding, capacity)
        if padding is not None:
            real = torch.arange(T) >= padding[:, None]
            assert out.isfinite().all()
            out = out * real[..., None, None]
        assert relative_error(out, expected) < 1e-12


def test_means_are_computed_once_for_each_block(monkeypatch):
    averaged = []
    original = eager.block_means

    def count(k, start, length, block_size):
        averaged.append(start.numel())
        return original(k, start, length, block_size)

    monkeypatch.setattr(eager, "block_means", count)
    _in_pieces("moba", [56, *[1] * 64], *_inputs(1), None)
    assert averaged == [3, 1, 1, 1, 1], "blocks of 16 among 50 tokens, then one each time that a block is complete"


def test_cropped_and_selected_sequences_go_on():
    q, k, v = _inputs(2)
    cache = KVCache(16)
    cache.append(k[:, :100], v[:, :100])
    cache.moba_attention(q[:, :100], CONFIG)
    cache.crop(57)
    cache.select(torch.tensor([1, 0, 1]))
    order = [1, 0, 1]
    cache.append(k[order, 57:], v[order, 57:])
    out = cache.moba_attention(q[order, 57:], CONFIG)
    assert relative_error(out, _whole("moba", q, k, v, None)[order, 57:]) < 1e-12


@pytest.mark.parametrize("kind", ["moba", "full"])
def test_the_next_sequences_padding_may_lie_in_the_same_tensor(kind):
    padding = torch.tensor([0, 37, 90])
    shared = padding.numpy()
    for seed, values in enumerate(([0, 37, 90], [50, 3, 20], [20, 64, 0])):
        if seed == 1:
            padding.copy_(torch.tensor(values))
        else:
            shared[:] = values
        q, k, v = _inputs(3, seed=seed)
        out, _ = _in_pieces(kind, [T], q, k, v, padding)
        real = (torch.arange(T) >= padding[:, None])[..., None, None]
        assert relative_error(out * real, _whole(kind, q, k, v, padding)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", ["mean", "max"])
def test_autocast_rounds_nothing_inside(dtype, score):
    """Pieces and tokens, of the host and of a step: in the dtype in which keys were appended."""
    q, k, v = _inputs(2, dtype)
    config = MoBAConfig(16, 3, score=score)

    def results():
        cache, outs = KVCache(16, T), []
        for piece in (slice(0, 90), slice(90, 118), slice(118, 119)):
            cache.append(k[:, piece], v[:, piece])
            outs.append(cache.moba_attention(q[:, piece], config))
        if score == "mean":
            cache.step = Step(q.device)
            cache.step.position.fill_(119)
            cache.append(k[:, 119:], v[:, 119:])
            outs += [cache.moba_attention(q[:, 119:], config), cache.full_attention(q[:, 119:])]
        return outs

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype and torch.equal(x, y)


@pytest.mark.parametrize("batch, n_rows", [(0, 30), (0, 2), (2, 0)])
def test_nobody_asks(batch, n_rows):
    cache, q = KVCache(16), torch.randn(batch, n_rows, 4, 8)
    cache.append(*torch.randn(2, batch, 40, 2, 8).unbind())
    assert cache.moba_attention(q, CONFIG).shape == cache.full_attention(q).shape == q.shape


@pytest.mark.parametrize("capacity", [0, T])
def test_tokens_in_another_dtype_change_no_earlier_ones(capacity):
    """As when a prompt is computed without autocast, and tokens with it."""
    _, k, v = _inputs(2, torch.float32)
    cache = KVCache(16, capacity)
    cache.append(k[:, :40], v[:, :40])
    cache.append(k[:, 40:].bfloat16(), v[:, 40:].bfloat16())
    assert torch.equal(cache.k[:, :40], k[:, :40]) and torch.equal(cache.v[:, 40:], v[:, 40:].bfloat16().float())


def test_bfloat16_in_pieces_selects_the_same():
    q, k, v = _inputs(1, torch.bfloat16)
    whole = moba_attention(q[0], k[0], v[0], CONFIG)
    for sizes in PIECES[1:]:
        out, cache = _in_pieces("moba", sizes, q, k, v, None)
        assert relative_error(out[0], whole) < 1e-2
    assert cache.nbytes >= 2 * k.nbytes


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda c, q: c.moba_attention(q, MoBAConfig(32, 3)), r"config.block_size=32, but the cache was made for"),
        (lambda c, q: c.moba_attention(q[0], CONFIG), r"pass a tensor \[sequences, tokens, heads, head_dim\]"),
        (lambda c, q: c.full_attention(q.expand(2, -1, -1, -1)), r"the cache holds 20 tokens of 1 sequences"),
        (lambda c, q: c.moba_attention(torch.cat([q, q], 1), CONFIG), r"append the keys of its tokens first"),
        (lambda c, q: c.moba_attention(q.clone().requires_grad_(), CONFIG), r"none flows through a cache"),
        (lambda c, q: c.moba_attention(q, CONFIG, padding=torch.tensor([3, 4])), r"padding is \(2,\) .* int64 \[1\]"),
        (lambda c, q: c.full_attention(q[:, :1], padding=torch.tensor([3.0])), r"padding is \(1,\) torch.float32"),
        (lambda c, q: c.full_attention(q, padding=[3]), r"padding is \[3\]; pass int64"),
        (lambda c, q: c.moba_attention(q, CONFIG, padding=torch.tensor([-1])), r"padding=\[-1\] has numbers below 0"),
        (lambda c, q: c.append(q, q), r"sequences, heads and head_dim must be equal"),
        (lambda c, q: c.append(q, q[..., :4]), r"k has shape .* but v has"),
        (lambda c, q: c.crop(21), r"length=21 is not between 0 and the 20"),
        (lambda c, q: KVCache(16).moba_attention(q, CONFIG), r"the cache is empty"),
        (lambda c, q: KVCache(15), r"block_size=15"),
        (lambda c, q: KVCache(16, -1), r"capacity=-1"),
    ],
)
def test_what_does_not_fit_is_named(call, says):
    cache, q = KVCache(16), torch.randn(1, 20, 4, 8)
    cache.append(q[:, :, :2], q[:, :, 2:])
    with pytest.raises(ValueError, match=says):
        call(cache, q)
