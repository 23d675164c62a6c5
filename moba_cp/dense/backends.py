"""What computes dense attention locally: flash-attn-4, cuDNN, PyTorch's flash kernels, or plain PyTorch.

A backend takes one :class:`~moba_cp.dense.ranges.Call` and the rows and keys it takes part with. Forward returns the
attention over these keys alone; backward is given the output and log-sum-exp over *all* keys of the rows, so that it
returns these keys' share of the final gradients.

Legend: n rows and m keys of a call, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim.
"""

import contextlib
import functools

import numpy as np
import torch
from torch import Tensor

from ..dtypes import WIDE
from . import plain
from .ranges import Call, Ranges, build_ranges

aten = torch.ops.aten


class Plain:
    """Plain PyTorch, for everything the others refuse: float64, float32, CPU."""

    name = "plain"

    def refusal(self, q: Tensor, deterministic: bool) -> str | None:
        """Why this backend cannot serve tensors like ``q`` [N, Hq, D]; None if it can."""
        return None

    def calls(self, ranges: Ranges, device: torch.device) -> list[Call]:
        """The calls that cover ``ranges``: here one per rectangle."""
        return ranges.single_calls()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        """out [n, Hq, D] in any dtype, lse [n, Hq] wide; q [n, Hq, D], k, v [m, Hkv, D]."""
        return plain.attention(q, k, v, call.causal, scale)

    def backward(self, q, k, v, call: Call, scale: float, dout, out, lse, deterministic: bool):
        """dq [n, Hq, D], dk, dv [m, Hkv, D] in any dtype; dout, out [n, Hq, D] and lse [n, Hq] over all keys."""
        wide = WIDE[out.dtype]
        delta = torch.linalg.vecdot(dout.to(wide), out.to(wide))
        return plain.attention_backward(q, k, v, call.causal, scale, dout, lse, delta)


class _Fused:
    """What the fused kernels have in common."""

    max_head_dim = 256

    def refusal(self, q: Tensor, deterministic: bool) -> str | None:
        if not q.is_cuda:
            return "q is not on a GPU"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"dtype {q.dtype} is neither bfloat16 nor float16"
        if q.shape[2] % 8 or q.shape[2] > self.max_head_dim:
            return f"head_dim {q.shape[2]} is not a multiple of 8 up to {self.max_head_dim}"
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            return "the GPU is older than compute capability 8.0"
        return None

    def calls(self, ranges: Ranges, device: torch.device) -> list[Call]:
        return ranges.calls(device)


class Flash(_Fused):
    """PyTorch's own FlashAttention-2: packed documents in one call, deterministic on request."""

    name = "flash"

    def refusal(self, q: Tensor, deterministic: bool) -> str | None:
        if not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch was built without flash attention"
        return super().refusal(q, deterministic)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, call.cu_rows, call.cu_keys, _max_rows(call), call.max_keys, 0.0, call.causal, False, scale=scale
        )
        return out, lse.t()

    def backward(self, q, k, v, call: Call, scale: float, dout, out, lse, deterministic: bool):
        unused = torch.zeros(2, dtype=torch.int64, device=q.device).view(torch.uint64)

        def one_group(q, dout, out, lse):
            return aten._flash_attention_backward(
                dout, q, k, v, out, lse.t().contiguous(), call.cu_rows, call.cu_keys, _max_rows(call), call.max_keys,
                0.0, call.causal, unused, unused, scale=scale,
            )  # fmt: skip

        with _deterministic_algorithms() if deterministic else contextlib.nullcontext():
            return _by_group(one_group, q, k, dout, out, lse)


class CuDNN(_Fused):
    """cuDNN through PyTorch: the fastest that needs nothing installed, one rectangle of one document at a time."""

    name = "cudnn"
    max_head_dim = 128
    smallest_side = 64

    def refusal(self, q: Tensor, deterministic: bool) -> str | None:
        if deterministic:
            return "its backward pass is not deterministic"
        if q.is_cuda and not (torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()):
            return "cuDNN attention is not available or switched off in torch.backends.cuda"
        if q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0):
            return "the GPU is older than compute capability 9.0, where flash is as fast"
        return super().refusal(q, deterministic)

    def calls(self, ranges: Ranges, device: torch.device) -> list[Call]:
        # cuDNN's causal mask starts at the first key: a trapezoid is a full rectangle beside a square.
        return ranges.single_calls(squares=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), None, True, 0.0, call.causal, False, scale=scale
        )
        return out[0].transpose(0, 1), lse.view(q.shape[1], q.shape[0]).t()

    def backward(self, q, k, v, call: Call, scale: float, dout, out, lse, deterministic: bool):
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        stats_shape = (1, k.shape[1], q.shape[0], 1)[: _cudnn_stats_dims(q.device)]

        def one_group(q, dout, out, lse):
            # PyTorch caches cuDNN's plans by the strides of q, k and v alone: dout and out must have those of q.
            assert dout.stride() == out.stride() == q.stride()
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                *(x.transpose(0, 1)[None] for x in (dout, q, k, v, out)), lse.t().contiguous().view(stats_shape),
                unused, unused, None, None, None, q.shape[0], k.shape[0], 0.0, call.causal, scale=scale,
            )  # fmt: skip
            return tuple(x[0].transpose(0, 1) for x in grads)

        return _by_group(one_group, q, k, dout, out, lse)


class FlashAttention4(_Fused):
    """flash-attn-4 (``flash_attn.cute``), if installed: the fastest on Hopper and Blackwell, packed documents too."""

    name = "fa4"
    max_head_dim = 128

    def refusal(self, q: Tensor, deterministic: bool) -> str | None:
        if isinstance(_flash_attn_cute(), str):
            return _flash_attn_cute()
        if deterministic:
            return "its backward pass is not used deterministically here"
        if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
            return "the GPU is neither of compute capability 9 nor 10"
        return super().refusal(q, deterministic) or _fa4_fault(q.device, q.dtype, q.shape[2])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        batch = call.cu_rows.numel() - 1
        sizes = {} if batch == 1 else _fa4_sizes(call)
        q, k, v = (x[None] if batch == 1 else x for x in (q, k, v))
        out, lse, *_ = _flash_attn_cute()._flash_attn_fwd(
            q, k, v, softmax_scale=scale, causal=call.causal, return_lse=True, **sizes
        )
        return (out[0], lse[0].t()) if batch == 1 else (out, lse.t())

    def backward(self, q, k, v, call: Call, scale: float, dout, out, lse, deterministic: bool):
        batch = call.cu_rows.numel() - 1
        sizes = {} if batch == 1 else _fa4_sizes(call)
        lse = lse.t().contiguous()
        q, k, v, out, dout, lse = (x[None] if batch == 1 else x for x in (q, k, v, out, dout, lse))
        dq, dk, dv, *_ = _flash_attn_cute()._flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=scale, causal=call.causal, **sizes
        )
        return (dq[0], dk[0], dv[0]) if batch == 1 else (dq, dk, dv)


BACKENDS = {backend.name: backend for backend in (FlashAttention4(), CuDNN(), Flash(), Plain())}
"""All backends, fastest first."""


def choose_backend(q: Tensor, ranges: Ranges, name: str = "auto", deterministic: bool = False):
    """The backend called ``name``, or with ``auto`` the fastest that can serve.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve; the message says why.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"backend={name!r} is not one of auto, {', '.join(BACKENDS)}")
        refusal = BACKENDS[name].refusal(q, deterministic)
        if refusal:
            raise ValueError(f"backend={name!r} cannot serve: {refusal}; use backend='auto'")
        return BACKENDS[name]
    for backend in BACKENDS.values():
        if backend.refusal(q, deterministic) is None and not (backend.name == "cudnn" and _costs_plans(ranges)):
            return backend
    raise AssertionError("the plain backend refuses nothing")


def _costs_plans(ranges: Ranges) -> bool:
    """Whether cuDNN would plan anew for most batches (document lengths differ), or for tiny rectangles."""
    smallest = min((min(r.n_rows, r.n_keys) for r in ranges.rectangles), default=CuDNN.smallest_side)
    return not ranges.one_document or smallest < CuDNN.smallest_side


def _by_group(one_group, q: Tensor, k: Tensor, dout: Tensor, out: Tensor, lse: Tensor):
    """Backward with one query head of each KV head at a time, so that dk and dv are never expanded to query heads."""
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return one_group(q, dout, out, lse)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(k.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    for i in range(group):
        grads = one_group(*(x[:, i::group] for x in (q, dout, out, lse)))
        dq[:, i::group] = grads[0]
        dk += grads[1]
        dv += grads[2]
    return dq, dk, dv


def _max_rows(call: Call) -> int:
    # At 1, flash attention takes another path for grouped heads, meant for decoding.
    return max(2, call.max_rows)


@contextlib.contextmanager
def _deterministic_algorithms():
    """PyTorch's flash backward takes its order of summation from this process-wide switch alone."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@functools.cache
def _cudnn_stats_dims(device: torch.device) -> int:
    """Whether this PyTorch's cuDNN statistics are [1, H, n] or [1, H, n, 1]: backward wants what forward gives."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


@functools.cache
def _flash_attn_cute():
    """The module ``flash_attn.cute.interface``, or a sentence that says why not."""
    try:
        from flash_attn.cute import interface
    except Exception as error:  # a broken installation raises anything, and must not break training
        return f"flash-attn-4 cannot be imported ({type(error).__name__}: {error})"
    if not (hasattr(interface, "_flash_attn_fwd") and hasattr(interface, "_flash_attn_bwd")):
        return "this flash-attn-4 has no separate forward and backward"
    return interface


@functools.cache
def _fa4_fault(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """What is wrong with flash-attn-4 here, tried once: it is young, and what it compiles depends on the machine."""
    fault = disagreement(BACKENDS["fa4"], device, dtype, dim)
    return None if fault is None else f"flash-attn-4 was tried and {fault}"


def disagreement(backend, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """How ``backend`` fails on a small batch, or differs from plain PyTorch; None if it does not.

    The batch has grouped heads; one document, and two whose lengths are no multiples of anything.
    """
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(307, heads, dim) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (torch.randn(x, generator=generator, device=device, dtype=torch.float32).to(dtype) for x in shapes)
    tokens = [(0, 307)]
    for bounds in ([0, 307], [0, 101, 307]):
        ranges = build_ranges(tokens, tokens, np.array(bounds))
        (call,) = backend.calls(ranges, device)
        try:
            out, lse = backend.forward(q, k, v, call, dim**-0.5)
            grads = backend.backward(q, k, v, call, dim**-0.5, dout, out, lse, False)
        except Exception as error:  # compilers and drivers raise anything
            return f"failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        for single in ranges.single_calls():
            rows = single.rows
            want, want_lse = plain.attention(q[rows], k[rows], v[rows], True, dim**-0.5)
            delta = torch.linalg.vecdot(dout[rows].float(), want.float())
            wanted = plain.attention_backward(q[rows], k[rows], v[rows], True, dim**-0.5, dout[rows], want_lse, delta)
            named = zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), (want, want_lse, *wanted))
            for name, ours, plainly in named:
                error = (ours[rows].double() - plainly.double()).abs().max() / plainly.double().abs().max()
                if not error < 0.03:
                    return f"was wrong in {name} by {error:.1%}"
    return None


def _fa4_sizes(call: Call) -> dict:
    return {
        "cu_seqlens_q": call.cu_rows,
        "cu_seqlens_k": call.cu_keys,
        "max_seqlen_q": call.max_rows,
        "max_seqlen_k": call.max_keys,
    }
