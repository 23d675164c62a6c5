"""moba_attention through the kernels: the golden files, and what torch.compile and FakeTensor see."""

import pytest
import torch

from moba_cp import MoBAConfig, eager, kernels, moba_attention, ops
from moba_cp.blocks import block_table
from tests.helpers.cases import GOLDEN, Case, compile_and_compare, golden, run
from tests.helpers.kernel_inputs import DEVICE


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path):
    case = golden(path)
    case.q, case.k, case.v, case.dout, case.cu_seqlens = (
        x.to(DEVICE) for x in (case.q, case.k, case.v, case.dout, case.cu_seqlens)
    )
    assert ops.backend(case.q) is kernels
    config = MoBAConfig(case.block_size, case.top_k)
    ours = run(moba_attention, case, config, cu_seqlens=case.cu_seqlens)
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), ours, case.expected):
        # A gradient that is exactly zero has no scale of its own: dq and dk of a single token.
        bound = 1e-5 * max(1.0, expected.abs().max().item())
        assert (actual.cpu() - expected).abs().max() <= bound, name


def test_bfloat16_is_right_without_a_gpu_too():
    """The interpreter computes it wrongly, so that there it is the plain path's."""
    g = torch.Generator().manual_seed(0)
    case = Case(*(torch.randn(40, h, 16, generator=g).bfloat16() for h in (2, 1, 1, 2)), None, 16, 3)
    case.q, case.k, case.v, case.dout = (x.to(DEVICE) for x in (case.q, case.k, case.v, case.dout))
    assert ops.backend(case.q) is (kernels if DEVICE == "cuda" else eager)
    # All blocks are chosen, so that rounded scores choose no others.
    wide = run(moba_attention, case.to(torch.float64), MoBAConfig(16, 3))
    for actual, expected in zip(run(moba_attention, case, MoBAConfig(16, 3)), wide, strict=True):
        assert (actual.double() - expected).abs().max() <= 3e-2 * expected.abs().max()


def test_operators_agree_with_their_fakes():
    q, k, v = (torch.randn(70, h, 16, device=DEVICE, requires_grad=True) for h in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 30, 70], dtype=torch.int32, device=DEVICE)
    for documents in (None, cu_seqlens):
        args = q, k, v, documents, 16, 3, 0.25, False
        torch.library.opcheck(torch.ops.moba_cp.moba_attention, args, test_utils=("test_schema", "test_faketensor"))
        out, lse, chosen, index = torch.ops.moba_cp.moba_attention(*args)
        assert index.numel() > 70 * 4 * 3
        args = torch.randn_like(out), q, k, v, out, lse, chosen, index, documents, 16, 0.25, False
        with torch.no_grad():
            torch.library.opcheck(
                torch.ops.moba_cp.moba_attention_backward, args, test_utils=("test_schema", "test_faketensor")
            )


def test_compiled_as_one_graph_for_every_length():
    compile_and_compare(DEVICE)


def test_table_of_documents_is_not_kept():
    """Two batches of equal length and other documents."""
    q, k, v = (torch.randn(64, 1, 16, device=DEVICE) for _ in range(3))
    whole = moba_attention(q, k, v, MoBAConfig(16, 2))
    cut = moba_attention(q, k, v, MoBAConfig(16, 2), cu_seqlens=torch.tensor([0, 20, 64], dtype=torch.int32))
    again = moba_attention(q, k, v, MoBAConfig(16, 2))
    assert torch.equal(whole, again) and not torch.equal(whole, cut)
    assert block_table(64, 16, None, DEVICE).n_blocks == 5
