"""The model on one rank, against the reference attention in the same places."""

import gc
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moba_cp import CPContext, reference
from moba_cp.megatron import AttentionConfig, ModelConfig, build_model

MODEL = ModelConfig(vocab_size=61, n_layers=3, hidden_size=48, n_heads=4, n_kv_heads=2, head_dim=10, init_std=0.2)
SPARSE = AttentionConfig(block_size=16, top_k=2, full_layers=[2])
T = 100


class ReferenceAttention(nn.Module):
    """The reference in the place of the core attention: one sequence, documents from the context."""

    def __init__(self, kind: str, attention: AttentionConfig):
        super().__init__()
        self.kind, self.attention = kind, attention

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params):
        bounds = packed_seq_params.context.cu_seqlens
        outs = []
        for qkv in zip(query.unbind(1), key.unbind(1), value.unbind(1)):
            if self.kind == "full":
                outs.append(reference.full_attention(*qkv, bounds))
            else:
                outs.append(reference.moba_attention(*qkv, self.attention.block_size, self.attention.top_k, bounds))
        return torch.stack(outs, 1).flatten(2)


def batch(n_tokens=T, seed=0, shape=()):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(MODEL.vocab_size, (*shape, n_tokens), generator=generator)
    return tokens, tokens.roll(-1, -1)


def loss_and_grads(model, *inputs):
    model.zero_grad()
    loss = model(*inputs)
    # Uneven weights, so that an error in one token's gradient is not averaged away.
    (loss * torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)).sum().backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def core_attentions(model):
    return [layer.self_attention.core_attention for layer in model.decoder.layers]


DOCUMENTS = {"one document": None, "packed": torch.tensor([0, 37, 37, 40, T])}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("full_layers", ["none", [2], "last 3"], ids=str)
def test_loss_and_gradients_equal_the_reference_in_the_same_layers(full_layers, documents):
    attention = AttentionConfig(block_size=16, top_k=2, full_layers=full_layers)
    model = build_model(MODEL, attention, dtype=torch.float64)
    context = CPContext(None, layout="contiguous", seq_len=T, cu_seqlens=DOCUMENTS[documents])
    ours = loss_and_grads(model, *batch(), context)
    kinds = ["full" if n in attention.full_layer_numbers(3) else "moba" for n in (1, 2, 3)]
    for layer, kind in zip(model.decoder.layers, kinds):
        layer.self_attention.core_attention = ReferenceAttention(kind, attention)
    torch.testing.assert_close(ours, loss_and_grads(model, *batch(), context), rtol=0, atol=1e-10)


def test_sparsity_is_felt():
    losses = [
        build_model(MODEL, AttentionConfig(block_size=16, top_k=k, full_layers=full), dtype=torch.float64)(*batch())
        for k, full in ((2, "none"), (2, [2]), (7, "none"), (1, "last 3"))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (losses[i] - losses[j]).abs().max() > 1e-3
    torch.testing.assert_close(losses[2], losses[3], rtol=0, atol=1e-10)


def test_packed_documents_equal_documents_alone():
    model = build_model(MODEL, SPARSE, dtype=torch.float64)
    tokens, labels = batch()
    bounds = [0, 37, 40, T]
    packed = model(tokens, labels, CPContext(None, layout="contiguous", seq_len=T, cu_seqlens=torch.tensor(bounds)))
    alone = torch.cat([model(tokens[a:b], labels[a:b]) for a, b in zip(bounds, bounds[1:])])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)


def test_batches_are_sequences_apart():
    model = build_model(MODEL, SPARSE, dtype=torch.float64)
    tokens, labels = batch(shape=(3,))
    together = loss_and_grads(model, tokens, labels)[0]
    alone = torch.stack([model(t, y) for t, y in zip(tokens, labels)])
    torch.testing.assert_close(together, alone.detach(), rtol=0, atol=1e-10)
    logits = model(tokens)
    assert logits.shape == (3, T, MODEL.vocab_size)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, T)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-10)


def test_unlabelled_tokens_cost_nothing():
    model = build_model(MODEL, SPARSE, dtype=torch.float64)
    tokens, labels = batch()
    whole = model(tokens, labels)
    labels = labels.clone()
    labels[10:20] = -100
    masked = model(tokens, labels)
    assert masked[10:20].eq(0).all()
    assert torch.equal(masked[20:], whole[20:]) and torch.equal(masked[:10], whole[:10])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parameters_are_counted(tied):
    config = ModelConfig(vocab_size=61, n_layers=2, hidden_size=48, n_heads=4, n_kv_heads=1, tie_embeddings=tied)
    model = build_model(config, SPARSE)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters(embeddings=True)
    outside = {"embedding.word_embeddings.weight", "output_layer.weight"}
    rest = sum(p.numel() for name, p in model.named_parameters() if name not in outside)
    assert rest == config.n_parameters()
    _, grads = loss_and_grads(model, *batch())
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


def test_weights_follow_the_seed_alone():
    weights = build_model(MODEL, SPARSE, seed=3).state_dict()
    torch.manual_seed(99)
    again = build_model(MODEL, AttentionConfig(default="full"), seed=3).state_dict()
    other = build_model(MODEL, SPARSE, seed=4).state_dict()
    assert weights.keys() == again.keys()
    for name, weight in weights.items():
        if weight is None:
            continue
        assert torch.equal(weight, again[name])
        if weight.dim() < 2:
            assert weight.eq(1).all()
            continue
        assert not torch.equal(weight, other[name])
        to_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = MODEL.init_std / (6**0.5 if to_residual else 1)
        assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_bf16_model_is_the_float32_model_rounded():
    exact = build_model(MODEL, SPARSE, dtype=torch.float64)
    low = build_model(MODEL, SPARSE, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    loss, grads = loss_and_grads(low, *batch())
    assert loss.dtype == torch.float32
    assert (loss - exact(*batch())).abs().mean() < 0.1
    assert all(grad.isfinite().all() for grad in grads.values())


class _Memory(TorchDispatchMode):
    """Bytes of the storages that operators made under this mode and that are alive; ``peak`` is the most so far."""

    def __init__(self, model):
        super().__init__()
        self._others = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
        self._made, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := StorageWeakRef(x.untyped_storage())) not in self._others:
                self._made[storage] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, self.alive())
        return out

    def alive(self):
        self._made = {storage: nbytes for storage, nbytes in self._made.items() if not storage.expired()}
        return sum(self._made.values())


def _kept_bytes(model, *inputs):
    """What waits for the backward pass."""
    with _Memory(model) as memory:
        loss = model(*inputs)
        return loss, memory.alive()


def test_recompute_changes_memory_and_nothing_else():
    models = {
        recompute: build_model(replace(MODEL, recompute=recompute), SPARSE, dtype=torch.float64)
        for recompute in ("none", "attention_kept", "full")
    }
    kept = {recompute: _kept_bytes(model, *batch())[1] for recompute, model in models.items()}
    assert kept["full"] < kept["attention_kept"] < kept["none"] / 2
    expected = loss_and_grads(models["none"], *batch())
    for recompute in ("attention_kept", "full"):
        torch.testing.assert_close(loss_and_grads(models[recompute], *batch()), expected, rtol=0, atol=0)


def _memory_of_a_step(model):
    """(peak, what stays) of forward and backward, without the gradients, in bytes."""
    # What waits for the collector of cycles is not free when the next layer needs memory.
    gc.collect()
    gc.disable()
    try:
        with _Memory(model) as memory:
            model(*batch()).sum().backward()
            return memory.peak, memory.alive()
    finally:
        gc.enable()


def test_what_a_layer_recomputed_ends_with_it():
    def steps(n_layers):
        model = build_model(replace(MODEL, recompute="full", n_layers=n_layers), SPARSE)
        return *_memory_of_a_step(model), sum(4 * p.numel() for p in model.parameters())

    (peak, left, gradients), (higher, left_of_nine, more_gradients) = steps(3), steps(9)
    hidden = 4 * T * MODEL.hidden_size
    assert left < gradients + hidden and left_of_nine < more_gradients + hidden
    # Six more layers: six more inputs that wait for backward, and six layers' gradients.
    assert higher - peak <= more_gradients - gradients + 6 * hidden + hidden


def test_recomputation_runs_to_the_end_of_the_layer():
    """Where it ends early, it ends by an exception whose traceback keeps all that the layer computed (PyTorch 2.11)."""
    model = build_model(replace(MODEL, recompute="full"), SPARSE)
    ended = []
    for layer in model.decoder.layers:
        layer.mlp.register_forward_hook(lambda *_: ended.append(True))
    model(*batch()).sum().backward()
    assert len(ended) == 2 * MODEL.n_layers


def test_attention_is_switched_while_training():
    model = build_model(MODEL, SPARSE, dtype=torch.float64)
    assert [core.kind for core in core_attentions(model)] == ["moba", "full", "moba"]
    model.set_attention(AttentionConfig(default="full"))
    full = build_model(MODEL, AttentionConfig(default="full"), dtype=torch.float64)
    assert torch.equal(model(*batch()), full(*batch()))
    model.set_attention(SPARSE)
    assert torch.equal(model(*batch()), build_model(MODEL, SPARSE, dtype=torch.float64)(*batch()))


@pytest.mark.parametrize(
    "tokens, labels, seq_len, message",
    [
        ((4, 5, 6), None, None, "tokens has shape (4, 5, 6); pass [tokens] or [sequences, tokens]"),
        ((0,), None, None, "tokens has shape (0,)"),
        ((8,), (9,), None, "labels has shape (9,) but tokens has (8,)"),
        ((8,), (8,), 16, "tokens has 8 tokens a sequence but rank 0 of 1 holds 16 of seq_len=16"),
    ],
)
def test_batches_that_do_not_fit_are_refused(tokens, labels, seq_len, message):
    model = build_model(MODEL, SPARSE)
    inputs = [shape and torch.zeros(shape, dtype=torch.long) for shape in (tokens, labels)]
    context = seq_len and CPContext(None, layout="contiguous", seq_len=seq_len)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(*inputs, context)


def test_full_layers_beyond_the_model_are_refused():
    with pytest.raises(ValueError, match="asks for 4 of 3 layers"):
        build_model(MODEL, AttentionConfig(full_layers="last 4"))
