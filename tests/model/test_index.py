"""The index branch in a model: what it learns and what it chooses, under every policy of what is kept and redone."""

from dataclasses import replace

import pytest
import torch

from moba_cp import CPContext, reference
from moba_cp.index import IndexConfig
from moba_cp.index import reference as index_reference
from moba_cp.index.branch import IndexBranch
from moba_cp.index.config import INDEX_WEIGHT
from moba_cp.megatron import AttentionConfig, ModelConfig, build_model, load_hf, save_hf
from moba_cp.megatron.hf_config import hf_config_of
from moba_cp.model import layer as layer_module
from moba_cp.model.layer import LayerMemory
from moba_cp.model.schedule import Phase

MODEL = ModelConfig(vocab_size=61, n_layers=3, hidden_size=48, n_heads=4, n_kv_heads=2, head_dim=12, init_std=0.2)
INDEX = IndexConfig(heads=2, dim=6)
SPARSE = AttentionConfig(block_size=16, top_k=2, full_layers=[2], index=INDEX)
WARM_UP = replace(SPARSE, default="full")
T = 100
BOUNDS = torch.tensor([0, 37, 37, T])
POLICIES = [LayerMemory(recompute, host) for recompute in ("none", "attention_kept", "full") for host in (False, True)]


def build(attention, dtype=torch.float64):
    return build_model(MODEL, attention, dtype=dtype)


def batch():
    tokens = torch.randint(61, (T,), generator=torch.Generator().manual_seed(0))
    return tokens, tokens.roll(-1, -1), CPContext(None, "contiguous", T, cu_seqlens=BOUNDS)


def loss_and_grads(model):
    model.zero_grad()
    loss = model(*batch(), reduction="sum")
    loss.backward()
    return loss.detach(), model.index_loss, {name: p.grad for name, p in model.named_parameters()}


def expected_of(model, score: str, sparse: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the index branches, and its gradients, by plain loops on what each layer reads."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or [kwargs["hidden_states"]])[0]), with_kwargs=True
        )
        for layer in model.decoder.layers
    ]
    with torch.no_grad():
        model(*batch())
    for hook in hooks:
        hook.remove()
    context = batch()[2]
    angles = model.rotary.angles(context.document_positions)
    turn = lambda x, angles: torch.cat(
        [x.chunk(2, -1)[0] * angles.cos() - x.chunk(2, -1)[1] * angles.sin(),
         x.chunk(2, -1)[1] * angles.cos() + x.chunk(2, -1)[0] * angles.sin()], -1
    )  # fmt: skip
    total, grads = 0.0, {}
    for number, hidden in zip((0, 2), (seen[0], seen[2])):
        layer = model.decoder.layers[number]
        normed = layer.input_layernorm(hidden[:, 0]).detach()
        qkv = layer.self_attention.linear_qkv.weight.detach()
        parts = (normed @ qkv.T).view(T, 2, 4, 12)
        heads = angles[:, None, None]
        q, k, v = turn(parts[:, :, :2], heads).flatten(1, 2), turn(parts[:, :, 2], angles[:, None]), parts[:, :, 3]
        weight = layer.self_attention.core_attention.index.weight
        mixed = (normed @ weight.T).view(T, 2, -1)
        queries = turn(mixed[..., :12].unflatten(2, (2, 6)), heads[..., ::2])
        keys, weights = turn(mixed[..., 12:18], angles[:, None, ::2]), mixed[..., 18:] * 12**-0.5
        scores = index_reference.block_scores(queries, weights, keys, 16, score, BOUNDS)
        chosen = None
        if sparse:
            chosen = index_reference.select_blocks(queries, weights, keys, 16, 3, score, BOUNDS)
            first = torch.cat([torch.zeros(37), torch.full((T - 37,), 3)]).long()[:, None, None]
            ids = torch.where(chosen >= 0, chosen + first, -1).repeat_interleave(2, 1)
            _, lse = reference.moba_attention(q, k, v, 16, 3, BOUNDS, None, True, ids)
        else:
            _, lse = reference.full_attention(q, k, v, BOUNDS, None, True)
        masses = index_reference.block_masses(q, k, lse, 16, 12**-0.5, BOUNDS)
        loss = index_reference.index_loss(scores, masses, chosen)
        name = f"decoder.layers.{number}.self_attention.core_attention.index.weight"
        (grads[name],) = torch.autograd.grad(loss, weight)
        total += loss.detach()
    return total / 2, grads


@pytest.fixture
def short_slices(monkeypatch):
    monkeypatch.setattr(layer_module, "SHORTEST_SLICE", 8)
    monkeypatch.setattr(layer_module, "SLICE_ELEMENTS", 1)


@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
def test_every_policy_learns_what_the_plain_loops_say(sparse, score, short_slices):
    # With two of four blocks a divergence over the chosen ones is one over one block, which is nothing.
    attention = replace(SPARSE, top_k=3) if sparse else WARM_UP
    attention = replace(attention, index=replace(INDEX, score=score))
    model = build(attention)
    value, expected = None, None
    for memory in POLICIES:
        model.set_memory([memory] * 3)
        got = loss_and_grads(model)
        if value is None:
            value, expected = expected_of(model, score, sparse)
            first = got
            assert value > 1e-3 and len(expected) == 2
        torch.testing.assert_close(got, first, rtol=0, atol=1e-11)
        torch.testing.assert_close(got[1], value, rtol=0, atol=1e-11)
        for name, grad in expected.items():
            assert grad.abs().max() > 1e-4
            torch.testing.assert_close(got[2][name], grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("memory", POLICIES[::2], ids=lambda memory: memory.recompute)
def test_what_is_computed_again_attends_to_the_same_choice(memory, monkeypatch):
    """It is kept, not chosen again: a choice that another call would make differently changes no gradient."""
    model = build(replace(SPARSE, top_k=3))
    expected = loss_and_grads(model)
    model.set_memory([memory] * 3)
    choose, calls = IndexBranch.choose, []

    def once(self, scored):
        calls.append(self.layer)
        return choose(self, scored) if calls.count(self.layer) == 1 else torch.full_like(choose(self, scored), -1)

    monkeypatch.setattr(IndexBranch, "choose", once)
    torch.testing.assert_close(loss_and_grads(model), expected, rtol=0, atol=1e-11)
    assert calls == ["layer 1", "layer 3"]


def test_the_model_attends_to_what_its_branches_choose(monkeypatch):
    model = build(replace(SPARSE, top_k=3))
    loss = model(*batch())
    sums = model(*batch(), reduction="sum")
    torch.testing.assert_close(loss.sum(), sums)
    with torch.no_grad():
        assert torch.equal(model(*batch()), loss)
        monkeypatch.setattr(IndexBranch, "choose", lambda self, scored: torch.full((T, 2, 2), -1, dtype=torch.int32))
        assert not torch.equal(model(*batch()), loss)


def test_per_token_losses_teach_the_branches_nothing():
    model = build(WARM_UP)
    model(*batch()).sum().backward()
    assert all(not p.grad.any() for name, p in model.named_parameters() if name.endswith(INDEX_WEIGHT))


def test_frozen_branches_choose_and_do_not_learn():
    model = build(replace(SPARSE, top_k=3))
    expected = loss_and_grads(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(INDEX_WEIGHT))
    loss, index_loss, grads = loss_and_grads(model)
    assert index_loss is None and torch.equal(loss, expected[0])
    for name, grad in grads.items():
        assert grad is None if name.endswith(INDEX_WEIGHT) else torch.equal(grad, expected[2][name])


def test_sequences_side_by_side_learn_as_one_after_another():
    model = build(replace(SPARSE, top_k=3))
    tokens, labels, context = batch()
    both = torch.stack([tokens, tokens.flip(0)]), torch.stack([labels, labels.flip(0)])
    model.zero_grad()
    model(*both, context, reduction="sum").backward()
    got, together = {name: p.grad for name, p in model.named_parameters()}, model.index_loss
    model.zero_grad()
    apart = 0
    for pair in zip(*both):
        model(*pair, context, reduction="sum").backward()
        apart += model.index_loss
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-11)
    torch.testing.assert_close(got, {name: p.grad for name, p in model.named_parameters()}, rtol=0, atol=1e-11)


def test_layers_whose_input_is_not_known_are_refused():
    model = build(SPARSE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="attention.index in layer 1"):
        model(*batch())
    model.decoder.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="attention.index in layer 1: .* has a hook"):
        model(*batch())


def test_which_layers_have_a_branch():
    has = lambda attention: [attention.has_index(layer, 3) for layer in (1, 2, 3)]
    assert has(SPARSE) == has(WARM_UP) == has(SPARSE.at(1, 2)) == [True, False, True]
    scheduled = replace(SPARSE, schedule=(Phase("full", 0.5), Phase("moba")))
    assert has(scheduled) == has(scheduled.at(1, 10)) == [True, False, True]
    assert has(replace(SPARSE, index=None)) == [False] * 3
    parameters = sum(p.numel() for name, p in build(SPARSE).named_parameters() if name.endswith(INDEX_WEIGHT))
    assert parameters == SPARSE.index_parameters(3, 2, 48) == 2 * 2 * (2 * 6 + 6 + 2) * 48


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 0}, "index.heads=0 is not a positive integer"),
        ({"dim": 5}, "index.dim=5 is odd"),
        ({"score": "sum"}, "index.score='sum' is unknown"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        IndexConfig(**options)


def test_models_of_hugging_face_have_no_branches(tmp_path):
    """Loaded into a model that has, they leave them as they are; written from one, the branches are refused."""
    config = hf_config_of(MODEL, T, "float64")
    save_hf(build(replace(SPARSE, index=None)), tmp_path, config)
    model = build_model(MODEL, SPARSE, dtype=torch.float64, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    load_hf(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name.endswith(INDEX_WEIGHT) or parameter.dim() < 2), name
    with pytest.raises(ValueError, match="index.weight has no counterpart"):
        save_hf(model, tmp_path / "out", config)
