"""The context as programs use it: what it takes, what it keeps, what FSDP and torch.compile do with it, gradients
through shard and unshard."""

import gc
import threading
import tracemalloc
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moba_cp import CPContext, MoBAConfig, full_attention, moba_attention
from moba_cp.cp.comm import Communicator
from moba_cp.cp.context import _default_device
from moba_cp.cp.exchange.strategy import build_exchange_tables
from tests.helpers.cases import relative_error
from tests.helpers.distributed import run_ranks, run_threads


@pytest.fixture
def one_rank():
    """torch.distributed with gloo and this rank alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({}, r"seq_len=None; give the tokens of the whole sequence"),
        ({"layout": 4096}, r"layout=4096 is not one of contiguous, zigzag"),
        ({"seq_len": 12.0}, r"seq_len=12.0 is not an integer"),
        ({"seq_len": "12"}, r"seq_len='12' is not an integer"),
        ({"seq_len": -12}, r"seq_len=-12 is not positive"),
        ({"cu_seqlens": [0, 5]}, r"cu_seqlens=\[0, 5\] must start at 0"),
        ({"cu_seqlens": [0.0, 12.0]}, r"cu_seqlens has shape \(2,\) and dtype torch.float32"),
        ({"cu_seqlens": [[0, 5], [12]]}, r"cu_seqlens is a list that holds no integers to be read"),
        ({"cu_seqlens": torch.tensor([0, 12], device="meta")}, r"cu_seqlens is a Tensor that holds no integers"),
        ({"device": "gpu"}, r"device='gpu' is no device"),
        ({"exchange": "ring"}, r"exchange mode='ring' is not one of auto"),
        ({"exchange": None}, r"exchange=None is neither ExchangeOptions nor the name of a mode"),
        ({"observer": 1}, r"observer=1 cannot be called"),
        ({"group": "nccl"}, r"group='nccl' is not a process group, a DeviceMesh of one dimension, or None"),
        ({"group": dist.GroupMember.NON_GROUP_MEMBER}, r"group is one that this rank is not in"),
    ],
)
def test_an_argument_of_another_kind_is_named(arguments, says):
    arguments = {"group": None, "seq_len": 12 if arguments else None} | arguments
    with pytest.raises(ValueError, match=says) as caught:
        CPContext(**arguments)
    assert "\n" not in str(caught.value)


def test_documents_are_the_contexts_own():
    bounds = torch.tensor([0, 4, 12])
    for given in (bounds, bounds.numpy(), bounds.tolist(), tuple(bounds.tolist())):
        assert CPContext(None, seq_len=12, cu_seqlens=given).cu_seqlens.tolist() == [0, 4, 12]
    cp = CPContext(None, seq_len=12, cu_seqlens=bounds)
    # As where the next batch is read into the same memory, before the first call makes the tables.
    bounds[1] = 8
    assert cp.cu_seqlens.tolist() == [0, 4, 12] and cp.geometry(4).first.tolist() == [0] * 4 + [1] * 8
    with pytest.raises(AttributeError, match="CPContext.seq_len cannot be set"):
        cp.seq_len = 24


def test_a_context_made_in_inference_mode_trains():
    x = torch.randn(12, requires_grad=True)
    with torch.inference_mode():
        cp = CPContext(None, seq_len=12)
        cp.unshard(cp.shard(x))
    cp.unshard(cp.shard(x)).sum().backward()
    assert x.grad.all() and not cp.document_positions.is_inference()


def test_what_is_no_context_or_no_share_is_named():
    q = torch.randn(32, 1, 8)
    for attend in (partial(moba_attention, q, q, q, MoBAConfig(16, 2)), partial(full_attention, q, q, q)):
        with pytest.raises(ValueError, match=r"cp is a str; pass CPContext\(group, layout, seq_len=...\)"):
            attend(cp="zigzag")
        with pytest.raises(ValueError, match="q has 32 tokens but rank 0 of 1 holds 64 of seq_len=64"):
            attend(cp=CPContext(None, seq_len=64))
    cp = CPContext(None, seq_len=32)
    with pytest.raises(ValueError, match="dim=3 is not a dimension of x, whose shape is"):
        cp.shard(q, dim=3)
    with pytest.raises(ValueError, match="dimension 1 of x has length 1, not local_len=32"):
        cp.unshard(q, dim=1)


@pytest.mark.parametrize(
    "backend, device",
    [
        ("cuda:nccl", "cuda"),  # init_process_group("nccl"), and without a name on a machine with GPUs
        ("cpu:gloo,cuda:nccl", "cuda"),
        ("cuda:nccl,cpu:gloo", "cuda"),
        ("cpu:gloo", "cpu"),
        ("cpu:gloo,cuda:gloo,mps:gloo", "cpu"),  # init_process_group("gloo")
        ("cpu:mpi,cuda:mpi", "cpu"),
    ],
)
def test_tables_are_where_the_group_moves_tensors(monkeypatch, one_rank, backend, device):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _default_device(dist.group.WORLD) == torch.device(device, 3 if device == "cuda" else None)
    # A mesh knows better than its groups, which may serve both.
    assert _default_device(dist.group.WORLD, "cpu") == torch.device("cpu")


def _loss(x, weights, attend, shard, unshard, size):
    """Weights before the sequence is spread, on its shares, and behind; losses of the shares and of the whole."""
    before, within, behind = weights
    local = shard(x @ before)
    q, k, v = (local @ within).unflatten(1, (3, 2, 4)).unbind(1)
    local = local + attend(q, k, v).flatten(1)
    whole = unshard(local) @ behind
    return local.square().sum() + (whole.sin() * torch.arange(1.0, len(whole) + 1)[:, None]).sum() / size


def _leaves():
    generator = torch.Generator().manual_seed(7)
    shapes = (96, 6), (6, 8), (8, 24), (8, 3)
    x, *weights = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)
    return x, weights


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_per_document"])
def test_gradients_through_shard_and_unshard_add_up_to_those_of_one_rank(layout):
    documents, config = torch.tensor([0, 48, 96], dtype=torch.int32), MoBAConfig(16, 2)

    def across(comm):
        x, weights = _leaves()
        cp = CPContext(comm, layout, 96, documents)
        loss = _loss(x, weights, lambda *qkv: moba_attention(*qkv, config, cp=cp), cp.shard, cp.unshard, cp.size)
        loss.backward()
        mine = torch.zeros(96, dtype=torch.bool)
        mine[cp.positions] = True
        # Other ranks' rows of x are theirs to say.
        assert not x.grad[~mine].any() and x.grad[mine].all()
        return [loss.detach(), *(leaf.grad for leaf in (x, *weights))]

    x, weights = _leaves()
    same = lambda whole: whole
    loss = _loss(x, weights, lambda *qkv: moba_attention(*qkv, config, cu_seqlens=documents), same, same, 1)
    loss.backward()
    results = run_threads(3 if layout == "contiguous" else 4, across)
    for name, expected, *parts in zip(
        ("loss", "x", "before", "within", "behind"),
        [loss.detach(), *(leaf.grad for leaf in (x, *weights))],
        *results,
        strict=True,
    ):
        assert relative_error(sum(parts), expected) < 1e-12, name


def test_shard_and_unshard_differentiate_in_any_dimension_and_twice():
    whole = torch.randn(2, 12, 3, dtype=torch.float64)

    def across(comm):
        cp = CPContext(comm, "zigzag", 12)
        x = whole.index_select(1, cp.positions).requires_grad_()
        y = cp.unshard(x, dim=-2)
        assert torch.equal(y, whole)
        (slope,) = torch.autograd.grad((y**3).sum() / cp.size, x, create_graph=True)
        slope.square().sum().backward()
        again = cp.shard(cp.unshard(cp.shard(whole.clone().requires_grad_(), dim=1), dim=1), dim=1)
        assert again.requires_grad and torch.equal(again, x)
        with torch.no_grad():
            assert not cp.shard(y, dim=1).requires_grad and not cp.unshard(x, dim=1).requires_grad
        return relative_error(slope, 3 * x**2), relative_error(x.grad, 36 * x**3)

    assert max(max(errors) for errors in run_threads(3, across)) < 1e-12


class _Event:
    """Of a collective that is through."""

    def query(self):
        return True


def _use(cp: CPContext, watched: bool = True):
    """What a batch makes a context do: tables of both kinds of attention, and a collective that is watched."""
    q = torch.randn(cp.local_len, 2, 8, requires_grad=True)
    moba_attention(q, q, q, MoBAConfig(16, 2), cp=cp).sum().backward()
    build_exchange_tables(cp, 16, 1, q)
    full_attention(q, q, q, cp=cp).sum().backward()
    cp.unshard(cp.shard(torch.randn(cp.seq_len)))
    if watched:
        cp.comm._watch(_Event(), "a collective")


def test_a_thousand_contexts_leave_nothing_behind(one_rank):
    # What is imported at the first call keeps a frame until the collector comes.
    _use(CPContext(Communicator(None), "zigzag", 32), watched=False)
    before = set(threading.enumerate())
    group = dist.new_group([0])
    sizes = []
    tracemalloc.start()
    gc.disable()
    try:
        for number in range(1000):
            cp = CPContext(group, "zigzag", 32)
            if number % 20 == 0:
                _use(cp)
            else:
                cp.geometry(16)
                cp.comm._watch(_Event(), "a collective")
            parts = [weakref.ref(part) for part in (cp, cp.comm, cp.geometry(16), cp.positions)]
            # Without the garbage collector: memory of a batch goes with the batch.
            del cp
            assert not any(part() is not None for part in parts)
            if number in (199, 999):
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        gc.enable()
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 256 << 10, f"{sizes} bytes after 200 and 1000 contexts"
    (watching,) = set(threading.enumerate()) - before
    # What is the group's ends with the group.
    dist.destroy_process_group(group)
    del group
    gc.collect()
    watching.join(10)
    assert not watching.is_alive()


def test_one_monitor_and_one_stream_for_each_group(one_rank):
    first, second = (dist.new_group([0]) for _ in range(2))
    beside = [Communicator(group)._state for group in (first, first, second, second)]
    assert beside[0] is beside[1] is not beside[2] is beside[3]
    assert beside[0].side is not beside[2].side


class _Layer(torch.nn.Module):
    """Attention that is told the context of its batch."""

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(16, 48, bias=False)
        self.seen = []

    def forward(self, x, *args, **kwargs):
        cp = args[0] if args else kwargs["cp"] if "cp" in kwargs else kwargs["batch"]["cp"]
        self.seen.append(cp)
        q, k, v = self.projection(x).unflatten(1, (3, 2, 8)).unbind(1)
        return moba_attention(q, k, v, MoBAConfig(16, 2), cp=cp).flatten(1)


def _under_fsdp(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "cp"))
    torch.manual_seed(0)
    plain, model = _Layer().bfloat16(), _Layer()
    model.load_state_dict(plain.state_dict())
    fully_shard(model, mesh=mesh["cp"], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    cp = CPContext(mesh["cp"], "zigzag", 64)
    assert cp.group is mesh.get_group("cp") and (cp.rank, cp.size, cp.device.type) == (rank, 2, "cpu")
    with pytest.raises(ValueError, match=r"DeviceMesh of 2 dimensions, \('data', 'cp'\); pass .* mesh\[\"cp\"\]"):
        CPContext(mesh, "zigzag", 64)
    with pytest.raises(ValueError, match=r"group=None is one rank, but torch.distributed has 2; pass the group whose"):
        CPContext(None, "zigzag", 64)
    alone = dist.new_group([1])
    if rank == 0:
        with pytest.raises(ValueError, match="this rank is not in"):
            CPContext(alone, "zigzag", 64)
    x = cp.shard(torch.randn(64, 16))
    expected = plain(x.bfloat16(), cp)
    expected.float().square().sum().backward()
    for args, kwargs in (((cp,), {}), ((), {"cp": cp}), ((), {"batch": {"cp": cp}})):
        model.zero_grad()
        out = model(x, *args, **kwargs)
        out.float().square().sum().backward()
        assert model.seen[-1] is cp and torch.equal(out, expected)
        # FSDP averages over the ranks.
        dist.all_reduce(want := plain.projection.weight.grad.float())
        assert relative_error(model.projection.weight.grad.full_tensor(), want / 2) < 2e-2


def test_a_context_goes_through_fsdps_mixed_precision():
    run_ranks(2, _under_fsdp)


def _compiled(rank):
    from torch._dynamo.testing import CompileCounterWithBackend

    def model(x, weight, cp, attend):
        q, k, v = (x @ weight).unflatten(1, (3, 2, 8)).unbind(1)
        return attend(q, k, v, cp).flatten(1).sin() * 2

    def moba(q, k, v, cp):
        return moba_attention(q, k, v, MoBAConfig(16, 2), cp=cp)

    def full(q, k, v, cp):
        return full_attention(q, k, v, cp=cp)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 48, generator=generator, dtype=torch.float64, requires_grad=True)
    frames = []
    for attend, lengths in ((moba, (64, 128, 96, 64)), (full, (64, 96))):
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("aot_eager" if attend is moba else "eager")
        for length in lengths:
            # As in training, a context for every batch.
            cp = CPContext(dist.group.WORLD, "zigzag", length)
            x = cp.shard(torch.randn(length, 8, generator=generator, dtype=torch.float64)).requires_grad_()
            results = []
            for run in (model, torch.compile(model, backend=graphs)):
                out = run(x, weight, cp, attend)
                results.append([out, *torch.autograd.grad(out.square().sum(), (x, weight))])
            for actual, expected in zip(*results, strict=True):
                assert relative_error(actual, expected) < 1e-12, (attend.__name__, length)
            frames.append(graphs.frame_count)
    return frames


@pytest.mark.timeout(300)
def test_compiled_with_one_break_whatever_the_length():
    """Graphs that were compiled: one before the exchange and one behind it; again, once, for lengths that vary."""
    for first, second, third, fourth, full, full_again in run_ranks(2, _compiled, timeout=300):
        assert first == full == 2
        assert second == third == fourth <= 6 and full_again <= 6
