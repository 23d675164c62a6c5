"""The model on a GPU: the same numbers as on the CPU, FSDP2 from the meta device, and memory."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from moba_cp import CPContext
from moba_cp.megatron import AttentionConfig, ModelConfig, build_model
from moba_cp.model.loss import linear_cross_entropy

pytestmark = pytest.mark.gpu

T = 1000
MODEL = ModelConfig(vocab_size=61, n_layers=3, hidden_size=128, n_heads=4, n_kv_heads=2, init_std=0.1)
SPARSE = AttentionConfig(block_size=32, top_k=3, full_layers="last 1")
BOUNDS = torch.tensor([0, 300, 301, T])
TOKENS = torch.randint(MODEL.vocab_size, (T,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _nccl():
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))


def loss_and_grads(model, device):
    context = CPContext(None, layout="contiguous", seq_len=T, cu_seqlens=BOUNDS, device=device)
    tokens = TOKENS.to(device)
    loss = model(tokens, tokens.roll(-1), context)
    loss.mean().backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def errors(got, exact):
    return [((x.full_tensor() if hasattr(x, "full_tensor") else x).cpu().double() - y).abs().mean().item()
            for x, y in zip(got, exact, strict=True)]  # fmt: skip


@pytest.fixture(scope="module")
def exact():
    return loss_and_grads(build_model(MODEL, SPARSE, dtype=torch.float64), "cpu")


def test_float64_equals_the_cpu(exact):
    got = loss_and_grads(build_model(MODEL, SPARSE, dtype=torch.float64, device="cuda"), "cuda")
    # Rotary angles are float32 on both.
    assert max(errors(got, exact)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_those_of_the_cpu(exact, dtype):
    ours = errors(loss_and_grads(build_model(MODEL, SPARSE, dtype=dtype, device="cuda"), "cuda"), exact)
    plain = errors(loss_and_grads(build_model(MODEL, SPARSE, dtype=dtype), "cpu"), exact)
    assert ours[0] <= 2 * plain[0] + 1e-5
    assert all(mine <= 3 * theirs + 1e-5 for mine, theirs in zip(ours[1:], plain[1:]))


def test_fsdp2_from_the_meta_device(exact):
    mesh = init_device_mesh("cuda", (1,))
    model = build_model(MODEL, SPARSE, device="meta")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cuda")
    model.init_weights()
    ours = errors(loss_and_grads(model, "cuda"), exact)
    plain = errors(loss_and_grads(build_model(MODEL, SPARSE, dtype=torch.bfloat16), "cpu"), exact)
    assert ours[0] <= 2 * plain[0] + 1e-5
    assert all(mine <= 3 * theirs + 1e-5 for mine, theirs in zip(ours[1:], plain[1:]))


def test_loss_takes_the_memory_of_a_slice():
    n_tokens, hidden, vocab = 65536, 256, 65536
    x = torch.randn(n_tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab, (n_tokens,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, weight, labels).mean().backward()
    # A slice of 1 GiB and what is computed of it, where float32 logits would take 16 GiB.
    assert torch.cuda.max_memory_allocated() - before < 3 * 2**30


def test_what_a_layer_recomputed_ends_with_it():
    def step(n_layers):
        """(peak, what stays, gradients) of one step, in bytes."""
        shape = dict(vocab_size=61, hidden_size=256, n_heads=4, n_kv_heads=2, recompute="full")
        model = build_model(ModelConfig(n_layers=n_layers, **shape), SPARSE, dtype=torch.bfloat16, device="cuda")
        tokens = torch.randint(61, (16384,), device="cuda")
        context = CPContext(None, layout="contiguous", seq_len=16384, device="cuda")
        model(tokens[:64], tokens[:64]).sum().backward()
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(tokens, tokens.roll(-1), context).sum().backward()
        torch.cuda.synchronize()
        peak, left = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return peak - before, left - before, sum(2 * p.numel() for p in model.parameters())

    (peak, left, gradients), (higher, left_of_nine, more_gradients) = step(3), step(9)
    hidden = 2 * 16384 * 256
    assert left < gradients + hidden and left_of_nine < more_gradients + hidden
    # Six more layers: six more inputs that wait for backward, and six layers' gradients.
    assert higher - peak <= more_gradients - gradients + 6 * hidden + hidden
