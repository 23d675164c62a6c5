"""What a transformer layer does with each token by itself, between its products of matrices: norms, SwiGLU, rotation,
and their gradients.

Legend: n tokens, H hidden size, F width of the SwiGLU, g key/value heads, r query heads of each, h = g * r query heads,
D head dim. Wide means float32, or float64 for float64 inputs; inside everything is wide.
"""

import torch
from torch import Tensor

from ..dtypes import WIDE


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; in x's dtype. x [n, H], weight [H]."""
    wide = x.to(WIDE[x.dtype])
    return (wide * _inverse_rms(wide, eps) * weight).to(x.dtype)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm` whose input also goes on by itself, around what follows the norm.

    Args:
        dy, x: [n, H].
        residual: [n, H], gradient of the input by the other way; None where ``dx`` holds it.
        dx: [n, H], written: gradient by both ways.

    Returns:
        the norm's output [n, H] again, and the weight's gradient [H] wide.
    """
    dtype = WIDE[x.dtype]
    wide, dy = x.to(dtype), dy.to(dtype)
    scale = _inverse_rms(wide, eps)
    unit, weighted = wide * scale, dy * weight
    through = scale * (weighted - unit * (unit * weighted).mean(-1, keepdim=True))
    dx.copy_((dx if residual is None else residual) + through)
    return (unit * weight).to(x.dtype), (dy * unit).sum(0)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, [n, F] in the input's dtype; gate_up [n, 2 F], the gate first."""
    gate, up = gate_up.to(WIDE[gate_up.dtype]).chunk(2, -1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def swiglu_backward(gate_up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The output of :func:`swiglu` again, [n, F], and the gradient of its input, [n, 2 F]; dout [n, F]."""
    dtype = WIDE[gate_up.dtype]
    (gate, up), dout = gate_up.to(dtype).chunk(2, -1), dout.to(dtype)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    dgate = dout * up * (sigmoid + silu * (1 - sigmoid))
    return (silu * up).to(gate_up.dtype), torch.cat((dgate, dout * silu), -1).to(gate_up.dtype)


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
    """Queries, keys and values out of one projection: with a norm of each head where there are weights, and turned.

    Args:
        mixed: [n, g, r + 2, D]: of each KV head its queries, its key and its value.
        cos, sin: [n, D / 2] wide, of the angles by which each token turns.
        q_norm, k_norm: [D] or None.
        q: [n, h, D], written. k, v: [n, g, D], written.
    """
    group = mixed.shape[2] - 2
    wide = mixed.to(WIDE[mixed.dtype])
    queries, keys = wide[:, :, :group].flatten(1, 2), wide[:, :, group]
    q.copy_(_turn(_scaled(queries, q_norm, eps), cos, sin))
    k.copy_(_turn(_scaled(keys, k_norm, eps), cos, sin))
    v.copy_(mixed[:, :, group + 1])


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
    """The gradient of ``mixed`` [n, g, r + 2, D], and of the two norms' weights [D] wide, of :func:`split_rotate`.

    ``mixed`` is needed only with norms.
    """
    dtype, n_kv = WIDE[dv.dtype], dv.shape[1]
    queries, keys = _turn(dq.to(dtype), cos, -sin), _turn(dk.to(dtype), cos, -sin)
    dq_norm = dk_norm = None
    if mixed is not None and q_norm is not None and k_norm is not None:
        wide = mixed.to(dtype)
        queries, dq_norm = _scaled_backward(queries, wide[:, :, :-2].flatten(1, 2), q_norm, eps)
        keys, dk_norm = _scaled_backward(keys, wide[:, :, -2], k_norm, eps)
    queries = queries.unflatten(1, (n_kv, -1))
    return torch.cat((queries.to(dv.dtype), keys[:, :, None].to(dv.dtype), dv[:, :, None]), 2), dq_norm, dk_norm


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _scaled(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else (x * _inverse_rms(x, eps) * weight)


def _scaled_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = _inverse_rms(x, eps)
    unit, weighted = x * scale, dy * weight
    return scale * (weighted - unit * (unit * weighted).mean(-1, keepdim=True)), (dy * unit).sum((0, 1))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (i, i + D / 2) of x [n, heads, D] turned by its token's angle."""
    low, high = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
