"""The context that is kept with Megatron's packed sequences is that of their present boundaries, and of no others."""

import copy
import pickle

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from moba_cp.cp.options import ExchangeOptions
from moba_cp.megatron import batch
from moba_cp.megatron.batch import batch_context

CPU = torch.device("cpu")


def params(*bounds, padded=None):
    bounds = torch.tensor(bounds, dtype=torch.int32)
    padded = None if padded is None else torch.tensor(padded, dtype=torch.int32)
    return PackedSeqParams("thd", bounds, bounds, padded, padded)


def documents(packed, n_tokens=32):
    """The boundaries that attention and rotary positions go by."""
    context = batch_context(packed, n_tokens, None, "zigzag", CPU)
    starts = context.document_positions.eq(0).nonzero().flatten().tolist()
    assert context.cu_seqlens.tolist() == [*starts, n_tokens]
    return context.cu_seqlens.tolist()


def _in_place(packed):
    packed.cu_seqlens_q[1] = 20
    return packed


def _in_place_unseen_by_pytorch(packed):
    packed.cu_seqlens_q.data.numpy()[1] = 20
    return packed


def _other_tensor(packed):
    packed.cu_seqlens_q = packed.cu_seqlens_kv = torch.tensor([0, 20, 32])
    return packed


def _other_storage(packed):
    packed.cu_seqlens_q.data = torch.tensor([0, 20, 32], dtype=torch.int32)
    return packed


def _copy(packed):
    packed = copy.copy(packed)
    return _other_tensor(packed)


def _copied_contents(packed):
    return _in_place(copy.deepcopy(packed))


def _padded(packed):
    packed.cu_seqlens_q_padded = torch.tensor([0, 20, 32])
    return packed


CHANGES = [_in_place, _in_place_unseen_by_pytorch, _other_tensor, _other_storage, _copy, _copied_contents, _padded]


@pytest.mark.parametrize("change", CHANGES)
def test_new_boundaries_are_seen(change):
    packed = params(0, 12, 32)
    assert documents(packed) == [0, 12, 32]
    packed = change(packed)
    assert documents(packed) == [0, 20, 32]
    assert documents(packed) == [0, 20, 32]


def test_a_change_that_makes_queries_and_keys_differ_is_refused():
    packed = params(0, 12, 32)
    packed.cu_seqlens_kv = packed.cu_seqlens_q.clone()
    documents(packed)
    packed.cu_seqlens_kv[1] = 13
    with pytest.raises(ValueError, match="packed_seq_params.cu_seqlens_kv differs from cu_seqlens_q"):
        documents(packed)


def test_all_else_that_a_context_depends_on_is_seen():
    packed = params(0, 12, 32)
    one = batch_context(packed, 32, None, "zigzag", CPU, ExchangeOptions("kv"))
    assert batch_context(packed, 32, None, "zigzag", CPU, ExchangeOptions("query")).exchange.mode == "query"
    assert batch_context(packed, 32, None, "zigzag", CPU, ExchangeOptions("kv")) is one
    with pytest.raises(ValueError, match="cu_seqlens"):
        batch_context(packed, 30, None, "zigzag", CPU)


def test_layers_of_a_batch_share_a_context_and_equal_batches_do():
    packed = params(0, 12, 32)
    contexts = {id(batch_context(packed, 32, None, "zigzag", CPU)) for _ in range(3)}
    contexts.add(id(batch_context(params(0, 12, 32), 32, None, "zigzag", CPU)))
    assert len(contexts) == 1


def test_what_is_kept_is_bounded():
    batches = [params(0, n, 32) for n in range(1, 20)]
    for packed in batches:
        documents(packed)
    assert batch._context_of_documents.cache_info().currsize <= batch._context_of_documents.cache_info().maxsize <= 4


def test_on_a_gpu_the_host_reads_the_boundaries_once_for_a_batch(monkeypatch):
    """Stand-ins for tensors of a GPU: what the host reads is counted."""
    reads = []

    class OnGPU(torch.Tensor):
        is_cpu = property(lambda self: False)

        def tolist(self):
            reads.append(1)
            return super().tolist()

    packed = params(0, 12, 32)
    packed.cu_seqlens_q = packed.cu_seqlens_kv = packed.cu_seqlens_q.as_subclass(OnGPU)
    for _ in range(5):
        assert documents(packed) == [0, 12, 32]
    assert len(reads) == 1
    packed.cu_seqlens_q[1] = 20
    for _ in range(5):
        assert documents(packed) == [0, 20, 32]
    assert len(reads) == 2
    packed.cu_seqlens_q = packed.cu_seqlens_kv = torch.tensor([0, 9, 32]).as_subclass(OnGPU)
    assert documents(packed) == [0, 9, 32] and len(reads) == 3


@pytest.mark.gpu
def test_boundaries_on_a_gpu():
    device = torch.device("cuda", 0)
    bounds = torch.tensor([0, 12, 32], dtype=torch.int32, device=device)
    packed = PackedSeqParams("thd", bounds, bounds)

    def call():
        return batch_context(packed, 32, None, "zigzag", device)

    assert call().cu_seqlens.tolist() == [0, 12, 32]
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert call() is first
    bounds.copy_(torch.tensor([0, 20, 32]))
    assert call().cu_seqlens.tolist() == [0, 20, 32]
    with torch.inference_mode():
        packed = PackedSeqParams("thd", bounds.clone(), None)
        assert call().cu_seqlens.tolist() == [0, 20, 32]
        packed.cu_seqlens_q[1] = 7
        assert call().cu_seqlens.tolist() == [0, 7, 32]


def test_a_batch_can_be_copied_and_pickled_after_use():
    packed = params(0, 12, 32)
    documents(packed)
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert documents(again) == [0, 12, 32]


@pytest.mark.parametrize(
    "bounds, message",
    [([0, 32], "cu_seqlens_q has type list; pass a tensor"), (torch.tensor([[0, 32]]), "cu_seqlens_q has shape")],
)
def test_boundaries_of_another_kind_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        documents(PackedSeqParams("thd", bounds))


def test_a_group_of_the_batchs_own_is_refused():
    packed = params(0, 12, 32)
    packed.cp_group = object()
    with pytest.raises(ValueError, match="packed_seq_params.cp_group is not the layer's context-parallel group"):
        documents(packed)
