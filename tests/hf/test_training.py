"""Training and evaluation through transformers, against its own attention and against the reference."""

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from moba_cp.hf import use_moba
from tests.helpers.cases import Largest
from tests.helpers.hf_models import FAMILIES, both, close, gradients, tiny, tokens


def _loss_and_gradients(model, **inputs):
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def _same(actual, expected):
    close(actual[0], expected[0])
    for name, grad in expected[1].items():
        close(actual[1][name], grad, 1e-4)


def _labels(ids, mask):
    """Tokens that another token predicts: the first behind padding is predicted by padding."""
    behind = mask.roll(1, 1)
    behind[:, 0] = 0
    return ids.masked_fill((mask == 0) | (behind == 0), -100)


def _padded(ids, sides):
    """ids and mask [b, S] with so many tokens replaced by padding; negative numbers on the right."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, side in enumerate(sides):
        where = slice(0, side) if side >= 0 else slice(side, None)
        ids[row, where], mask[row, where] = 0, 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sides", [None, (0, 13, 70), (0, -13, -70), (5, -7, 0)], ids=["", "left", "right", "both"])
def test_with_all_blocks_it_is_transformers_own_attention(family, sides):
    model, ids = tiny(family), tokens(3, 90)
    inputs = {"input_ids": ids, "labels": ids}
    if sides is not None:
        ids, mask = _padded(ids, sides)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": _labels(ids, mask)}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    expected = _loss_and_gradients(model, **inputs)
    use_moba(model, block_size=16, top_k=6)
    with torch.no_grad():
        ours = model(**inputs, use_cache=False).logits
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    close(ours[real], logits[real])
    _same(_loss_and_gradients(model, **inputs), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_few_blocks_it_is_the_reference(family):
    ours, plain = both(family)
    ids = tokens(3, 90)
    _same(_loss_and_gradients(ours, input_ids=ids, labels=ids), _loss_and_gradients(plain, input_ids=ids, labels=ids))
    dense = tiny(family)(ids, labels=ids).loss
    assert (ours(ids, labels=ids).loss - dense).abs() > 1e-3, "a selection that leaves something out"


def test_other_gates_are_the_reference():
    for gate in ({"shared_by_group": "sum", "sink": True}, {"shared_by_group": "max", "score": "max", "min_recent": 1}):
        ours, plain = both("qwen3", **gate)
        assert ours.config.moba.items() >= gate.items()
        ids = tokens(2, 90)
        inputs = {"input_ids": ids, "labels": ids}
        _same(_loss_and_gradients(ours, **inputs), _loss_and_gradients(plain, **inputs))


@pytest.mark.parametrize("sides", [(0, 13, 40), (0, -13, -40)], ids=["left", "right"])
def test_padding_is_nobodys(sides):
    ours, plain = both()
    ids, mask = _padded(tokens(3, 90), sides)
    logits = ours(ids, attention_mask=mask).logits
    for row, keep in enumerate(mask.bool()):
        close(logits[row, keep], plain(ids[row, keep][None]).logits[0])


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_do_not_see_one_another(how, batch):
    ours, plain = both()
    ids, lengths = tokens(batch, 100), [33, 50, 17]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(batch, -1)
    inputs = {"position_ids": positions}
    if how == "cu_seq_lens":
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        if batch > 1:
            with pytest.raises(ValueError, match="cu_seq_lens_q with 2 sequences"):
                ours(ids, **inputs)
            return
    logits = ours(ids, **inputs, use_cache=False).logits
    for row in range(batch):
        alone = [plain(part[None]).logits[0] for part in ids[row].split(lengths)]
        close(logits[row], torch.cat(alone))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    ours, plain = both()
    ids, mask = _padded(tokens(2, 80), (0, 20))
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": _labels(ids, mask)}
    ours.train()
    expected = _loss_and_gradients(ours, **inputs)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _same(_loss_and_gradients(ours, **inputs), expected)


@pytest.mark.parametrize("case", ["mask", "packed"])
def test_compiled(case):
    """As one graph where a mask is given; without one, transformers looks for packed documents, which ends it once."""
    ours, _ = both(layers=1, full_layers="none")
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=case == "mask")
    for length in (60, 80) if case == "packed" else (60,):
        ids, mask = _padded(tokens(2, length), (0, 20))
        inputs = {"input_ids": ids, "labels": _labels(ids, mask)}
        if case == "mask":
            inputs |= {"attention_mask": mask}
        if case == "packed":
            inputs |= {"position_ids": torch.cat([torch.arange(25), torch.arange(length - 25)]).expand(2, -1)}
        expected = _loss_and_gradients(ours, **inputs)
        loss = compiled(**inputs, use_cache=False).loss
        loss.backward()
        _same((loss.detach(), gradients(ours)), expected)


@torch.no_grad()
def test_a_compiled_model_follows_what_it_is_told_later():
    ours, _ = both(layers=1, full_layers="none")
    torch._dynamo.reset()
    compiled, ids = torch.compile(ours, backend="aot_eager"), tokens(1, 80)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    logits = [compiled(**inputs).logits]
    for options in ((32, 2), (16, 2, "last 1"), (16, 3)):
        use_moba(ours, *options)
        logits.append(compiled(**inputs).logits)
        assert torch.equal(logits[-1], ours(**inputs).logits)
    assert torch.equal(logits[3], logits[0]) and not any(torch.equal(x, logits[0]) for x in logits[1:3])


def test_saved_with_its_config_and_loaded_by_name(tmp_path):
    ours, _ = both()
    ids = tokens(1, 60)
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba", dtype=torch.float64)
    assert loaded.config.moba == ours.config.moba
    close(loaded(ids).logits, ours(ids).logits, 1e-12)
    full = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (full(ids).logits - ours(ids).logits).abs().max() > 1e-3


def test_nothing_of_size_tokens_squared():
    ours = use_moba(tiny(layers=1, intermediate_size=16), 64, 3)
    ids, mask = _padded(tokens(1, 4096), (7,))
    with Largest() as largest:
        ours.model(ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
    assert largest.numel < 4096 * 4096 // 3


@pytest.mark.parametrize(
    "options, says",
    [
        ({"sliding_window": 32}, r"MistralConfig.sliding_window=32: MoBA does not serve sliding windows"),
        ({"attention_dropout": 0.1}, r"MistralConfig.attention_dropout=0.1: MoBA does not serve dropout"),
    ],
)
def test_models_that_do_something_else_are_refused_by_name(options, says):
    model = tiny("mistral", **options)
    with pytest.raises(ValueError, match=says):
        use_moba(model, 16, 3)
    model.config.moba = {"block_size": 16, "top_k": 3}
    model.set_attn_implementation("moba")
    with pytest.raises(ValueError, match="MoBA does not serve|does not serve sliding windows"):
        model(tokens(1, 60))


def test_layers_of_other_kinds_are_refused_by_name():
    model = tiny("qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1)
    with pytest.raises(ValueError, match=r"Qwen2Config.layer_types has sliding_attention"):
        use_moba(model, 16, 3)
    config = tiny().config
    config.attn_logit_softcapping = 50.0
    model.config = config
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=50.0: MoBA does not serve soft caps"):
        use_moba(model, 16, 3)


@pytest.mark.parametrize(
    "inputs, says",
    [
        ({"output_attentions": True}, r"output_attentions=True: .* does not serve returning attention weights"),
        ({"attention_mask": torch.ones(1, 1, 60, 60, dtype=torch.bool)}, r"takes no dense mask"),
        ({"attention_mask": torch.tensor([[1] * 20 + [0] * 5 + [1] * 35])}, r"sequence 0 has padding between tokens"),
        ({"softcap": 30.0}, r"softcap=30.0: .* does not serve soft caps"),
        ({"s_aux": torch.zeros(4)}, r"s_aux is \[4\]: .* does not serve attention sinks"),
        ({"is_causal": False}, r"attends in both directions|bidirectional"),
        ({"past_key_values": "static"}, r"use moba_cp.hf.MoBACache or a DynamicCache, not a static"),
    ],
)
def test_what_a_call_asks_for_is_refused_by_name(inputs, says):
    ours, _ = both(layers=1)
    if "past_key_values" in inputs:
        inputs = {"past_key_values": StaticCache(config=ours.config, max_cache_len=100)}
    with pytest.raises(ValueError, match=says):
        ours(tokens(1, 60), **inputs)


@pytest.mark.parametrize(
    "options, says",
    [
        (None, r"config.moba=None, but attn_implementation='moba' needs a block size"),
        ({"block_size": 16}, r"config.moba has the keys block_size; use block_size and top_k"),
        ({"block_size": 16, "top_k": 3, "topk": 3}, r"topk"),
        ({"block_size": 17, "top_k": 3}, r"block_size=17"),
        ({"block_size": 16, "top_k": 3, "score": "median"}, r"score='median' is unknown"),
        ({"block_size": 16, "top_k": 3, "decoding": "sparse"}, r"decoding='sparse'"),
        ({"block_size": 16, "top_k": 3, "full_layers": [5]}, r"names layer 5, but the model has 1 layers"),
    ],
)
def test_wrong_options_are_named(options, says):
    model = tiny(layers=1)
    model.config.moba = options
    model.set_attn_implementation("moba")
    with pytest.raises(ValueError, match=says):
        model(tokens(1, 60))


def test_options_that_change_are_read_again():
    ours, _ = both()
    ids = tokens(1, 90)
    few = ours(ids).logits
    use_moba(ours, 16, 6)
    all_blocks = ours(ids).logits
    assert (few - all_blocks).abs().max() > 1e-3
    close(all_blocks, tiny()(ids).logits)


def test_a_mask_of_the_models_own_is_refused():
    from transformers.masking_utils import create_causal_mask

    ours, _ = both(layers=1)
    x = torch.zeros(1, 60, 32, dtype=torch.float64)
    how = {"attention_mask": None, "past_key_values": None, "and_mask_function": lambda b, h, q, k: q > k}
    name = "inputs_embeds"
    if "input_embeds" in create_causal_mask.__code__.co_varnames:
        name, how["cache_position"] = "input_embeds", torch.arange(60)
    with pytest.raises(ValueError, match="asks for a mask of its own"):
        create_causal_mask(ours.config, **{name: x}, **how)


def test_peft():
    """LoRA on the projections: only its weights get gradients, and they are the reference's."""
    peft = pytest.importorskip("peft")

    ours, plain = both()
    ids = tokens(2, 80)
    results = []
    for model in (ours, plain):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        if model is ours:
            use_moba(wrapped, 16, 3, "last 1")
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {name: x.grad for name, x in wrapped.named_parameters() if x.grad is not None}
        assert grads and all("lora" in name for name in grads)
        results.append((loss.detach(), grads))
    _same(*results)
