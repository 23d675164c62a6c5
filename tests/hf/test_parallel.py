"""A sequence of a transformers model over several ranks, against one rank."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moba_cp.hf import ContextParallel, MoBACache, use_moba
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import both, close, gradients, tiny, tokens

PADDED, PACKED, PLAIN = "padded", "packed", "plain"


def _batch(case):
    ids = tokens(2, 75)
    labels = ids.clone()
    labels[0, :30] = -100
    batch = {"input_ids": ids, "labels": labels}
    if case == PADDED:
        mask = torch.ones_like(ids)
        mask[0, :20], mask[1, 60:] = 0, 0
        labels[mask == 0] = -100
        labels[0, 20] = -100
        batch["attention_mask"] = mask
    if case == PACKED:
        batch["position_ids"] = torch.cat([torch.arange(30), torch.arange(45)]).expand(2, -1)
        labels[:, 30] = -100
    return batch


def _expected(case):
    model, _ = both()
    out = model(**_batch(case), use_cache=False)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), gradients(model)


def _one_rank(rank, cases):
    return [_one_case(*case) for case in cases]


def _one_case(case, layout, how):
    model, _ = both()
    size = dist.get_world_size()
    if how == "checkpointing":
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    parallel = ContextParallel(model, dist.group.WORLD, layout, "sum" if how == "sum" else "mean")
    wrapped = DistributedDataParallel(parallel) if how == "ddp" else parallel
    out = wrapped(**_batch(case))
    out.loss.backward()
    grads = gradients(model)
    if how == "fsdp":
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
    elif how != "ddp":
        for grad in grads.values():
            dist.all_reduce(grad)
            if how != "sum":
                grad /= size
    return out.loss.detach(), out.context.unshard(out.logits.detach()[0]), grads


@pytest.mark.parametrize(
    "size, cases",
    [
        (2, [(PLAIN, "zigzag", "ddp"), (PACKED, "contiguous", "sum"), (PADDED, "zigzag", "fsdp")]),
        (4, [(PADDED, "zigzag", "checkpointing")]),
    ],
)
def test_ranks_equal_one(size, cases):
    expected = {case: _expected(case) for case, *_ in cases}
    for of_rank in run_ranks(size, _one_rank, cases):
        for (case, *_), (actual, logits, grads) in zip(cases, of_rank, strict=True):
            batch, (loss, whole, wanted) = _batch(case), expected[case]
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
            close(actual, loss)
            close(logits[: len(real)][real], whole.flatten(0, 1)[real])
            for name, grad in wanted.items():
                close(grads[name], grad, 1e-4)


def test_one_rank_without_a_group():
    for case in (PLAIN, PACKED, PADDED):
        loss, _, grads = _expected(case)
        model, _ = both()
        out = ContextParallel(model, None)(**_batch(case))
        out.loss.backward()
        close(out.loss.detach(), loss)
        for name, grad in gradients(model).items():
            close(grad, grads[name], 1e-4)


def test_losses_of_several_batches_are_divided_by_all_their_labels():
    model, _ = both()
    parallel, batch = ContextParallel(model, None), _batch(PLAIN)
    whole = parallel(**batch).loss
    n_items = (batch["labels"][:, 1:] != -100).sum()
    parts = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(2)]
    close(sum(parallel(**part, num_items_in_batch=n_items).loss for part in parts), whole)
    assert parallel(batch["input_ids"]).loss is None


def test_boundaries_of_a_collator_are_those_of_documents():
    """With positions beside them or without: as a model on one rank takes them."""
    model, _ = both()
    ends, batch = (
        torch.tensor([0, 30, 30, 75], dtype=torch.int32),
        {"input_ids": tokens(1, 75), "labels": tokens(1, 75)},
    )
    boundaries = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 45, "max_length_k": 45}
    positions = torch.cat([torch.arange(30), torch.arange(45)])[None]
    for position_ids in (None, positions, torch.arange(75)[None]):
        expected = model(**batch, **boundaries, position_ids=position_ids, use_cache=False)
        out = ContextParallel(model, None)(**batch, **boundaries, position_ids=position_ids)
        logits = out.context.unshard(out.logits[0])[:75]
        close(logits, expected.logits[0])
        close(out.loss, expected.loss)
    assert not torch.allclose(logits, model(**batch, use_cache=False).logits[0], atol=1e-2)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="attends with sdpa, which sees this rank's tokens alone"):
        ContextParallel(tiny(), None)
    model = use_moba(tiny(), 16, 3)
    with pytest.raises(ValueError, match="gradients='average'"):
        ContextParallel(model, None, gradients="average")
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 7\) but input_ids \(1, 9\)"):
        ContextParallel(model, None)(tokens(1, 9), position_ids=torch.arange(7)[None])
    ids, parallel, ends = tokens(2, 9), ContextParallel(model, None), torch.tensor([0, 4, 9])
    for labels in (ids[:, :-1], ids[:1], torch.cat([ids, ids], 1)):
        with pytest.raises(ValueError, match=r"labels has shape .* but input_ids \(2, 9\); they must be equal"):
            parallel(ids, labels=labels)
    for shape in ((9,), (1, 2, 9), (0, 9), (2, 0)):
        with pytest.raises(ValueError, match=r"input_ids has shape .*; pass \[sequences, tokens\]"):
            parallel(torch.ones(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="cu_seq_lens_q with 2 sequences"):
        parallel(ids, cu_seq_lens_q=ends)
    with pytest.raises(ValueError, match=r"cu_seqlens=\[0, 4, 8\] must start at 0"):
        parallel(ids[:1], cu_seq_lens_q=torch.tensor([0, 4, 8]))
    with pytest.raises(ValueError, match="cu_seq_lens_k differs from cu_seq_lens_q"):
        parallel(ids[:1], cu_seq_lens_q=ends, cu_seq_lens_k=ends + 1)
    with torch.no_grad(), pytest.raises(ValueError, match="moba_context beside a MoBACache"):
        parallel(ids, past_key_values=MoBACache(model))
    context = parallel.context(ids[:1])
    with pytest.raises(ValueError, match="cu_seq_lens_q beside moba_context"):
        model(ids[:1], moba_context=context, cu_seq_lens_q=ends, use_cache=False)
