"""The index branch on many ranks against one: the choice bit for bit, the loss and its gradients to rounding."""

import pytest
import torch

from moba_cp import CPContext, MoBAConfig, full_attention
from moba_cp import reference as attention_reference
from moba_cp.cp.layout import LAYOUTS
from moba_cp.eager.index_choice import is_candidate
from moba_cp.eager.masses import block_masses
from moba_cp.index import IndexConfig
from moba_cp.index.branch import IndexBranch, Projected
from tests.cp.test_moba import divides
from tests.helpers.distributed import run_threads

N_KV, GROUP, DIM = 2, 2, 12
MOBA = MoBAConfig(block_size=16, top_k=3)
DOCUMENTS = {"one": [0, 192], "packed": [0, 24, 24, 108, 192], "straddling": [0, 60, 192]}


def branch_of(cp: CPContext, config: IndexConfig) -> IndexBranch:
    return IndexBranch(config, MOBA, cp, "layer 1", N_KV)


def run(cp: CPContext, config: IndexConfig, full: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """The choice of the whole sequence, the loss of all ranks, and the gradient of the projection."""
    draw = torch.Generator().manual_seed(0)
    branch = branch_of(cp, config)
    n = cp.seq_len
    mixed = torch.randn(n, config.width(N_KV), dtype=torch.float64, generator=draw).to(dtype)
    q = torch.randn(n, N_KV * GROUP, DIM, dtype=torch.float64, generator=draw).to(dtype)
    k, v = torch.randn(2, n, N_KV, DIM, dtype=torch.float64, generator=draw).to(dtype)
    _, lse = full_attention(q, k, v, cp.cu_seqlens, return_lse=True)
    mixed, q, k, lse = (cp.shard(x) for x in (mixed, q, k, lse))
    angles = cp.document_positions[:, None] * 10.0 ** -torch.arange(DIM // 2)
    cos, sin = angles.cos().to(lse.dtype), angles.sin().to(lse.dtype)
    projected = branch.empty(mixed)
    branch.split(mixed, cos, sin, projected)
    scored = branch.gather(projected)
    chosen = branch.choose(scored)
    loss, grads = branch.learn(scored, q, k, lse, DIM**-0.5, None if full else chosen)
    dmixed = branch.split_backward(grads, cos, sin)
    return [cp.unshard(chosen), cp.comm.gather_uncounted(loss).sum(0), cp.unshard(dmixed)]


@pytest.mark.parametrize("full", [True, False], ids=["all blocks", "chosen blocks"])
@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_ranks_agree_with_one(documents, score, full):
    config = IndexConfig(heads=3, dim=DIM // 2, score=score)
    bounds = torch.tensor(DOCUMENTS[documents], dtype=torch.int32)
    one = lambda dtype: run(CPContext(None, "contiguous", int(bounds[-1]), bounds), config, full, dtype)
    expected, narrow = one(torch.float64), one(torch.float32)[0]
    assert (expected[0] >= 0).any() and expected[1] > 0 and expected[2].abs().max() > 1e-4
    cases = 0
    for size in (2, 3, 4):
        for layout in LAYOUTS:
            if not divides(layout, bounds, size):
                continue
            cases += 1

            def ranks(comm, layout=layout):
                cp = CPContext(comm, layout, int(bounds[-1]), bounds)
                assert (cp.geometry(16).straddles and documents == "straddling") or documents != "straddling"
                return run(cp, config, full, torch.float64), run(cp, config, full, torch.float32)[0]

            for got, got_narrow in run_threads(size, ranks):
                assert torch.equal(got[0], expected[0]) and torch.equal(got_narrow, narrow)
                torch.testing.assert_close(got[1:], expected[1:], rtol=0, atol=1e-11)
    assert cases >= 6


def test_the_projection_and_its_gradient():
    """Rotation keeps products between tokens of equal distance, and the gradient is autograd's."""
    config = IndexConfig(heads=2, dim=4)
    branch = branch_of(CPContext(None, "contiguous", 32), config)
    mixed = torch.randn(32, config.width(N_KV), dtype=torch.float64)
    angles = torch.arange(32)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    projected = branch.empty(mixed)
    branch.split(mixed[:1].expand(32, -1), angles.cos(), angles.sin(), projected)
    products = torch.einsum("tgmd,tgd->tgm", projected.queries[8:], projected.keys[:-8])
    torch.testing.assert_close(products, products[:1].expand_as(products))
    # As heads of this width turn: every other of the frequencies of heads twice as wide.
    pair = torch.view_as_complex(mixed[0, :4].view(2, 2).T.contiguous())
    turned = pair * torch.polar(torch.ones(2, dtype=torch.float64), 5 * torch.tensor([1.0, 0.1], dtype=torch.float64))
    got = torch.view_as_complex(projected.queries[5, 0, 0].view(2, 2).T.contiguous())
    torch.testing.assert_close(got, turned)
    out = Projected(*(torch.randn_like(x) for x in projected))
    whole = lambda x: sum((a * b).sum() for a, b in zip(_split(branch, x, angles), out))
    expected = torch.autograd.functional.jacobian(whole, mixed)
    torch.testing.assert_close(branch.split_backward(out, angles.cos(), angles.sin()), expected)


def _split(branch, mixed, angles):
    """:meth:`IndexBranch.split` without writing into buffers, for autograd."""
    m, d = branch.config.heads, branch.config.dim
    parts = mixed.unflatten(1, (N_KV, -1))
    turned = branch._turn(parts[..., : (m + 1) * d].unflatten(2, (m + 1, d)), angles.cos(), angles.sin())
    return Projected(turned[:, :, :m], turned[:, :, m], parts[..., (m + 1) * d :] * (m * d) ** -0.5)


def test_a_branch_learns_to_choose_what_attention_looks_at():
    """Better than mean keys, which choose for a group by the sum of their scores, and far better than at first."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float32, generator=draw)
    n, hidden_size, block, top_k = 384, 32, 16, 5
    # Neighbouring tokens are alike, so that some blocks get more than others.
    hidden = normal(n, hidden_size) + 1.5 * normal(8, hidden_size)[torch.arange(n // block) * 5 % 8].repeat_interleave(
        block, 0
    )
    hidden /= hidden.square().mean(-1, keepdim=True).sqrt()
    q, k = (
        (hidden @ normal(hidden_size, heads * 16) * 1.5 / hidden_size**0.5).unflatten(1, (heads, 16))
        for heads in (2, 1)
    )
    _, lse = full_attention(q, k, k, return_lse=True)
    moba, config = MoBAConfig(block, top_k), IndexConfig(heads=4, dim=8)
    branch = IndexBranch(config, moba, CPContext(None, "contiguous", n), "layer 1", 1)
    tables = branch.tables
    masses = block_masses(q, k[:, 0], lse, tables.start, block, 16**-0.5)
    masses *= is_candidate(tables, slice(0, n), slice(0, n // block))
    late = slice(block * (top_k + 3), n)
    best = masses[late].topk(top_k - 1).values.sum(1)
    share = lambda chosen: (masses[late].gather(1, chosen[late, 0].long()).sum(1) / best).mean()
    angles = torch.arange(n)[:, None] * 1e4 ** (-torch.arange(8) / 8)
    cos, sin = angles.cos(), angles.sin()
    weight = (0.02 * normal(config.width(1), hidden_size)).requires_grad_()
    optimizer, losses, shares = torch.optim.Adam([weight], lr=1e-2), [], []
    for _ in range(150):
        projected = branch.empty(hidden)
        branch.split((hidden @ weight.T).detach(), cos, sin, projected)
        scored = branch.gather(projected)
        loss, grads = branch.learn(scored, q, k, lse, 16**-0.5, None)
        weight.grad = branch.split_backward(grads, cos, sin).T @ hidden / n
        optimizer.step()
        losses.append(loss.item())
        shares.append(share(branch.choose(scored)) if len(losses) in (1, 150) else None)
    by_means = attention_reference.select_blocks(q.sum(1, keepdim=True), k, block, top_k)
    assert losses[-1] < 0.25 * losses[0]
    assert shares[0] < 0.6 and shares[-1] > 0.93 and shares[-1] > share(by_means)
