"""What only a GPU can show: low precision, races, run-to-run differences, a million tokens."""

import pytest
import torch

from moba_cp import MoBAConfig, kernels, moba_attention, reference
from moba_cp.blocks import block_table, local_pages
from moba_cp.kernels import hopper, tuned
from tests.helpers.kernel_inputs import poisoned

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = 25
# (Hq, Hkv), D, B, k, dtype: everything that a kernel is compiled for; 25 random batches of each.
KINDS = [
    ((4, 4), 128, 128, 8, BF16), ((8, 2), 128, 512, 8, BF16), ((4, 4), 64, 128, 8, BF16), ((4, 1), 64, 64, 3, FP16),
    ((2, 2), 32, 16, 5, BF16), ((4, 2), 256, 256, 4, BF16), ((2, 1), 72, 48, 4, FP16), ((6, 2), 96, 208, 3, BF16),
    ((2, 2), 128, 64, 2, FP32), ((4, 2), 40, 96, 16, FP32), ((2, 1), 128, 1024, 2, FP16), ((3, 3), 192, 80, 1, BF16),
    ((4, 2), 64, 256, 4, BF16),
]  # fmt: skip


def batch(kind, seed: int, n_tokens: int | None = None):
    (n_q, n_kv), dim, block_size, top_k, dtype = kind
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(n, (1,), generator=g))
    n = n_tokens or 1 + draw(max(600, 2 * block_size))
    cuts = sorted(draw(n + 1) for _ in range(draw(4)))
    cu_seqlens = torch.tensor([0, *cuts, n], dtype=torch.int32, device="cuda")
    tensors = [torch.randn(n, h, dim, generator=g).to("cuda", dtype) for h in (n_q, n_kv, n_kv, n_q)]
    if draw(2):
        # A sink: most queries choose the first block.
        tensors[1][:block_size] += 2 * tensors[0].float().mean((0, 1)).to(dtype)
    return *tensors, cu_seqlens, MoBAConfig(block_size, top_k)


def plain(q, k, v, mask, scale):
    """Attention under a mask [Hq, T, T] with every product in the inputs' dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = torch.einsum("nhd,mhd->hnm", q, k) * scale
    return torch.einsum("hnm,mhd->nhd", score.masked_fill(~mask, -torch.inf).softmax(-1), v)


def gradients(attention, q, k, v, dout):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def chosen_mask(chosen, table):
    block, position = table.current_block.long(), torch.arange(table.current_block.numel(), device="cuda")
    mask = ((block[:, None] == block) & (position[:, None] >= position)).expand(chosen.shape[1], -1, -1).clone()
    for slot in chosen.unbind(2):
        mask |= slot.T[:, :, None] == block
    return mask


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_shapes_are_as_good_as_plain_torch(kind):
    for seed in range(SHAPES):
        q, k, v, dout, cu_seqlens, config = batch(kind, seed)
        table = block_table(q.shape[0], config.block_size, cu_seqlens, "cuda")
        with poisoned():
            means = kernels.block_means(k, table.start, table.length, config.block_size)
            chosen = kernels.select_blocks(q, means, table.first, table.current_block, config.top_k)
            ours = gradients(lambda *x: moba_attention(*x, config, cu_seqlens=cu_seqlens), q, k, v, dout)
        check_selection(q, means, table, chosen)
        mask, scale = chosen_mask(chosen, table), q.shape[2] ** -0.5
        exact = gradients(lambda *x: plain(*x, mask, scale), *(x.double() for x in (q, k, v, dout)))
        rough = gradients(lambda *x: plain(*x, mask, scale), q, k, v, dout)
        for name, x, y, z, factor in zip(("out", "dq", "dk", "dv"), ours, rough, exact, (2, 3, 3, 3)):
            error = lambda a: (a.double() - z).abs().max().item()
            assert error(x) <= factor * error(y) + 1e-5, f"{name}, seed {seed}, tokens {q.shape[0]}"


def check_selection(q, means, table, chosen):
    """Right wherever the margin between the last chosen and the first refused block exceeds the score's rounding."""
    group = q.shape[1] // means.shape[1]
    score = torch.einsum("nhd,bhd->nhb", q.double(), means.double().repeat_interleave(group, 1))
    block = torch.arange(means.shape[0], device="cuda")
    candidate = ((block >= table.first[:, None]) & (block < table.current_block[:, None]))[:, None]
    taken = (chosen[..., None] == block).any(2)
    assert not (taken & ~candidate).any()
    assert torch.equal(taken.sum(-1), candidate.sum(-1).clamp(max=chosen.shape[2]).expand(taken.shape[:2]))
    worst = score.masked_fill(~taken, torch.inf).amin(-1)
    best = score.masked_fill(taken | ~candidate, -torch.inf).amax(-1)
    rounding = 2e-6 * torch.einsum("nhd,bhd->nhb", q.double().abs(), means.double().abs().repeat_interleave(group, 1))
    assert (worst - best >= -rounding.amax(-1)).all()


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1]], ids=str)
def test_deterministic_mode_repeats_bit_for_bit(kind):
    q, k, v, dout, cu_seqlens, config = batch(kind, 1, n_tokens=20_000)
    config = MoBAConfig(config.block_size, config.top_k, deterministic=True)
    run = lambda: gradients(lambda *x: moba_attention(*x, config, cu_seqlens=cu_seqlens), q, k, v, dout)
    first = run()
    for _ in range(200):
        assert all(torch.equal(x, y) for x, y in zip(run(), first))


def test_selection_does_not_depend_on_the_rows_beside():
    q, k, _, _, cu_seqlens, config = batch(KINDS[0], 2, n_tokens=9_000)
    table = block_table(q.shape[0], config.block_size, cu_seqlens, "cuda")
    means = kernels.block_means(k, table.start, table.length, config.block_size)
    some = torch.randperm(9_000, device="cuda")[:777]
    whole = kernels.select_blocks(q, means, table.first, table.current_block, config.top_k)
    alone = kernels.select_blocks(q[some], means, table.first[some], table.current_block[some], config.top_k)
    assert torch.equal(alone, whole[some])


@pytest.mark.parametrize("top_k", [2, 8, 16])
@pytest.mark.parametrize("dim", [64, 128])
def test_threads_select_as_tiles_do(dim, top_k, monkeypatch):
    if not kernels.hopper.runs_on(torch.device("cuda", 0)):
        pytest.skip("needs Hopper and a version of Triton that its kernels ran with")
    g = torch.Generator("cuda").manual_seed(top_k)
    n, block_size = 7_001, 16
    table = block_table(
        n, block_size, torch.tensor([0, 1_000, 1_000, 1_005, n], dtype=torch.int32, device="cuda"), "cuda"
    )
    # Scores are small whole numbers, which all kernels get exactly and often equal, and NaN, infinities and zeros.
    draw = lambda *shape: torch.randint(-1, 2, shape, device="cuda", generator=g).to(BF16)
    q, means = draw(n, 6, dim), draw(table.start.numel(), 2, dim)
    means[3::7], means[6::13] = torch.nan, -0.0
    means[5::11, :, 3], means[9::17, :, 7] = torch.inf, -torch.inf
    with poisoned():
        ours = kernels.select_blocks(q, means, table.first, table.current_block, top_k)
        monkeypatch.setattr(kernels.hopper, "selects", lambda *args: False)
        assert torch.equal(ours, kernels.select_blocks(q, means, table.first, table.current_block, top_k))


def test_a_cuda_graph_replays_with_new_inputs():
    q, k, v, dout, _, config = batch(KINDS[1], 4, n_tokens=4_000)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step():
        for x in leaves:
            x.grad = None
        out = moba_attention(*leaves, MoBAConfig(config.block_size, config.top_k, deterministic=True))
        out.backward(dout)
        return out.detach(), *(x.grad for x in leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (*leaves, dout):
            x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(torch.equal(x, y) for x, y in zip(replayed, step(), strict=True))


# (D, B, k): blocks that many rows choose, of several tasks each; the batches above are too short for that.
LONG_KINDS = [(64, 512, 3), (64, 1024, 8), (64, 4096, 2), (64, 256, 32), (128, 512, 3), (128, 4096, 3)]


@pytest.mark.parametrize("dim, block_size, top_k", LONG_KINDS)
def test_long_documents_in_float64(dim, block_size, top_k):
    """Every row and key of two documents, under the selection that the kernels made."""
    n, end, config = 17_000, 8_192, MoBAConfig(block_size, top_k)
    g = torch.Generator("cuda").manual_seed(block_size + dim)
    q, k, v, dout = (torch.randn(n, 2, dim, generator=g, device="cuda", dtype=BF16) for _ in range(4))
    cu_seqlens = torch.tensor([0, end, n], dtype=torch.int32, device="cuda")
    found = gradients(lambda *x: moba_attention(*x, config, cu_seqlens=cu_seqlens), q, k, v, dout)
    table = block_table(n, block_size, cu_seqlens, "cuda")
    means = kernels.block_means(k, table.start, table.length, block_size)
    chosen = kernels.select_blocks(q, means, table.first, table.current_block, top_k)
    for begin, until in ((0, end), (end, n)):
        position = torch.arange(until - begin, device="cuda")
        block = position // block_size + table.first[begin]
        for head in range(2):
            mask = (block[:, None] == block) & (position[:, None] >= position)
            for slot in chosen[begin:until, head].unbind(1):
                mask |= slot[:, None] == block
            leaves = [x[begin:until, head].double().requires_grad_() for x in (q, k, v)]
            score = (leaves[0] @ leaves[1].T * dim**-0.5).masked_fill(~mask, -torch.inf)
            out = score.softmax(-1) @ leaves[2]
            out.backward(dout[begin:until, head].double())
            for x, y in zip(found, [out.detach(), *(x.grad for x in leaves)], strict=True):
                error = (x[begin:until, head].double() - y).abs()
                assert error.max() < 2e-2 * y.abs().max() and error.mean() < 1e-2 * y.abs().mean()


@pytest.mark.parametrize("dim", [64, 128])
def test_a_later_token_changes_no_earlier_output(dim):
    """By a bit: whoever learned from what comes later would look better than it is."""
    config = MoBAConfig(512, 4)
    g = torch.Generator("cuda").manual_seed(dim)
    q, k, v = (torch.randn(9_000, 2, dim, generator=g, device="cuda", dtype=BF16) for _ in range(3))
    before = moba_attention(q, k, v, config)
    for at in (1, 511, 512, 4_100, 8_999):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[at:] = torch.randn(x[at:].shape, generator=g, device="cuda").to(BF16)
        assert torch.equal(moba_attention(*changed, config)[:at], before[:at]), at


@pytest.mark.parametrize("kind", [*KINDS[:3], KINDS[-1]], ids=str)
def test_nan_stays_in_its_document(kind):
    """Also where a tile of keys reaches past the end of a document's last block, into the next one."""
    q, k, v, dout, _, config = batch(kind, 5, n_tokens=3_000)
    end = 1_111
    cu_seqlens = torch.tensor([0, end, 3_000], dtype=torch.int32, device="cuda")
    run = lambda *x: gradients(lambda *y: moba_attention(*y, config, cu_seqlens=cu_seqlens), *x, dout)
    clean = run(q, k, v)
    for x in (k, v):
        x[end:] = torch.nan
    for x, y in zip(run(q, k, v), clean, strict=True):
        torch.testing.assert_close(x[:end], y[:end], rtol=2e-2, atol=1e-3)


def test_the_check_of_the_hopper_kernels(monkeypatch):
    """What serves with a version that was not measured is what agrees with the portable kernels."""
    device = torch.device("cuda", torch.cuda.current_device())
    if not tuned.is_hopper(device) or hopper.MISSING:
        pytest.skip("needs Hopper and Gluon")
    monkeypatch.setattr(hopper, "MEASURED", ((0, 0),))

    def examine():
        monkeypatch.setattr(hopper, "_verdicts", {})
        return hopper.runs_on(device), kernels.serving(device)

    serves, line = examine()
    assert serves and "checked" in line, line

    def wrong(part, tile, tasks, parts, parts_lse, scale_log2):
        parts.zero_(), parts_lse.zero_()

    def broken(*args):
        raise RuntimeError("does not compile")

    for name, launch, reason in (("forward", wrong, "output differs"), ("dkdv", broken, "does not compile")):
        with monkeypatch.context() as patch:
            patch.setattr(hopper, f"launch_{name}", launch)
            serves, line = examine()
        assert not serves and reason in line, line


def test_memory_at_131072_tokens():
    q, k, v, dout, _, config = batch(KINDS[0], 0, n_tokens=1024)
    q, k, v, dout = (x.repeat(128, 4, 1).contiguous() for x in (q, k, v, dout))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    moba_attention(*leaves, config).backward(dout)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 3 * 2**30


@pytest.mark.slow
def test_a_million_tokens():
    """Sampled rows, and the keys of one block with all rows that see it, in float64. More than 2^31 elements."""
    n, n_heads, dim, config = 2**20 + 333, 16, 128, MoBAConfig(512, 8)
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (torch.randn(n, n_heads, dim, generator=g, device="cuda", dtype=BF16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = moba_attention(*leaves, config, return_lse=True)
    out.backward(dout)
    torch.cuda.synchronize()
    assert q.numel() > 2**31

    q, k, v, out = (x.detach() for x in (q, k, v, out))
    table = block_table(n, config.block_size, None, "cuda")
    means = reference.block_means(k[:, 15:], config.block_size)
    rows = torch.tensor([0, 511, 512, 5_000, 300_001, 700_707, n - 334, n - 1], device="cuda")
    chosen = kernels.select_blocks(q[:, 15:].contiguous(), means, table.first, table.current_block, config.top_k)[:, 0]
    scale, delta = dim**-0.5, (dout[:, 15].double() * out[:, 15].double()).sum(-1)
    for t in rows.tolist():
        blocks = [b for b in chosen[t].tolist() if b >= 0]
        keys = torch.cat([torch.arange(b * 512, b * 512 + 512) for b in blocks] + [torch.arange(t // 512 * 512, t + 1)])
        keys = keys.cuda()
        score = k[keys, 15].double() @ q[t, 15].double() * scale
        prob = score.softmax(0)
        assert (lse[t, 15] - score.logsumexp(0)).abs() < 1e-4
        assert (out[t, 15] - prob @ v[keys, 15].double()).abs().max() < 4e-3
        ds = prob * (v[keys, 15].double() @ dout[t, 15].double() - delta[t]) * scale
        assert (leaves[0].grad[t, 15] - ds @ k[keys, 15].double()).abs().max() < 4e-3
    block = 777
    seeing = (chosen == block).any(-1).nonzero()[:, 0]
    seeing = torch.cat([torch.arange(block * 512, block * 512 + 512, device="cuda"), seeing])
    keys = torch.arange(block * 512, block * 512 + 512, device="cuda")
    score = q[seeing, 15].double() @ k[keys, 15].double().T * scale
    own = (seeing // 512 == block)[:, None] & (keys[None] > seeing[:, None])
    prob = (score - lse[seeing, 15].double()[:, None]).exp().masked_fill(own, 0)
    dv = prob.T @ dout[seeing, 15].double()
    dk = (prob * (dout[seeing, 15].double() @ v[keys, 15].double().T - delta[seeing, None]) * scale).T
    dk = dk @ q[seeing, 15].double()
    assert (leaves[2].grad[keys, 15] - dv).abs().max() < 2e-2 * dv.abs().max()
    assert (leaves[1].grad[keys, 15] - dk).abs().max() < 2e-2 * dk.abs().max()


def test_pages_of_another_storage_in_bf16():
    """As under context parallelism: remote rows, packed single-head pages, partial results in float32."""
    q, k, v, dout, cu_seqlens, config = batch(KINDS[1], 3, n_tokens=3_000)
    table = block_table(3_000, config.block_size, cu_seqlens, "cuda")
    means = kernels.block_means(k, table.start, table.length, config.block_size)
    chosen = kernels.select_blocks(q, means, table.first, table.current_block, config.top_k)
    visits, scale = (chosen, table.current_block, table.offset + 1), q.shape[2] ** -0.5
    out, lse = kernels.attend(q, local_pages(k, v, table), *visits, scale)
    packed = [x.transpose(0, 1).reshape(-1, 1, x.shape[2]) for x in (k, v)]
    pages = local_pages(*packed, table)
    row = torch.where(table.length > 0, table.start, -1)
    row = torch.where(row >= 0, row + torch.arange(k.shape[1], device="cuda")[:, None] * 3_000, -1)
    pages = type(pages)(*packed, row, torch.zeros_like(row, dtype=torch.int32), table.length, config.block_size)
    again, again_lse = kernels.attend(q, pages, *visits, scale)
    assert torch.equal(out, again) and torch.equal(lse, again_lse)
