"""What attention gives blocks: its softmax added up over a block's keys and over the query heads of one KV head.

Legend: R query rows, G query heads of the KV head, D head dim, T keys, B block size, n blocks, S blocks of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    cdiv,
    check_head_dim,
    check_unit_stride,
    dot_precision,
    launch_options,
    next_power_of_2,
    on_device,
    padded_dim,
)


@triton.jit
def _weights(b_q, b_k, b_lse, m_n, scale, PRECISION: tl.constexpr):
    """The softmax [BM, BN] of rows in keys; scores above the log-sum-exp are of keys that are not attended to."""
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale - b_lse[:, None]  # [BM, BN]
    # A NaN stays one.
    b_s = tl.where(b_s > 0.0, 0.0, b_s)
    return tl.where(m_n[None, :], tl.exp(b_s), 0.0)


@triton.jit(do_not_specialize=["n_rows", "n_keys"])
def _block_masses_kernel(
    q, k, lse, start, masses,
    n_rows, n_keys, s_qt, s_qh, s_kt, s_lt, s_lh, s_mt, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Blocks along the first dimension of the grid, which may be large.
    i_b, i_m = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)  # [BM]
    o_n = tl.arange(0, BN)  # [BN]
    o_d = tl.arange(0, BD)  # [BD]
    m_m, m_d = o_m < n_rows, o_d < D  # [BM], [BD]
    begin = tl.load(start + i_b).to(tl.int64)
    b_mass = tl.zeros([BM], dtype=tl.float32)  # [BM]
    for i_h in range(0, G):
        p_q = q + o_m.to(tl.int64)[:, None] * s_qt + i_h * s_qh + o_d[None, :]  # [BM, BD]
        b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
        b_lse = tl.load(lse + o_m.to(tl.int64) * s_lt + i_h * s_lh, mask=m_m, other=0.0)  # [BM]
        for lo in range(0, B, BN):
            m_n = (lo + o_n < B) & (begin + lo + o_n < n_keys)  # [BN]
            p_k = k + (begin + lo + o_n)[None, :] * s_kt + o_d[:, None]  # [BD, BN]
            b_k = tl.load(p_k, mask=m_n[None, :] & m_d[:, None], other=0.0)  # [BD, BN]
            b_mass += tl.sum(_weights(b_q, b_k, b_lse, m_n, scale, PRECISION), 1)
    tl.store(masses + o_m.to(tl.int64) * s_mt + i_b, b_mass, mask=m_m)


@triton.jit(do_not_specialize=["n_keys"])
def _selected_masses_kernel(
    q, k, lse, start, masses,
    n_keys, s_qt, s_qh, s_kt, s_lt, s_lh, scale,
    S: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, BG)  # [BG]
    o_n = tl.arange(0, BN)  # [BN]
    o_d = tl.arange(0, BD)  # [BD]
    m_g, m_d = o_g < G, o_d < D  # [BG], [BD]
    p_q = q + i_r * s_qt + o_g[:, None] * s_qh + o_d[None, :]  # [BG, BD]
    b_q = tl.load(p_q, mask=m_g[:, None] & m_d[None, :], other=0.0)  # [BG, BD]
    b_lse = tl.load(lse + i_r * s_lt + o_g * s_lh, mask=m_g, other=0.0)  # [BG]
    for i_s in range(0, S):
        begin = tl.load(start + i_r * S + i_s).to(tl.int64)
        # What is none has no keys.
        end = tl.where(begin < 0, begin, tl.minimum(begin + B, n_keys))
        b_mass = tl.zeros([BG], dtype=tl.float32)  # [BG]
        for lo in range(0, B, BN):
            m_n = (lo + o_n < B) & (begin + lo + o_n < end)  # [BN]
            p_k = k + (begin + lo + o_n)[None, :] * s_kt + o_d[:, None]  # [BD, BN]
            b_k = tl.load(p_k, mask=m_n[None, :] & m_d[:, None], other=0.0)  # [BD, BN]
            b_mass += tl.sum(_weights(b_q, b_k, b_lse, m_n, scale, PRECISION), 1)
        tl.store(masses + i_r * S + i_s, tl.sum(tl.where(m_g, b_mass, 0.0), 0))


def block_masses(q: Tensor, k: Tensor, lse: Tensor, start: Tensor, block_size: int, scale: float) -> Tensor:
    """See :func:`moba_cp.eager.block_masses`; q and k are float32, bfloat16 or float16, lse is float32."""
    check_head_dim(q.shape[2])
    q, k, start = check_unit_stride(q), check_unit_stride(k), start.contiguous()
    (n_rows, group, dim), n = q.shape, start.numel()
    masses = torch.empty(n_rows, n, dtype=torch.float32, device=q.device)
    if masses.numel() == 0:
        return masses
    bm, bn = 64, min(64, next_power_of_2(block_size))
    with on_device(q):
        _block_masses_kernel[(n, cdiv(n_rows, bm))](
            q=q, k=k, lse=lse, start=start, masses=masses,
            n_rows=n_rows, n_keys=k.shape[0], s_qt=q.stride(0), s_qh=q.stride(1), s_kt=k.stride(0),
            s_lt=lse.stride(0), s_lh=lse.stride(1), s_mt=masses.stride(0), scale=scale,
            G=group, D=dim, BD=padded_dim(dim), B=block_size, BM=bm, BN=bn,
            PRECISION=dot_precision(q.dtype), **launch_options(4),
        )  # fmt: skip
    return masses


def selected_masses(q: Tensor, k: Tensor, lse: Tensor, start: Tensor, block_size: int, scale: float) -> Tensor:
    """See :func:`moba_cp.eager.selected_masses`; dtypes as of :func:`block_masses`."""
    check_head_dim(q.shape[2])
    q, k, start = check_unit_stride(q), check_unit_stride(k), start.contiguous()
    (n_rows, group, dim), n_slots = q.shape, start.shape[1]
    masses = torch.empty(n_rows, n_slots, dtype=torch.float32, device=q.device)
    if masses.numel() == 0:
        return masses
    with on_device(q):
        _selected_masses_kernel[(n_rows,)](
            q=q, k=k, lse=lse, start=start, masses=masses,
            n_keys=k.shape[0], s_qt=q.stride(0), s_qh=q.stride(1), s_kt=k.stride(0), s_lt=lse.stride(0),
            s_lh=lse.stride(1), scale=scale,
            S=n_slots, G=group, BG=max(16, next_power_of_2(group)), D=dim, BD=padded_dim(dim), B=block_size,
            BN=min(64, next_power_of_2(block_size)), PRECISION=dot_precision(q.dtype), **launch_options(4),
        )  # fmt: skip
    return masses
