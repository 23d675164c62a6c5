"""What a transformer layer does with each token by itself, between its products of matrices: norms, SwiGLU, rotation.

Each kernel reads its inputs once and writes its results once: it is bound by memory, and nothing is fused by chance.

Legend: n tokens, H hidden size, F width of the SwiGLU, g key/value heads, r query heads of each, h = g * r query heads,
D head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, launch_options, next_power_of_2, on_device

# Elements of a tile of rows: enough loads under way, and few enough registers.
TILE = 8192
# Programs of 8 warps that sum the gradient of a norm's weight, each over its rows: some on every multiprocessor.
SUMMING_PROGRAMS = 1024


@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_kernel(x, weight, y, n_rows, eps, H: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    o_h = tl.arange(0, BH)  # [BH]
    m = (o_n < n_rows)[:, None] & (o_h < H)[None, :]  # [BN, BH]
    at = o_n[:, None] * H + o_h[None, :]  # [BN, BH]
    b_x = tl.load(x + at, mask=m, other=0.0).to(tl.float32)  # [BN, BH]
    b_w = tl.load(weight + o_h, mask=o_h < H, other=0.0).to(tl.float32)  # [BH]
    scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / H + eps)  # [BN]
    tl.store(y + at, (b_x * scale[:, None] * b_w[None, :]).to(y.dtype.element_ty), mask=m)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`moba_cp.eager.rms_norm`."""
    x, (n_rows, hidden) = x.contiguous(), x.shape
    y = torch.empty_like(x)
    if y.numel():
        width = next_power_of_2(hidden)
        rows = max(1, TILE // 2 // width)
        with on_device(x):
            _rms_norm_kernel[(cdiv(n_rows, rows),)](
                x=x, weight=weight, y=y, n_rows=n_rows, eps=eps, H=hidden, BH=width, BN=rows, **launch_options(8)
            )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["n_rows", "step"])
def _rms_norm_backward_kernel(
    dy, x, weight, residual, dx, y, dweight, n_rows, step, eps, H: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BH)  # [BH]
    b_w = tl.load(weight + o_h, mask=o_h < H, other=0.0).to(tl.float32)  # [BH]
    # Summed over a tile's rows once: a sum across warps in each turn takes longer than the loads.
    b_dw = tl.zeros([BN, BH], tl.float32)  # [BN, BH]
    for first in range(0, step, BN):
        o_n = i * step + first + tl.arange(0, BN)  # [BN]
        m_n = (o_n < n_rows) & (first + tl.arange(0, BN) < step)  # [BN]
        m = m_n[:, None] & (o_h < H)[None, :]  # [BN, BH]
        at = o_n[:, None] * H + o_h[None, :]  # [BN, BH]
        b_x = tl.load(x + at, mask=m, other=0.0).to(tl.float32)  # [BN, BH]
        b_dy = tl.load(dy + at, mask=m, other=0.0).to(tl.float32)  # [BN, BH]
        b_r = tl.load(residual + at, mask=m, other=0.0).to(tl.float32)  # [BN, BH]
        scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / H + eps)[:, None]  # [BN, 1]
        b_unit = b_x * scale  # [BN, BH]
        b_dw += b_dy * b_unit
        b_dy *= b_w[None, :]
        b_dx = scale * (b_dy - b_unit * (tl.sum(b_unit * b_dy, 1) / H)[:, None])  # [BN, BH]
        tl.store(dx + at, (b_r + b_dx).to(dx.dtype.element_ty), mask=m)
        tl.store(y + at, (b_unit * b_w[None, :]).to(y.dtype.element_ty), mask=m)
    tl.store(dweight + i * H + o_h, tl.sum(b_dw, 0), mask=o_h < H)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`moba_cp.eager.rms_norm_backward`."""
    dy, x, (n_rows, hidden) = dy.contiguous(), x.contiguous(), x.shape
    residual = dx if residual is None else residual.contiguous()
    assert dx.is_contiguous()
    y = torch.empty_like(x)
    width = next_power_of_2(hidden)
    rows = max(1, TILE // 4 // width)
    # So few that rows of a narrow tile are not cut between warps; then as many more programs.
    warps = 8 if width > 1024 else 4
    step = cdiv(cdiv(n_rows, SUMMING_PROGRAMS * 8 // warps), rows) * rows
    programs = cdiv(n_rows, max(1, step))
    dweight = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    if y.numel():
        with on_device(x):
            _rms_norm_backward_kernel[(programs,)](
                dy=dy, x=x, weight=weight, residual=residual, dx=dx, y=y, dweight=dweight,
                n_rows=n_rows, step=step, eps=eps, H=hidden, BH=width, BN=rows, **launch_options(warps),
            )  # fmt: skip
    return y, dweight.sum(0)


@triton.jit(do_not_specialize=["n_rows"])
def _swiglu_kernel(gate_up, out, n_rows, F: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)  # [BF]
    m = (o_n < n_rows)[:, None] & (o_f < F)[None, :]  # [BN, BF]
    p_gate = gate_up + o_n[:, None] * (2 * F) + o_f[None, :]  # [BN, BF]
    b_gate = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)  # [BN, BF]
    b_up = tl.load(p_gate + F, mask=m, other=0.0).to(tl.float32)  # [BN, BF]
    b_out = b_gate * tl.sigmoid(b_gate) * b_up  # [BN, BF]
    tl.store(out + o_n[:, None] * F + o_f[None, :], b_out.to(out.dtype.element_ty), mask=m)


def swiglu(gate_up: Tensor) -> Tensor:
    """See :func:`moba_cp.eager.swiglu`."""
    gate_up, n_rows, width = gate_up.contiguous(), gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n_rows, width)
    if out.numel():
        bf, bn = _swiglu_tile(width)
        with on_device(out):
            _swiglu_kernel[(cdiv(n_rows, bn), cdiv(width, bf))](
                gate_up=gate_up, out=out, n_rows=n_rows, F=width, BF=bf, BN=bn, **launch_options(8)
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_rows"])
def _swiglu_backward_kernel(
    gate_up, dout, out, dgate_up, n_rows, F: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)  # [BF]
    m = (o_n < n_rows)[:, None] & (o_f < F)[None, :]  # [BN, BF]
    at, at_gate = o_n[:, None] * F + o_f[None, :], o_n[:, None] * (2 * F) + o_f[None, :]  # [BN, BF], [BN, BF]
    b_gate = tl.load(gate_up + at_gate, mask=m, other=0.0).to(tl.float32)  # [BN, BF]
    b_up = tl.load(gate_up + at_gate + F, mask=m, other=0.0).to(tl.float32)  # [BN, BF]
    b_dout = tl.load(dout + at, mask=m, other=0.0).to(tl.float32)  # [BN, BF]
    b_sigmoid = tl.sigmoid(b_gate)  # [BN, BF]
    b_silu = b_gate * b_sigmoid  # [BN, BF]
    b_dgate = b_dout * b_up * (b_sigmoid + b_silu * (1 - b_sigmoid))  # [BN, BF]
    tl.store(out + at, (b_silu * b_up).to(out.dtype.element_ty), mask=m)
    tl.store(dgate_up + at_gate, b_dgate.to(out.dtype.element_ty), mask=m)
    tl.store(dgate_up + at_gate + F, (b_dout * b_silu).to(out.dtype.element_ty), mask=m)


def swiglu_backward(gate_up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`moba_cp.eager.swiglu_backward`."""
    gate_up, dout, (n_rows, width) = gate_up.contiguous(), dout.contiguous(), dout.shape
    out, dgate_up = torch.empty_like(dout), torch.empty_like(gate_up)
    if out.numel():
        bf, bn = _swiglu_tile(width)
        with on_device(out):
            _swiglu_backward_kernel[(cdiv(n_rows, bn), cdiv(width, bf))](
                gate_up=gate_up, dout=dout, out=out, dgate_up=dgate_up, n_rows=n_rows, F=width, BF=bf, BN=bn,
                **launch_options(8),
            )  # fmt: skip
    return out, dgate_up


def _swiglu_tile(width: int) -> tuple[int, int]:
    bf = min(1024, next_power_of_2(width))
    return bf, max(1, TILE // 2 // bf)


@triton.jit
def _unit_scale(b_low, b_high, eps, D: tl.constexpr):
    """[BN], the factor that makes the mean square of a head, given in halves [BN, BD], one."""
    return tl.rsqrt((tl.sum(b_low * b_low, 1) + tl.sum(b_high * b_high, 1)) / D + eps)


@triton.jit(do_not_specialize=["n_rows"])
def _split_rotate_kernel(
    mixed, cos, sin, q_norm, k_norm, q, k, v, n_rows, eps,
    G: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    o_d = tl.arange(0, BD)  # [BD]
    m = (o_n < n_rows)[:, None] & (o_d < HALF)[None, :]  # [BN, BD]
    at_angle = o_n[:, None] * HALF + o_d[None, :]  # [BN, BD]
    b_cos, b_sin = tl.load(cos + at_angle, mask=m, other=0.0), tl.load(sin + at_angle, mask=m, other=0.0)  # [BN, BD]
    for head in range(0, G * (R + 2)):
        i_g, i_r = head // (R + 2), head % (R + 2)
        p_in = mixed + (o_n * (G * (R + 2)) + head)[:, None] * D + o_d[None, :]  # [BN, BD]
        b_low = tl.load(p_in, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
        b_high = tl.load(p_in + HALF, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
        if i_r == R + 1:
            p_out = v + (o_n * G + i_g)[:, None] * D + o_d[None, :]  # [BN, BD]
            tl.store(p_out, b_low.to(v.dtype.element_ty), mask=m)
            tl.store(p_out + HALF, b_high.to(v.dtype.element_ty), mask=m)
        else:
            if NORMED:
                p_w = tl.where(i_r == R, k_norm, q_norm) + o_d  # [BD]
                scale = _unit_scale(b_low, b_high, eps, D)[:, None]  # [BN, 1]
                b_low *= scale * tl.load(p_w, mask=o_d < HALF, other=0.0).to(tl.float32)[None, :]
                b_high *= scale * tl.load(p_w + HALF, mask=o_d < HALF, other=0.0).to(tl.float32)[None, :]
            b_first = (b_low * b_cos - b_high * b_sin).to(q.dtype.element_ty)  # [BN, BD]
            b_second = (b_high * b_cos + b_low * b_sin).to(q.dtype.element_ty)  # [BN, BD]
            if i_r == R:
                p_out = k + (o_n * G + i_g)[:, None] * D + o_d[None, :]  # [BN, BD]
            else:
                p_out = q + (o_n * (G * R) + i_g * R + i_r)[:, None] * D + o_d[None, :]  # [BN, BD]
            tl.store(p_out, b_first, mask=m)
            tl.store(p_out + HALF, b_second, mask=m)


def split_rotate(
    mixed: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    """See :func:`moba_cp.eager.split_rotate`."""
    mixed, cos, sin = (x.contiguous() for x in (mixed, cos, sin))
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    if mixed.numel():
        with on_device(mixed):
            _split_rotate_kernel[(cdiv(mixed.shape[0], _rows_of(mixed)),)](
                mixed=mixed, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm, q=q, k=k, v=v,
                **_rotation(mixed, eps, q_norm), **launch_options(4),
            )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "step"])
def _split_rotate_backward_kernel(
    dq, dk, dv, cos, sin, q_norm, k_norm, mixed, dmixed, dweights, n_rows, step, eps,
    G: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF
    i = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < HALF  # [BD]
    b_dwq_low, b_dwq_high = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)  # [BD], [BD]
    b_dwk_low, b_dwk_high = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)  # [BD], [BD]
    for first in range(0, step, BN):
        o_n = i * step + first + tl.arange(0, BN)  # [BN]
        m_n = (o_n < n_rows) & (first + tl.arange(0, BN) < step)  # [BN]
        m = m_n[:, None] & m_d[None, :]  # [BN, BD]
        at_angle = o_n[:, None] * HALF + o_d[None, :]  # [BN, BD]
        b_cos, b_sin = tl.load(cos + at_angle, mask=m, other=0.0), tl.load(sin + at_angle, mask=m, other=0.0)
        for head in range(0, G * (R + 2)):
            i_g, i_r = head // (R + 2), head % (R + 2)
            at = (o_n * (G * (R + 2)) + head)[:, None] * D + o_d[None, :]  # [BN, BD]
            if i_r == R + 1:
                p_in = dv + (o_n * G + i_g)[:, None] * D + o_d[None, :]  # [BN, BD]
            elif i_r == R:
                p_in = dk + (o_n * G + i_g)[:, None] * D + o_d[None, :]  # [BN, BD]
            else:
                p_in = dq + (o_n * (G * R) + i_g * R + i_r)[:, None] * D + o_d[None, :]  # [BN, BD]
            b_first = tl.load(p_in, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
            b_second = tl.load(p_in + HALF, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
            if i_r == R + 1:
                b_low, b_high = b_first, b_second
            else:
                b_low = b_first * b_cos + b_second * b_sin
                b_high = b_second * b_cos - b_first * b_sin
                if NORMED:
                    b_x = tl.load(mixed + at, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
                    b_x2 = tl.load(mixed + at + HALF, mask=m, other=0.0).to(tl.float32)  # [BN, BD]
                    scale = _unit_scale(b_x, b_x2, eps, D)[:, None]  # [BN, 1]
                    b_x *= scale
                    b_x2 *= scale
                    is_key = i_r == R
                    b_dw, b_dw2 = tl.sum(b_low * b_x, 0), tl.sum(b_high * b_x2, 0)  # [BD], [BD]
                    b_dwq_low += tl.where(is_key, 0.0, b_dw)
                    b_dwq_high += tl.where(is_key, 0.0, b_dw2)
                    b_dwk_low += tl.where(is_key, b_dw, 0.0)
                    b_dwk_high += tl.where(is_key, b_dw2, 0.0)
                    p_w = tl.where(is_key, k_norm, q_norm) + o_d  # [BD]
                    b_low *= tl.load(p_w, mask=m_d, other=0.0).to(tl.float32)[None, :]
                    b_high *= tl.load(p_w + HALF, mask=m_d, other=0.0).to(tl.float32)[None, :]
                    b_mean = ((tl.sum(b_low * b_x, 1) + tl.sum(b_high * b_x2, 1)) / D)[:, None]  # [BN, 1]
                    b_low = scale * (b_low - b_x * b_mean)
                    b_high = scale * (b_high - b_x2 * b_mean)
            tl.store(dmixed + at, b_low.to(dmixed.dtype.element_ty), mask=m)
            tl.store(dmixed + at + HALF, b_high.to(dmixed.dtype.element_ty), mask=m)
    if NORMED:
        p_dw = dweights + i * (2 * D) + o_d  # [BD]
        tl.store(p_dw, b_dwq_low, mask=m_d)
        tl.store(p_dw + HALF, b_dwq_high, mask=m_d)
        tl.store(p_dw + D, b_dwk_low, mask=m_d)
        tl.store(p_dw + D + HALF, b_dwk_high, mask=m_d)


def split_rotate_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    mixed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`moba_cp.eager.split_rotate_backward`."""
    dq, dk, dv, cos, sin = (x.contiguous() for x in (dq, dk, dv, cos, sin))
    (n_rows, n_kv, dim), group = dv.shape, dq.shape[1] // dv.shape[1]
    dmixed = dv.new_empty(n_rows, n_kv, group + 2, dim)
    rows = _rows_of(dmixed)
    step = cdiv(cdiv(n_rows, 4 * SUMMING_PROGRAMS), rows) * rows
    programs = cdiv(n_rows, max(1, step))
    normed = mixed is not None
    dweights = torch.empty(programs if normed else 0, 2, dim, dtype=torch.float32, device=dv.device)
    if dmixed.numel():
        with on_device(dmixed):
            _split_rotate_backward_kernel[(programs,)](
                dq=dq, dk=dk, dv=dv, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm,
                mixed=None if mixed is None else mixed.contiguous(), dmixed=dmixed, dweights=dweights, step=step,
                **_rotation(dmixed, eps, q_norm if normed else None), **launch_options(4),
            )  # fmt: skip
    if not normed:
        return dmixed, None, None
    dq_norm, dk_norm = dweights.sum(0)
    return dmixed, dq_norm, dk_norm


def _rows_of(mixed: Tensor) -> int:
    """Tokens of a tile; mixed [n, g, r + 2, D]."""
    return max(1, TILE // 4 // next_power_of_2(mixed.shape[3] // 2))


def _rotation(mixed: Tensor, eps: float, norm: Tensor | None) -> dict:
    """What both rotations are launched with; mixed [n, g, r + 2, D]."""
    n_rows, n_kv, heads, dim = mixed.shape
    sizes = {"G": n_kv, "R": heads - 2, "HALF": dim // 2, "NORMED": norm is not None}
    return {"n_rows": n_rows, "eps": eps, **sizes, "BD": next_power_of_2(dim // 2), "BN": _rows_of(mixed)}
