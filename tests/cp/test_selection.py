"""Gates beside MoBA's own, and selections from outside, across ranks: equal to one rank in every way."""

import random

import pytest
import torch

from moba_cp import CPContext, MoBAConfig, moba_attention
from moba_cp.cp.calls import ExchangeError
from moba_cp.cp.comm import Communicator
from moba_cp.cp.layout import LAYOUTS
from moba_cp.cp.options import SEQUENCE_MODES, ExchangeOptions
from moba_cp.passes import AttentionPasses
from tests.cp.test_heads import _batch
from tests.cp.test_moba import NAMES
from tests.helpers.cases import Case, random_case, relative_error
from tests.helpers.distributed import run_threads
from tests.helpers.selections import (
    draw_config,
    draw_indices,
    first_blocks,
    numbers_in_documents,
    reference_results,
    reference_selection,
)

WAYS = [*SEQUENCE_MODES, "heads", "teams"]


def _options(way: str, size: int, rng: random.Random) -> ExchangeOptions:
    rest = {
        "keep": rng.random() < 0.5,
        "stages": rng.choice([1, 2, 64]),
        "ranks_per_node": rng.choice([None, 1, size]),
    }
    if way == "teams" and size == 4:
        return ExchangeOptions(rng.choice(SEQUENCE_MODES), 2, **rest)
    return ExchangeOptions("heads" if way == "teams" else way, **rest)


def _on_rank(comm: Communicator, case: Case, layout: str, options, config: MoBAConfig, given, copies: bool):
    """Whole-sequence [out, dq, dk, dv, lse], the selection, and whether it gives the same bits when it is given back
    and when all is done again."""
    comm = comm.share_memory() if copies else comm
    cp = CPContext(comm, layout, case.q.shape[0], case.cu_seqlens, exchange=options)
    how = {} if given is None else {"block_indices": cp.shard(given), "check_indices": True}

    def passes(**how):
        leaves = [cp.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
        out, lse, selection = moba_attention(*leaves, config, cp=cp, return_lse=True, return_selection=True, **how)
        out.backward(cp.shard(case.dout))
        return [x.detach() for x in (out, *(x.grad for x in leaves), lse)], selection

    results, selection = passes(**how)
    repeated, back = passes(**how)[0], passes(block_indices=selection)[0]
    same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(results, repeated, back, strict=True))
    return [cp.unshard(x) for x in results], cp.unshard(selection), same


def _holds(size: int, way: str, seed: int) -> None:
    rng = random.Random(seed)
    layout = LAYOUTS[seed % len(LAYOUTS)]
    case, options = _batch(seed, size, size, layout), _options(way, size, rng)
    config = draw_config(rng, case, deterministic=True)
    if rng.random() < 0.5:
        chosen, given = reference_selection(case, config), None
        numbers = numbers_in_documents(case, chosen)
    else:
        given = numbers = draw_indices(case, seed, rng.random() < 0.5, rng.randint(0, 6))
        chosen = torch.where(numbers < 0, -1, numbers + first_blocks(case)[0][:, None, None])
    label = f"P={size} {layout} seed {seed} {options} {config} given={given is not None} kv {case.k.shape[1]}"
    expected = reference_results(case, chosen)
    ranks = run_threads(size, _on_rank, case, layout, options, config, given, rng.random() < 0.5)
    for results, selection, same in ranks:
        assert torch.equal(selection, numbers), label
        assert same, label
        for name, actual, want in zip(NAMES, results, expected, strict=True):
            assert relative_error(actual, want) < 1e-10, f"{label} {name}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_way_equals_one_rank(size, way):
    # Plain PyTorch takes long to attend for rows that travel.
    for seed in range(1 if way == "query" else 2):
        _holds(size, way, 100 * size + 10 * WAYS.index(way) + seed)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_hundred_cases(size, way):
    for seed in range(6):
        _holds(size, way, 10_000 * size + 100 * WAYS.index(way) + seed)


@pytest.mark.parametrize("sharing", ["sum", "max"])
@pytest.mark.parametrize("score", ["mean", "max"])
def test_a_group_that_is_spread_over_ranks_chooses_together(sharing, score):
    """Four ranks, two KV heads: each of them has half a group."""
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(160, h, 8, generator=g, dtype=torch.float64) for h in (8, 2, 2, 8))
    case = Case(q, k, v, dout, torch.tensor([0, 90, 160], dtype=torch.int32), 16, 3)
    config = MoBAConfig(16, 3, True, sharing, score, sink=True)
    chosen = reference_selection(case, config)
    expected = reference_results(case, chosen)
    for options in (ExchangeOptions("heads"), ExchangeOptions("query", 2)):
        for results, selection, same in run_threads(4, _on_rank, case, "zigzag", options, config, None, False):
            assert torch.equal(selection, numbers_in_documents(case, chosen)) and same
            for name, actual, want in zip(NAMES, results, expected, strict=True):
                assert relative_error(actual, want) < 1e-10, name


def _passes(comm: Communicator, case: Case, options, config: MoBAConfig):
    """Gradients by the two passes of a layer that schedules them itself."""
    cp = CPContext(comm, "zigzag", case.q.shape[0], case.cu_seqlens, exchange=options)
    passes = AttentionPasses("moba", config, case.q.shape[2] ** -0.5, cp, "a layer")
    q, k, v, dout = (cp.shard(x) for x in (case.q, case.k, case.v, case.dout))
    out, kept = passes.forward(q, k, v, True)
    return [cp.unshard(x) for x in (out, *passes.backward(kept.without_index(), q, k, v, out, dout))]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("mode", ["auto", "heads"])
def test_the_passes_of_a_layer(mode, size):
    case = _batch(5, 4, 4, "zigzag")
    case.q, case.k, case.v, case.dout = (
        x[:, :1].repeat(1, heads, 1) for x, heads in ((case.q, 4), (case.k, 2), (case.v, 2), (case.dout, 4))
    )
    case.q = case.q * torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)[:, None]
    config = MoBAConfig(case.block_size, 3, shared_by_group="max", score="max", sink=True)
    expected = reference_results(case, reference_selection(case, config))
    for results in run_threads(size, _passes, case, ExchangeOptions(mode), config):
        for name, actual, want in zip(NAMES, results, expected, strict=False):
            assert relative_error(actual, want) < 1e-10, name


def _observed(comm: Communicator, case: Case, options: ExchangeOptions, config: MoBAConfig):
    seen = []
    cp = CPContext(
        comm, "zigzag", case.q.shape[0], case.cu_seqlens, exchange=options, observer=lambda *x: seen.append(x[1])
    )
    moba_attention(*(cp.shard(x) for x in (case.q, case.k, case.v)), config, cp=cp)
    return cp.unshard(seen[0])


@pytest.mark.parametrize("mode", ["auto", "heads"])
def test_an_observer_sees_a_shared_selection(mode):
    for n_heads in (8, 4):
        case = random_case(8, multiple=8)
        case.q, case.k = torch.randn(case.q.shape[0], n_heads, 8), torch.randn(case.q.shape[0], n_heads // 4, 8)
        case.v, case.dout = case.k.clone(), case.q.clone()
        config = MoBAConfig(case.block_size, 3, shared_by_group="max")
        expected = reference_selection(case, config).int()
        for selection in run_threads(4, _observed, case, ExchangeOptions(mode), config):
            assert torch.equal(selection, expected)


def _wrong_on_one_rank(comm: Communicator, layout: str):
    cp = CPContext(comm, layout, 96)
    q, k = torch.randn(96 // comm.size, 4, 8), torch.randn(96 // comm.size, 2, 8)
    indices = torch.full((96, 2, 2), -1, dtype=torch.int32)
    indices[70:, 0, 0] = 5
    with pytest.raises(ValueError) as error:
        moba_attention(q, k, k, MoBAConfig(16, 3), cp=cp, block_indices=cp.shard(indices), check_indices=True)
    return str(error.value)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_all_ranks_refuse_what_one_of_them_was_given(layout):
    """Tokens 70 to 79 lie in block 4, for which 5 is the future, and those from 80 on in block 5 itself."""
    errors = set(run_threads(3, _wrong_on_one_rank, layout))
    assert len(errors) == 1
    assert "names block 5 for token 70 (head 0 of the selection), which lies behind its own block, 4" in errors.pop()


def _differs(comm: Communicator):
    cp = CPContext(comm, "zigzag", 96)
    q, k = torch.randn(48, 4, 8), torch.randn(48, 2, 8)
    indices = torch.full((48, 4, 2), -1, dtype=torch.int32)
    with pytest.raises(ExchangeError) as error:
        moba_attention(q, k, k, MoBAConfig(16, 3), cp=cp, block_indices=indices if comm.rank else None)
        moba_attention(q, k, k, MoBAConfig(16, 3), cp=cp)
    return str(error.value)


def test_ranks_that_differ_in_where_the_selection_comes_from_are_told():
    for error in run_threads(2, _differs):
        assert "gate is ('given', 4) on rank 1" in error
