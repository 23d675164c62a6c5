"""moba_attention and full_attention on one device against the reference."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moba_cp
from moba_cp import CPContext, MoBAConfig, autograd, full_attention, moba_attention, reference
from moba_cp.blocks import block_table
from moba_cp.eager.select import _scores as eager_scores
from moba_cp.ops import backend
from tests.helpers.cases import (
    GOLDEN,
    Case,
    Largest,
    compile_and_compare,
    golden,
    random_case,
    relative_error,
    run,
    run_reference,
)

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NAMES = ("out", "dq", "dk", "dv", "lse")


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def _moba(case: Case):
    return run(moba_attention, case, MoBAConfig(case.block_size, case.top_k), cu_seqlens=case.cu_seqlens)


def _selection(case: Case):
    table = block_table(case.q.shape[0], case.block_size, case.cu_seqlens, case.q.device)
    means = backend(case.k).block_means(case.k, table.start, table.length, table.block_size)
    return backend(case.q).select_blocks(case.q, means, table.first, table.current_block, case.top_k)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path):
    case = golden(path)
    for name, actual, expected in zip(NAMES, _moba(case), case.expected):
        assert relative_error(actual, expected) < 1e-5, name
    expected = reference.select_blocks(case.q, case.k, case.block_size, case.top_k, case.cu_seqlens)
    assert torch.equal(_selection(case), expected.int())


@pytest.mark.parametrize("seed", range(12))
def test_random_float64(seed):
    case = random_case(seed)
    expected = reference.select_blocks(case.q, case.k, case.block_size, case.top_k, case.cu_seqlens)
    assert torch.equal(_selection(case), expected.int())
    for name, actual, expected in zip(NAMES, _moba(case), run_reference(case)):
        assert relative_error(actual, expected) < 1e-12, name
    full = run(full_attention, case, cu_seqlens=case.cu_seqlens)
    for name, actual, expected in zip(NAMES, full, run_reference(case, full=True)):
        assert relative_error(actual, expected) < 1e-12, f"full {name}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_plain_torch(dtype):
    case = random_case(5).to(dtype)
    chosen = reference.select_blocks(case.q, case.k, case.block_size, case.top_k, case.cu_seqlens)
    assert torch.equal(_selection(case), chosen.int())
    exact, plain, ours = run_reference(case.to(torch.float64), chosen=chosen), run_reference(case), _moba(case)
    for name, x, y, z, factor in zip(NAMES, ours, plain, exact, (2, 3, 3, 3, 2)):
        error = lambda a: (a.double() - z).abs().max().item()
        assert error(x) <= factor * error(y) + 1e-5, name


def test_ties_and_special_scores_rank_as_in_the_reference():
    torch.manual_seed(0)
    q, k = (torch.randint(-1, 2, (200, 2, 4)).double() for _ in range(2))
    k[17], k[40, 0], q[150, 1, 2] = torch.nan, torch.inf, -torch.inf
    case = Case(q, k, k, q, torch.tensor([0, 60, 200], dtype=torch.int32), 16, 4)
    expected = reference.select_blocks(q, k, 16, 4, case.cu_seqlens)
    assert torch.equal(_selection(case), expected.int())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens, dim", [(300, 7), (173, 64), (97, 40)])
def test_equal_keys_tie(dtype, n_tokens, dim):
    """Blocks of equal keys: the newest win, whatever the rounding of a score."""
    g = torch.Generator().manual_seed(dim)
    q = torch.randn(n_tokens, 4, dim, generator=g, dtype=torch.float64).to(dtype)
    k = torch.randn(1, 2, dim, generator=g, dtype=torch.float64).expand(n_tokens, -1, -1).to(dtype)
    newest = (torch.arange(n_tokens) // 16)[:, None] - torch.arange(1, 5)
    expected = newest.clamp(min=-1)[:, None].expand(-1, 4, -1)
    assert torch.equal(reference.select_blocks(q, k, 16, 5), expected)
    assert torch.equal(_selection(Case(q, k, k, q, None, 16, 5)), expected.int())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [6, 64])
def test_a_score_depends_on_its_row_and_its_block_alone(dtype, dim):
    g = torch.Generator().manual_seed(dim)
    q, means = (torch.randn(2, n, dim, generator=g, dtype=torch.float64).to(dtype) for n in (90, 70))
    # Sums that cancel: their last bits are all there is.
    q[:, ::3, dim // 2 :], means[:, ::2, dim // 2 :] = -q[:, ::3, : dim // 2], means[:, ::2, : dim // 2]
    whole = eager_scores(q, means)
    exact = torch.matmul(q.double(), means.double().transpose(1, 2))
    bound = (
        torch.finfo(whole.dtype).eps * dim * (q.double().norm(dim=-1)[..., None] * means.double().norm(dim=-1)[:, None])
    )
    assert ((whole.double() - exact).abs() <= bound).all()
    for rows, blocks in ((slice(0, 1), slice(0, 1)), (slice(5, 90), slice(69, 70)), (slice(17, 18), slice(3, 70))):
        assert torch.equal(eager_scores(q[:, rows], means[:, blocks]), whole[:, rows, blocks])
    for row in (0, 3, 50):
        assert torch.equal(reference._dot(q[0, row, None], means[0]).to(whole.dtype), whole[0, row, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_on_two_threads(dtype, two_threads):
    """A hot block, whose keys get gradients from many tasks."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1024, heads, 64) for heads in (4, 1, 1, 4))
    k[:64] += 2 * q.mean((0, 1))
    case = Case(q, k, v, dout, None, 64, 3).to(dtype)
    first, *others = (run(moba_attention, case, MoBAConfig(64, 3, deterministic=True)) for _ in range(4))
    for results in others:
        for name, actual, expected in zip(NAMES, results, first):
            assert torch.equal(actual, expected), name


def test_no_sum_in_the_order_of_threads():
    """Of floating point: integers add up to the same in any order."""

    class Sums(TorchDispatchMode):
        seen = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name.startswith(("index_add", "scatter_add", "scatter_reduce", "index_reduce")) or (
                "index_put" in name and len(args) > 3 and args[3]
            ):
                self.seen.add((name, args[0].dtype.is_floating_point))
            return function(*args, **(kwargs or {}))

    case = random_case(3, dtype=torch.float32)
    with Sums() as sums:
        _moba(case)
        run(full_attention, case, cu_seqlens=case.cu_seqlens)
    assert not [name for name, floating in sums.seen if floating]


def test_nan_stays_in_its_document_and_head():
    q, k, v, dout = (torch.randn(120, 4, 8) for _ in range(4))
    k, v = k[:, :2], v[:, :2]
    cu = torch.tensor([0, 50, 120], dtype=torch.int32)
    k[10, 0], v[70, 1] = torch.nan, torch.inf
    out, dq, dk, dv, lse = run(moba_attention, Case(q, k, v, dout, cu, 16, 3), MoBAConfig(16, 3), cu_seqlens=cu)
    assert out[:50, :2].isnan().any() and not out[70:, 2:].isfinite().all()
    for clean in (out[:50, 2:], out[50:, :2], dq[:50, 2:], dq[50:, :2], dk[:50, 1], dk[50:, 0], dv[:50, 1], dv[50:, 0]):
        assert clean.isfinite().all()


def test_non_contiguous_inputs():
    q, k, v = (torch.randn(2, 8, 90, dtype=torch.float64).permute(2, 0, 1) for _ in range(3))
    assert not q.is_contiguous()
    expected = reference.moba_attention(q, k, v, 16, 3)
    torch.testing.assert_close(moba_attention(q, k, v, MoBAConfig(16, 3)), expected)
    torch.testing.assert_close(full_attention(q, k, v), reference.full_attention(q, k, v))


def test_softmax_scale():
    q, k, v = torch.randn(3, 90, 2, 8, dtype=torch.float64)
    expected = reference.moba_attention(q, k, v, 16, 3, softmax_scale=0.1)
    torch.testing.assert_close(moba_attention(q, k, v, MoBAConfig(16, 3), softmax_scale=0.1), expected)


def test_nothing_of_size_tokens_squared():
    n = 8192
    q, k, v = (torch.randn(n, 1, 8, requires_grad=True) for _ in range(3))
    for attention in (lambda: moba_attention(q, k, v, MoBAConfig(64, 3)), lambda: full_attention(q, k, v)):
        with Largest() as largest:
            attention().sum().backward()
        assert largest.numel < n * n // 3


def _good():
    return dict(q=torch.randn(32, 4, 8), k=torch.randn(32, 2, 8), v=torch.randn(32, 2, 8))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(q=torch.randn(32, 8)), r"q has shape \(32, 8\)"),
        (dict(q=torch.randn(32, 3, 8)), r"q has 3 heads, not a positive multiple of the 2"),
        (dict(q=torch.randn(33, 4, 8)), r"q has 33 tokens but k has 32; queries are the last tokens"),
        (dict(q=torch.randn(32, 4, 9)), r"head_dim must be equal"),
        (dict(v=torch.randn(32, 2, 16)), r"k has shape .* but v has"),
        (dict(v=torch.randn(32, 2, 8).double()), r"dtypes torch.float32, torch.float32, torch.float64"),
        (dict(k=torch.ones(32, 2, 8, dtype=torch.int64)), r"k has shape .* dtype torch.int64"),
        (dict(softmax_scale=float("nan")), r"softmax_scale=nan"),
        (dict(cu_seqlens=torch.tensor([0, 31])), r"cu_seqlens=\[0, 31\] must start at 0"),
        (dict(cu_seqlens=torch.tensor([0, 20, 10, 32])), r"never decrease"),
        (dict(cu_seqlens=torch.tensor([0.0, 32.0])), r"dtype torch.float32"),
        (dict(cu_seqlens=[0, 32]), r"cu_seqlens is a list; pass a 1-D int32 tensor"),
        (dict(cu_seqlens=np.array([0, 32])), r"cu_seqlens is a ndarray; pass a 1-D int32 tensor"),
        (dict(cu_seqlens=torch.tensor([0, 32], device="meta")), r"cu_seqlens is on the meta device and has no values"),
        (dict(q=[1.0]), r"q is a list; pass a tensor"),
        (dict(q=torch.randn(2, 16, 4, 8)), r"q has shape \(2, 16, 4, 8\) .* have a batch dimension, or none of them"),
        (dict(k=torch.randn(32, 2, 8).to(torch.float8_e4m3fn)), r"k has shape .* dtype torch.float8_e4m3fn"),
        (dict(v=torch.randn(32, 2, 8, device="meta")), r"q, k, v are on cpu, cpu, meta"),
        (dict(cp="zigzag"), r"cp is a str; pass CPContext"),
    ],
)
def test_bad_inputs_are_named(change, says):
    kwargs = _good() | change
    with pytest.raises(ValueError, match=says):
        moba_attention(config=MoBAConfig(16, 2), **kwargs)
    with pytest.raises(ValueError, match=says):
        full_attention(**kwargs)


def test_config_must_be_a_config():
    with pytest.raises(ValueError, match="pass MoBAConfig"):
        moba_attention(**_good(), config=512)


ATTENTION = {
    "moba": lambda *x, **how: moba_attention(*x, MoBAConfig(16, 3, deterministic=True), **how),
    "full": lambda *x, **how: full_attention(*x, deterministic=True, **how),
    "reference": lambda *x: reference.moba_attention(*x, 16, 3),
}


def _gradients(attention, leaves, dout, **how):
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = attention(*leaves, **how)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("name", ["moba", "full"])
@pytest.mark.parametrize("context", [False, True], ids=["", "cp"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_autocast_casts_inputs_and_nothing_inside(name, context, device):
    """Under autocast, backward included, the results are those of inputs cast by hand, bit for bit."""
    how = {"cp": CPContext(None, "zigzag", 96, device=device)} if context else {}
    q, k, v, dout = (torch.randn(96, h, 8, device=device) for h in (2, 1, 1, 2))
    dtypes = torch.float32, torch.float16, torch.bfloat16
    mixed = [x.to(dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)]
    expected = _gradients(ATTENTION[name], [x.bfloat16() for x in mixed], dout, **how)
    with torch.autocast(device, torch.bfloat16):
        actual = _gradients(ATTENTION[name], mixed, dout, **how)
        wide = _gradients(ATTENTION[name], [x.double() for x in mixed], dout, **how)
    assert [x.dtype for x in actual] == [torch.bfloat16, *dtypes]
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y.to(x.dtype))
    plain = _gradients(ATTENTION[name], [x.double() for x in mixed], dout, **how)
    for x, y in zip(wide, plain, strict=True):
        assert torch.equal(x, y)


def test_autocast_does_not_reach_the_reference():
    inputs, dout = [torch.randn(96, h, 8) for h in (2, 1, 1)], torch.randn(96, 2, 8)
    expected = _gradients(ATTENTION["reference"], inputs, dout)
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(_gradients(ATTENTION["reference"], inputs, dout), expected, strict=True):
            assert torch.equal(x, y)


def test_autocast_of_the_caller_of_backward_does_not_matter():
    inputs, dout = [torch.randn(96, h, 8) for h in (2, 1, 1)], torch.randn(96, 2, 8)
    for name, attention in ATTENTION.items():
        expected = _gradients(attention, inputs, dout)
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attention(*leaves)
        with torch.autocast("cpu", torch.bfloat16):
            out.backward(dout)
        for x, y in zip(leaves, expected[1:], strict=True):
            assert torch.equal(x.grad, y), name


@pytest.mark.parametrize("name", ["moba", "full"])
@pytest.mark.parametrize("context", [False, True], ids=["", "cp"])
def test_second_derivatives_and_forward_mode_are_refused(name, context):
    how = {"cp": CPContext(None, "zigzag", 64)} if context else {}
    q, k, v = (torch.randn(64, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    attention = ATTENTION[name]
    (grad,) = torch.autograd.grad(attention(q, k, v, **how).square().sum(), q, create_graph=True)
    for wanted in (q, k):
        with pytest.raises(RuntimeError, match="second derivatives of moba_cp's functions are not implemented"):
            torch.autograd.grad(grad.square().sum(), wanted, retain_graph=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="k has a tangent, but forward-mode"):
        attention(q, torch.autograd.forward_ad.make_dual(k.detach(), torch.ones_like(k)), v, **how)
    with pytest.raises(ValueError, match="q has a tangent"):
        torch.func.jvp(lambda x: attention(x, k, v, **how), (q.detach(),), (torch.ones_like(q),))


def test_every_function_refuses_second_derivatives():
    """Of the whole package: a Function is differentiated as if what it saved were constants, unless it refuses."""
    functions = 0
    for path in Path(moba_cp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or "torch.autograd.Function" not in map(ast.unparse, node.bases):
                continue
            decorators = {x.name: list(map(ast.unparse, x.decorator_list)) for x in node.body if hasattr(x, "name")}
            # The first refuses, the second is made of itself, and the others are linear, each the other's derivative.
            if node.name not in ("_Refused", "_Product", "_Unshard", "_SumOfShares"):
                assert decorators["forward"] == ["staticmethod", "without_autocast"], node.name
                assert decorators["backward"] == ["staticmethod", "once_differentiable", "without_autocast"], node.name
                functions += 1
    assert functions >= 4


@pytest.mark.parametrize("context", [False, True], ids=["", "cp"])
def test_a_block_larger_than_the_sequence_costs_nothing_more(context):
    how = {"cp": CPContext(None, "zigzag", 64)} if context else {}
    q, k, v = (torch.randn(64, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = full_attention(q, k, v)
    with Largest() as largest:
        out = moba_attention(q, k, v, MoBAConfig(1 << 20, 3), **how)
        out.sum().backward()
    torch.testing.assert_close(out, expected)
    # Documents, too, can be shorter than a block.
    cu_seqlens = torch.arange(0, 65, 4)
    with largest:
        moba_attention(q, k, v, MoBAConfig(1 << 20, 3), cu_seqlens=cu_seqlens)
    assert largest.numel < 1 << 16


@pytest.mark.parametrize("kind", ["moba", "full"])
def test_compiled_as_one_graph_for_every_length(kind):
    compile_and_compare("cpu", kind)


@pytest.mark.parametrize("name", ["moba", "full"])
def test_compiled_with_a_scale_that_changes(name):
    """Of its second value on torch.compile holds it open."""
    torch._dynamo.reset()
    compiled = torch.compile(ATTENTION[name], backend="aot_eager", fullgraph=True)
    q, k, v = torch.randn(3, 64, 2, 8).unbind()
    for scale in (0.5, 0.25, 1):
        assert torch.equal(compiled(q, k, v, softmax_scale=scale), ATTENTION[name](q, k, v, softmax_scale=scale))
    for scale in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="softmax_scale=.* is not a finite number"):
            ATTENTION[name](q, k, v, softmax_scale=scale)


@pytest.mark.parametrize("batch", [False, True], ids=["documents", "batch"])
def test_layers_share_the_table_of_their_documents(batch, monkeypatch):
    built = []
    monkeypatch.setattr(autograd, "block_table", lambda *args: built.append(args) or block_table(*args))
    autograd._kept_table.cache_clear()
    config = MoBAConfig(32, 2)

    def layer(documents):
        q, k, v = torch.randn(3, 200, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        q.requires_grad_()
        if batch:
            out = moba_attention(*(x.unflatten(0, (documents, -1)) for x in (q, k, v)), config).flatten(0, 1)
        else:
            ends = torch.arange(documents + 1, dtype=torch.int32) * (200 // documents)
            out = moba_attention(q, k, v, config, ends)
        out.square().sum().backward()
        return out.detach(), q.grad

    first = layer(4)
    assert len(built) == 1
    again = layer(4)
    assert len(built) == 1 and all(map(torch.equal, first, again))
    others = layer(2)
    assert len(built) == 2 and not torch.equal(first[0], others[0])


def test_documents_that_do_not_fit_are_refused_each_time():
    q = torch.zeros(8, 2, 16)
    for _ in range(2):
        with pytest.raises(ValueError, match="must start at 0"):
            moba_attention(q, q, q, MoBAConfig(32, 2), torch.tensor([0, 9], dtype=torch.int32))


@pytest.mark.parametrize("name", ["moba", "full"])
@pytest.mark.parametrize("shared", [False, True], ids=["", "with NumPy"])
def test_documents_may_change_between_the_passes(name, shared):
    """A batch's tensor of documents is often the next batch's too."""
    documents = torch.tensor([0, 20, 64])
    q, k, v = (torch.randn(64, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = ATTENTION[name](q, k, v, cu_seqlens=documents)
    expected = torch.autograd.grad(ATTENTION[name](q, k, v, cu_seqlens=documents).sum(), (q, k, v))
    (documents.numpy() if shared else documents)[1] = 30
    for actual, right in zip(torch.autograd.grad(out.sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(actual, right)


def test_shapes_on_the_meta_device():
    q, k, v = (torch.randn(64, h, 8, device="meta") for h in (2, 1, 1))
    for name in ("moba", "full"):
        out, lse = ATTENTION[name](q, k, v, return_lse=True, cu_seqlens=torch.tensor([0, 20, 64]))
        assert out.shape == q.shape and lse.shape == q.shape[:2] and out.is_meta
