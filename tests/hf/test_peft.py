"""LoRA by PEFT on a model of transformers that attends with MoBA: the adapters alone learn."""

import pytest
import torch

from moba_cp.hf import use_moba
from tests.helpers.hf_models import tiny, tokens

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("order", ["moba first", "adapters first"])
def test_adapters_learn_and_merge(order):
    model, ids = tiny("llama"), tokens(2, 90)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    torch.manual_seed(0)
    if order == "moba first":
        model = peft.get_peft_model(use_moba(model, block_size=16, top_k=2), adapters)
    else:
        model = use_moba(peft.get_peft_model(model, adapters), block_size=16, top_k=2)
    frozen = {name: x.clone() for name, x in model.named_parameters() if "lora_" not in name}
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(x, frozen[name]) for name, x in model.named_parameters() if name in frozen)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        merged = model.merge_and_unload()
        assert merged.config.moba["top_k"] == 2
        actual = merged(input_ids=ids, use_cache=False).logits
    assert torch.allclose(actual, expected, atol=1e-5, rtol=1e-5)
