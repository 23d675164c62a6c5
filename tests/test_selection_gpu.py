"""Gates beside MoBA's own, and selections from outside, where only a GPU shows it: low precision, determinism, graphs,
ranks."""

import random

import pytest
import torch
import torch.distributed as dist

from moba_cp import CPContext, MoBAConfig, eager, kernels, moba_attention
from moba_cp.autograd import moba_attention_op
from moba_cp.blocks import block_table
from moba_cp.cp.options import ExchangeOptions
from tests.cp.test_exchange_gpu import CASES, _as_good_as_one_rank, _batch, _errors
from tests.helpers.cases import run, run_reference
from tests.helpers.distributed import run_ranks
from tests.helpers.kernel_inputs import poisoned
from tests.kernels.test_kernels_gpu import BF16, FP16, FP32, batch, chosen_mask, gradients, plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = 19
# (Hq, Hkv), D, B, k, dtype; 19 random batches of each, with a gate drawn for each.
KINDS = [
    ((16, 1), 128, 128, 8, BF16), ((8, 2), 128, 64, 16, BF16), ((4, 2), 64, 128, 4, BF16), ((6, 2), 72, 48, 4, FP16),
    ((12, 4), 32, 16, 5, BF16), ((4, 4), 256, 256, 3, BF16), ((8, 1), 128, 64, 3, FP32), ((5, 1), 40, 96, 6, FP16),
]  # fmt: skip
RANKS = 4


def draw_gate(rng: random.Random, config: MoBAConfig, deterministic: bool = False) -> MoBAConfig:
    sink = config.top_k > 1 and rng.random() < 0.5
    min_recent = rng.randint(0, config.top_k - 1 - sink) if rng.random() < 0.5 else 0
    sharing, score = rng.choice(["none", "sum", "max"]), rng.choice(["mean", "max"])
    return MoBAConfig(config.block_size, config.top_k, deterministic, sharing, score, min_recent, sink)


def select(q, k, config: MoBAConfig, cu_seqlens, ops=kernels):
    """block ids [T, G, S], and the table."""
    table = block_table(q.shape[0], config.block_size, cu_seqlens, "cuda")
    how = config.top_k, config.shared_by_group, config.min_recent, config.sink
    ranges = table.first, table.current_block
    if config.score == "max":
        return ops.select_by_keys(q, k, table.start, *ranges, config.block_size, *how), table
    means = ops.block_means(k, table.start, table.length, config.block_size)
    return ops.select_blocks(q, means, *ranges, *how), table


def check_selection(q, k, config: MoBAConfig, table, chosen):
    """Right wherever the margin between the last chosen and the first refused block exceeds the score's rounding."""
    n, n_heads, n_kv, n_blocks = q.shape[0], q.shape[1], k.shape[1], table.start.numel()
    group = n_heads // n_kv
    if config.score == "mean":
        keys = kernels.block_means(k, table.start, table.length, config.block_size).double()
    else:
        keys = k.double()
    keys, rows = keys.repeat_interleave(group, 1), q.double()
    score, size = torch.einsum("nhd,bhd->nhb", rows, keys), torch.einsum("nhd,bhd->nhb", rows.abs(), keys.abs())
    if config.score == "max":
        block = table.current_block.long().expand(n, n_heads, -1)
        lowest = score.new_full((n, n_heads, n_blocks), -torch.inf)
        score = lowest.scatter_reduce(2, block, score, "amax")
        size = torch.zeros_like(lowest).scatter_reduce(2, block, size, "amax")
    if config.shared_by_group != "none":
        join = torch.Tensor.sum if config.shared_by_group == "sum" else torch.Tensor.amax
        score, size = (join(x.unflatten(1, (n_kv, group)), 2) for x in (score, size))
    block = torch.arange(n_blocks, device="cuda")
    candidate = ((block >= table.first[:, None]) & (block < table.current_block[:, None]))[:, None]
    always = candidate & (block >= table.current_block[:, None, None] - config.min_recent)
    if config.sink:
        always |= candidate & (block == table.first[:, None, None])
    taken = (chosen[..., None] == block).any(2)
    assert not (taken & ~candidate).any()
    assert (taken | ~always).all(), "what is always taken"
    assert torch.equal(taken.sum(-1), candidate.sum(-1).clamp(max=chosen.shape[2]).expand(taken.shape[:2]))
    score = score.masked_fill(always.expand_as(score), torch.inf)
    worst = score.masked_fill(~taken, torch.inf).amin(-1)
    best = score.masked_fill(taken | ~candidate, -torch.inf).amax(-1)
    assert (worst - best >= -2e-6 * size.amax(-1)).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_shapes_are_as_good_as_plain_torch(kind):
    rng = random.Random(str(kind))
    for seed in range(SHAPES):
        q, k, v, dout, cu_seqlens, config = batch(kind, seed)
        config = draw_gate(rng, config)
        label = f"{config}, seed {seed}, tokens {q.shape[0]}"
        with poisoned():
            chosen, table = select(q, k, config, cu_seqlens)
            ours = gradients(lambda *x: moba_attention(*x, config, cu_seqlens=cu_seqlens), q, k, v, dout)
        check_selection(q, k, config, table, chosen)
        of_heads = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1)
        mask, scale = chosen_mask(of_heads, table), q.shape[2] ** -0.5
        exact = gradients(lambda *x: plain(*x, mask, scale), *(x.double() for x in (q, k, v, dout)))
        rough = gradients(lambda *x: plain(*x, mask, scale), q, k, v, dout)
        for name, x, y, z, factor in zip(("out", "dq", "dk", "dv"), ours, rough, exact, (2, 3, 3, 3)):
            error = lambda a: (a.double() - z).abs().max().item()
            assert error(x) <= factor * error(y) + 1e-5, f"{name}, {label}"


@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("sharing", ["none", "sum", "max"])
def test_whole_numbers_are_selected_as_plain_torch_does(sharing, score):
    """Scores that every order of sums gets exactly, often equal, with NaN, infinities and signed zeros among them."""
    g = torch.Generator("cuda").manual_seed(0)
    n = 3_001
    draw = lambda heads: torch.randint(-1, 2, (n, heads, 64), device="cuda", generator=g).to(BF16)
    q, k = draw(8), draw(2)
    k[100:104], k[900, :, 3], k[1_500, :, 7], k[2_000:2_016] = torch.nan, torch.inf, -torch.inf, -0.0
    cu_seqlens = torch.tensor([0, 1_000, 1_000, 1_005, n], dtype=torch.int32, device="cuda")
    for sink, min_recent in ((False, 0), (True, 2)):
        config = MoBAConfig(16, 8, False, sharing, score, min_recent, sink)
        means = block_means_of_signs(k, config, cu_seqlens) if score == "mean" else None
        with poisoned():
            ours, expected = (
                _by_means(q, means, config, cu_seqlens, ops)
                if score == "mean"
                else select(q, k, config, cu_seqlens, ops)[0]
                for ops in (kernels, eager)
            )
        assert torch.equal(ours, expected), config


def block_means_of_signs(k, config: MoBAConfig, cu_seqlens):
    """Means that are whole numbers, of each block its first key, with some that are none."""
    table = block_table(k.shape[0], config.block_size, cu_seqlens, "cuda")
    means = k[table.start.clamp(max=k.shape[0] - 1)].contiguous()
    means[3::7], means[6::13] = torch.nan, -0.0
    means[5::11, :, 3], means[9::17, :, 7] = torch.inf, -torch.inf
    return means


def _by_means(q, means, config: MoBAConfig, cu_seqlens, ops):
    table = block_table(q.shape[0], config.block_size, cu_seqlens, "cuda")
    how = config.top_k, config.shared_by_group, config.min_recent, config.sink
    return ops.select_blocks(q, means, table.first, table.current_block, *how)


@pytest.mark.parametrize("sharing", ["none", "max"])
def test_given_back_it_gives_the_same_bits_and_deterministic_mode_repeats(sharing):
    q, k, v, dout, cu_seqlens, config = batch(((16, 2), 128, 128, 8, BF16), 1, n_tokens=9_000)
    config = MoBAConfig(128, 8, True, sharing, "max", 1, True)
    run_once = lambda **how: gradients(
        lambda *x: moba_attention(*x, config, cu_seqlens=cu_seqlens, **how), q, k, v, dout
    )
    _, selection = moba_attention(q, k, v, config, cu_seqlens=cu_seqlens, return_selection=True)
    first = run_once()
    for how in ({}, {"block_indices": selection}, {"block_indices": selection, "check_indices": True}) * 5:
        assert all(torch.equal(a, b) for a, b in zip(run_once(**how), first, strict=True))


@pytest.mark.parametrize("shared", [False, True], ids=["each head", "shared"])
def test_nothing_is_read_out_of_range_and_repeats_count_once(shared):
    q, k, v, dout, cu_seqlens, _ = batch(((8, 2), 64, 64, 3, BF16), 2, n_tokens=2_000)
    table = block_table(2_000, 64, cu_seqlens, "cuda")
    g = torch.Generator().manual_seed(0)
    wild = torch.randint(-40, 40, (2_000, 2 if shared else 8, 30), generator=g).int()
    wild[:, :, 3] = torch.randint(-(2**31), 2**31 - 1, wild.shape[:2], generator=g).int()
    wild = wild.cuda()
    config = MoBAConfig(64, 3)
    clean = eager.given_blocks(wild, table.first, table.current_block)
    assert torch.equal(kernels.given_blocks(wild, table.first, table.current_block), clean)
    numbers = torch.where(clean < 0, -1, clean - table.first[:, None, None])
    attend = lambda indices: gradients(
        lambda *x: moba_attention(*x, MoBAConfig(64, 3, True), cu_seqlens=cu_seqlens, block_indices=indices),
        q,
        k,
        v,
        dout,
    )
    assert all(torch.equal(a, b) for a, b in zip(attend(wild), attend(numbers), strict=True))
    with pytest.raises(ValueError, match="block_indices names block"):
        moba_attention(q, k, v, config, cu_seqlens=cu_seqlens, block_indices=wild, check_indices=True)
    moba_attention(q, k, v, config, cu_seqlens=cu_seqlens, block_indices=numbers, check_indices=True)


def test_a_cuda_graph_replays_with_another_selection():
    q, k, v, _, _, _ = batch(((8, 2), 128, 128, 4, BF16), 4, n_tokens=4_000)
    table = block_table(4_000, 128, None, "cuda")
    g = torch.Generator("cuda").manual_seed(0)
    own = table.current_block[:, None, None]
    draw = lambda: (torch.rand(4_000, 2, 3, device="cuda", generator=g) * own).int()
    indices, config = draw(), MoBAConfig(128, 4)
    chooses = MoBAConfig(128, 4, shared_by_group="sum", score="max", sink=True)

    def step():
        return moba_attention(q, k, v, config, block_indices=indices), moba_attention(q, k, v, chooses)

    with torch.no_grad():
        step()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            indices.copy_(draw()), q.normal_(), k.normal_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
        with pytest.raises(ValueError, match="check_indices=True waits for the device, which a CUDA graph cannot"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                moba_attention(q, k, v, config, block_indices=indices, check_indices=True)


GATES = {
    "packed, GQA": [dict(shared_by_group="max", sink=True), dict(shared_by_group="sum", score="max", min_recent=1)],
    "straddling": [dict(min_recent=1, sink=True), dict(score="max")],
    "one document": [dict(shared_by_group="sum"), dict(shared_by_group="max", score="max", sink=True)],
}
WAYS = [
    ExchangeOptions("auto", copy_engines=False), ExchangeOptions("kv", stages=2), ExchangeOptions("query"),
    ExchangeOptions("allgather", copy_engines=False), ExchangeOptions("heads", copy_engines=False),
    ExchangeOptions("kv", head_ranks=2, copy_engines=False),
]  # fmt: skip


def _with_selection(case, config, cp, given=None):
    leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    how = {} if given is None else {"block_indices": cp.shard(given), "check_indices": True}
    out, lse, selection = moba_attention(*leaves, config, cp=cp, return_lse=True, return_selection=True, **how)
    out.backward(cp.shard(case.dout))
    return [cp.unshard(x.detach()) for x in (out, *(x.grad for x in leaves), lse)], cp.unshard(selection)


def _on_nccl(rank):
    """[(label, errors across ranks, errors of one rank, same selection, the same bits again and given back)]."""
    report, group = [], dist.group.WORLD
    for name, args in CASES.items():
        case = _batch(**args)
        for gate in GATES[name]:
            config = MoBAConfig(case.block_size, case.top_k, True, **gate)
            options = config.block_size, config.top_k, case.q.shape[2] ** -0.5, True
            chosen = moba_attention_op(
                case.q, case.k, case.v, case.cu_seqlens.cuda(), *options, None, None, False, *config.gate
            )[2]
            exact = run_reference(case.to(torch.float64), chosen=chosen.long())
            one = _errors(run(moba_attention, case, config, cu_seqlens=case.cu_seqlens), exact)
            _, alone = moba_attention(
                case.q, case.k, case.v, config, cu_seqlens=case.cu_seqlens.cuda(), return_selection=True
            )
            for way in WAYS:
                cp = CPContext(group, "zigzag", case.q.shape[0], case.cu_seqlens, case.q.device, way)
                results, selection = _with_selection(case, config, cp)
                again = [_with_selection(case, config, cp)[0], _with_selection(case, config, cp, selection)[0]]
                repeats = all(torch.equal(a, b) for other in again for a, b in zip(results, other, strict=True))
                same = torch.equal(selection, alone)
                report.append((f"{name} {gate} {way}", _errors(results, exact), one, same, repeats))
    return report


def test_four_ranks_select_as_one_in_every_way():
    for report in run_ranks(RANKS, _on_nccl, backend="nccl", timeout=400):
        assert len(report) == 2 * len(CASES) * len(WAYS)
        for label, errors, one, same, repeats in report:
            assert same, f"{label}: the selection is not one rank's"
            assert repeats, f"{label}: not the same bits"
            _as_good_as_one_rank(label, errors, one, 3)
