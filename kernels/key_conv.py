"""A short causal convolution over rows of keys, each pair of channels by weights of its own, and its gradients.

Both kernels are bound by memory: a program reads its rows once from there, and those that stand just before or behind
from the caches. Gradients of the weight are summed by tile, and the tiles' sums in one order: no atomics. Products and
sums are not rounded together, so that rows are plain PyTorch's to the bit.

Legend: L rows, G key heads, D = 2 HALF head dim, W width. One program takes BN rows of one head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, check_unit_stride, launch_options, next_power_of_2, on_device

# Pairs of channels of a tile: enough loads under way, and few enough registers.
TILE = 2048


@triton.jit(do_not_specialize=["n_rows"])
def _convolve_kernel(
    k, weight, inside, out, n_rows, s_kr, s_kh,
    G: tl.constexpr, HALF: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # Heads of the same rows run side by side, since they share lines of memory.
    i_n, i_h = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    o_n, o_d = i_n * BN + tl.arange(0, BN), tl.arange(0, BD)  # [BN], [BD]
    m_n, m_d = o_n < n_rows, o_d < HALF  # [BN], [BD]
    m = m_n[:, None] & m_d[None, :]  # [BN, BD]
    b_inside = tl.load(inside + o_n, mask=m_n, other=0)  # [BN]
    p_w = weight + (i_h * HALF + o_d) * W  # [BD]
    p_k = k + o_n[:, None] * s_kr + i_h.to(tl.int64) * s_kh + o_d[None, :]  # [BN, BD]
    b_low = tl.load(p_k, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
    b_high = tl.load(p_k + HALF, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
    b_w = tl.load(p_w, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
    b_low += b_w * b_low
    b_high += b_w * b_high
    for j in tl.static_range(1, W):
        m_j = m & (b_inside >= j)[:, None]  # [BN, BD]
        p_k -= s_kr
        b_w = tl.load(p_w + j, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
        b_low += b_w * tl.load(p_k, mask=m_j, other=0.0).to(tl.float32)
        b_high += b_w * tl.load(p_k + HALF, mask=m_j, other=0.0).to(tl.float32)
    p_out = out + (o_n[:, None] * G + i_h) * (2 * HALF) + o_d[None, :]  # [BN, BD]
    tl.store(p_out, b_low.to(out.dtype.element_ty), mask=m)
    tl.store(p_out + HALF, b_high.to(out.dtype.element_ty), mask=m)


def convolve(k: Tensor, weight: Tensor, inside: Tensor) -> Tensor:
    """See :func:`moba_cp.eager.convolve`."""
    k, weight = check_unit_stride(k), weight.contiguous()
    out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if out.numel():
        sizes, programs = _sizes(k, weight)
        with on_device(k):
            _convolve_kernel[(programs,)](
                k=k, weight=weight, inside=inside, out=out, n_rows=k.shape[0], s_kr=k.stride(0), s_kh=k.stride(1),
                **sizes, **launch_options(4, fused=False),
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_rows"])
def _convolve_backward_kernel(
    dout, k, weight, inside, dk, dweight, n_rows, s_or, s_oh, s_kr, s_kh,
    G: tl.constexpr, HALF: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_n, i_h = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    o_n, o_d = i_n * BN + tl.arange(0, BN), tl.arange(0, BD)  # [BN], [BD]
    m_d = o_d < HALF  # [BD]
    m = (o_n < n_rows)[:, None] & m_d[None, :]  # [BN, BD]
    p_w = weight + (i_h * HALF + o_d) * W  # [BD]
    p_dw = dweight + ((i_n * G + i_h) * HALF + o_d) * W  # [BD]
    p_o = dout + o_n[:, None] * s_or + i_h.to(tl.int64) * s_oh + o_d[None, :]  # [BN, BD]
    p_k = k + o_n[:, None] * s_kr + i_h.to(tl.int64) * s_kh + o_d[None, :]  # [BN, BD]
    b_k_low = tl.load(p_k, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
    b_k_high = tl.load(p_k + HALF, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
    b_low = tl.load(p_o, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
    b_high = tl.load(p_o + HALF, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
    tl.store(p_dw, tl.sum(b_k_low * b_low + b_k_high * b_high, 0), mask=m_d)
    b_w = tl.load(p_w, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
    b_low += b_w * b_low
    b_high += b_w * b_high
    for j in tl.static_range(1, W):
        # The row behind that has a part of this one, and says so itself.
        m_n = o_n + j < n_rows  # [BN]
        b_inside = tl.load(inside + o_n + j, mask=m_n, other=0)  # [BN]
        m_j = (m_n & (b_inside >= j))[:, None] & m_d[None, :]  # [BN, BD]
        p_o += s_or
        b_o_low = tl.load(p_o, mask=m_j, other=0.0).to(tl.float32)  # [BN, BD]
        b_o_high = tl.load(p_o + HALF, mask=m_j, other=0.0).to(tl.float32)  # [BN, BD]
        tl.store(p_dw + j, tl.sum(b_k_low * b_o_low + b_k_high * b_o_high, 0), mask=m_d)
        b_w = tl.load(p_w + j, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
        b_low += b_w * b_o_low
        b_high += b_w * b_o_high
    p_dk = dk + (o_n[:, None] * G + i_h) * (2 * HALF) + o_d[None, :]  # [BN, BD]
    tl.store(p_dk, b_low.to(dk.dtype.element_ty), mask=m)
    tl.store(p_dk + HALF, b_high.to(dk.dtype.element_ty), mask=m)


def convolve_backward(dout: Tensor, k: Tensor, weight: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`moba_cp.eager.convolve_backward`."""
    dout, k, weight = check_unit_stride(dout), check_unit_stride(k), weight.contiguous()
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if not dk.numel():
        return dk, torch.zeros(weight.shape, dtype=torch.float32, device=k.device)
    sizes, programs = _sizes(k, weight)
    dweight = torch.empty(cdiv(len(k), sizes["BN"]), *weight.shape, dtype=torch.float32, device=k.device)
    with on_device(k):
        _convolve_backward_kernel[(programs,)](
            dout=dout, k=k, weight=weight, inside=inside, dk=dk, dweight=dweight, n_rows=k.shape[0],
            s_or=dout.stride(0), s_oh=dout.stride(1), s_kr=k.stride(0), s_kh=k.stride(1),
            **sizes, **launch_options(4, fused=False),
        )  # fmt: skip
    return dk, dweight.sum(0)


def _sizes(k: Tensor, weight: Tensor) -> tuple[dict[str, int], int]:
    """Compile-time sizes of both kernels, and how many programs there are; k [L, g, D], weight [g D / 2, w]."""
    n_rows, n_heads, dim = k.shape
    assert weight.shape[0] == n_heads * (dim // 2)
    width = next_power_of_2(dim // 2)
    rows = max(1, TILE // width)
    sizes = {"G": n_heads, "HALF": dim // 2, "W": weight.shape[1], "BD": width, "BN": rows}
    return sizes, cdiv(n_rows, rows) * n_heads
