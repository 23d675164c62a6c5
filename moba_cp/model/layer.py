"""A transformer layer whose forward and backward pass are scheduled by hand, for sequences that fill the memory.

Everything but attention treats each token by itself, and is done in slices of the sequence: what is as wide as the
feed-forward network exists for one slice at a time. Backward goes through the slices again, and redoes what was not
kept; what nothing needs, such as the output of the last product, is not redone.

Legend: L tokens of this rank, H hidden size, F width of the SwiGLU, h query heads, g key/value heads, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..cp import key_conv
from ..dtypes import WIDE
from ..index.branch import IndexBranch, Projected, Scored
from ..ops import tokenwise_backend
from ..passes import AttentionPasses, Kept
from ..transforms import once_differentiable, without_autocast
from .offload import Offloader

# Of the widest tensor of a slice: 1 GiB in 16 bits. Far below 2^31, so that offsets may have 32 bits.
SLICE_ELEMENTS = 2**29
SHORTEST_SLICE = 1024
"""Tokens: fewer leave a GPU idle."""


class LayerWeights(NamedTuple):
    """The parameters of a layer, all in one dtype."""

    input_norm: Tensor
    """[H]."""
    qkv: Tensor
    """[(h + 2 g) D, H]: of each KV head its queries, its key and its value."""
    qkv_bias: Tensor | None
    """[(h + 2 g) D]."""
    q_norm: Tensor | None
    """[D], of each query head; with ``k_norm``."""
    k_norm: Tensor | None
    """[D], of each key head."""
    proj: Tensor
    """[H, h D]."""
    ffn_norm: Tensor
    """[H]."""
    fc1: Tensor
    """[2 F, H]: the gate first."""
    fc2: Tensor
    """[H, F]."""
    key_conv: Tensor | None = None
    """[g D / 2, w], of the convolution over keys, in a layer that has one."""
    scorer: Tensor | None = None
    """[width, H], of the index branch, in a layer that has one."""


@dataclass(frozen=True)
class LayerMemory:
    """What a layer keeps for its backward pass, and where."""

    recompute: Literal["none", "attention_kept", "full"] = "none"
    """What the backward pass computes again: nothing but norms, all but attention, or all."""
    to_host: bool = False
    """Whether what is kept waits in host memory."""


@dataclass(frozen=True)
class LayerRun:
    """One layer on one sequence."""

    attention: AttentionPasses
    cos: Tensor
    """[L, D / 2] wide, of each token's angles."""
    sin: Tensor
    """Like ``cos``."""
    n_kv: int
    """g."""
    eps: float
    """Of the norms."""
    memory: LayerMemory
    offloader: Offloader
    index: IndexBranch | None = None
    """Chooses the blocks of ``attention``, or learns from it where it is full; None for a layer without."""

    def slices(self, n_tokens: int, weights: LayerWeights) -> Iterator[slice]:
        """Slices of the sequence, a power of two of tokens in each but the last."""
        widest = max(weights.fc1.shape[0], weights.qkv.shape[0])
        step = 1 << max(SHORTEST_SLICE.bit_length() - 1, (SLICE_ELEMENTS // widest).bit_length() - 1)
        for start in range(0, n_tokens, step):
            yield slice(start, min(start + step, n_tokens))

    def project(self, hidden: Tensor, w: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        """q [L, h, D], k and v [L, g, D], as attention takes them; hidden [L, H]."""
        ops, n_tokens, dim = tokenwise_backend(hidden), hidden.shape[0], 2 * self.cos.shape[1]
        k, v = (hidden.new_empty(n_tokens, self.n_kv, dim) for _ in range(2))
        q = hidden.new_empty(n_tokens, w.qkv.shape[0] // dim - 2 * self.n_kv, dim)
        for s in self.slices(n_tokens, w):
            mixed = self._mixed(ops.rms_norm(hidden[s], w.input_norm, self.eps), w)
            ops.split_rotate(mixed, self.cos[s], self.sin[s], w.q_norm, w.k_norm, self.eps, q[s], k[s], v[s])
        return q, k, v

    def _mixed(self, normed: Tensor, w: LayerWeights) -> Tensor:
        mixed = normed @ w.qkv.T if w.qkv_bias is None else torch.addmm(w.qkv_bias, normed, w.qkv.T)
        return mixed.view(normed.shape[0], self.n_kv, -1, 2 * self.cos.shape[1])

    def convolve(self, k: Tensor, w: LayerWeights) -> Tensor:
        """Keys as attention takes them; a collective call in a layer with a convolution over keys."""
        if w.key_conv is None:
            return k
        return key_conv.forward(k, w.key_conv, self.attention.context, self.attention.layer)

    def convolve_backward(self, dk: Tensor, k: Tensor | None, w: LayerWeights, sums: "_Sums") -> Tensor:
        """The gradient of :meth:`convolve`'s ``k``, which is not needed in a layer that has none; a collective call
        likewise."""
        if w.key_conv is None:
            return dk
        assert k is not None
        dk, dweight = key_conv.backward(dk, k, w.key_conv, self.attention.context, self.attention.layer)
        sums.add("key_conv", dweight)
        return dk

    def score(self, hidden: Tensor, w: LayerWeights, index: IndexBranch) -> Scored:
        """What the index branch makes of the layer's input [L, H]; a collective call."""
        assert w.scorer is not None
        ops, made = tokenwise_backend(hidden), index.empty(hidden)
        for s in self.slices(hidden.shape[0], w):
            mixed = ops.rms_norm(hidden[s], w.input_norm, self.eps) @ w.scorer.T
            index.split(mixed, self.cos[s], self.sin[s], Projected(*(x[s] for x in made)))
        return index.gather(made)

    def score_backward(self, hidden: Tensor, w: LayerWeights, index: IndexBranch, grads: Projected) -> Tensor:
        """The gradient of the index branch's weights [width, H], which is all that it gives one to."""
        assert w.scorer is not None
        ops, sums = tokenwise_backend(hidden), _Sums(w, tuple(name == "scorer" for name in w._fields))
        for s in self.slices(hidden.shape[0], w):
            dmixed = index.split_backward(Projected(*(x[s] for x in grads)), self.cos[s], self.sin[s])
            sums.add("scorer", dmixed.to(hidden.dtype), ops.rms_norm(hidden[s], w.input_norm, self.eps))
        (grad,) = (x for x in sums.result() if x is not None)
        return grad

    def finish(
        self, hidden: Tensor, attended: Tensor, w: LayerWeights, out: Tensor, keep: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The rest of the layer after attention.

        Args:
            hidden: [L, H], the layer's input.
            attended: [L, h D], attention's output.
            out: [L, H], written.
            keep: whether to return what would otherwise be computed again.

        Returns:
            the residual stream between attention and feed-forward network [L, H], and the SwiGLU's input [L, 2 F].
        """
        ops = tokenwise_backend(hidden)
        mid = torch.empty_like(hidden) if keep else None
        gate_up = hidden.new_empty(hidden.shape[0], w.fc1.shape[0]) if keep else None
        for s in self.slices(hidden.shape[0], w):
            residual = torch.addmm(hidden[s], attended[s], w.proj.T, out=None if mid is None else mid[s])
            normed = ops.rms_norm(residual, w.ffn_norm, self.eps)
            wide = torch.mm(normed, w.fc1.T, out=None if gate_up is None else gate_up[s])
            torch.addmm(residual, ops.swiglu(wide), w.fc2.T, out=out[s])
        return mid, gate_up

    def finish_backward(
        self,
        hidden: Tensor,
        attended: Tensor,
        mid: Tensor | None,
        gate_up: Tensor | None,
        w: LayerWeights,
        dout: Tensor,
        sums: "_Sums",
    ) -> tuple[Tensor, Tensor]:
        """Gradients of :meth:`finish`: of the residual stream before attention [L, H] as it comes from behind, and of
        ``attended`` [L, h D]. ``mid`` and ``gate_up`` are computed again where they were not kept."""
        ops = tokenwise_backend(hidden)
        dhidden, dattended = torch.empty_like(hidden), torch.empty_like(attended)
        for s in self.slices(hidden.shape[0], w):
            residual = torch.addmm(hidden[s], attended[s], w.proj.T) if mid is None else mid[s]
            wide = ops.rms_norm(residual, w.ffn_norm, self.eps) @ w.fc1.T if gate_up is None else gate_up[s]
            activated, dwide = ops.swiglu_backward(wide, dout[s] @ w.fc2)
            sums.add("fc2", dout[s], activated)
            normed, dnorm = ops.rms_norm_backward(dwide @ w.fc1, residual, w.ffn_norm, self.eps, dout[s], dhidden[s])
            sums.add("ffn_norm", dnorm)
            sums.add("fc1", dwide, normed)
            torch.mm(dhidden[s], w.proj, out=dattended[s])
            sums.add("proj", dhidden[s], attended[s])
        return dhidden, dattended

    def project_backward(
        self, hidden: Tensor, w: LayerWeights, dq: Tensor, dk: Tensor, dv: Tensor, dhidden: Tensor, sums: "_Sums"
    ) -> None:
        """Add the gradient of :meth:`project`'s input to ``dhidden`` [L, H]."""
        ops = tokenwise_backend(hidden)
        for s in self.slices(hidden.shape[0], w):
            normed_heads = w.q_norm is not None
            mixed = self._mixed(ops.rms_norm(hidden[s], w.input_norm, self.eps), w) if normed_heads else None
            dmixed, dq_norm, dk_norm = ops.split_rotate_backward(
                dq[s], dk[s], dv[s], self.cos[s], self.sin[s], w.q_norm, w.k_norm, self.eps, mixed
            )
            dmixed = dmixed.flatten(1)
            normed, dnorm = ops.rms_norm_backward(dmixed @ w.qkv, hidden[s], w.input_norm, self.eps, None, dhidden[s])
            sums.add("input_norm", dnorm)
            sums.add("qkv", dmixed, normed)
            if w.qkv_bias is not None:
                sums.add("qkv_bias", dmixed.sum(0, dtype=WIDE[dmixed.dtype]))
            if normed_heads:
                sums.add("q_norm", dq_norm)
                sums.add("k_norm", dk_norm)


class _Sums:
    """Gradients of the weights, summed over slices in a wide dtype."""

    def __init__(self, weights: LayerWeights, wanted: tuple[bool, ...]):
        self._weights = weights
        self._wanted = {name for name, want in zip(LayerWeights._fields, wanted, strict=True) if want}
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor, rows: Tensor | None = None) -> None:
        """``grad``, or ``grad.T @ rows`` for a matrix: grad [n, outputs], rows [n, inputs]."""
        if name not in self._wanted:
            return
        part = grad if rows is None else grad.T @ rows
        if name not in self._sums:
            self._sums[name] = part
        else:
            # The first slice's product becomes the sum; where there is one slice, nothing is widened.
            self._sums[name] = self._sums[name].to(WIDE[part.dtype]).add_(part)

    def result(self) -> list[Tensor | None]:
        """In the weights' dtype, in the order of the weights."""
        found = zip(LayerWeights._fields, self._weights, strict=True)
        return [self._sums[name].to(w.dtype) if w is not None and name in self._sums else None for name, w in found]


class _Layer(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, hidden: Tensor, run: LayerRun, *weights: Any):
        w, rows, out = LayerWeights(*weights), hidden.view(-1, hidden.shape[-1]), torch.empty_like(hidden)
        index, learns = run.index, ctx.needs_input_grad[-1]
        q, turned, v = run.project(rows, w)
        k = run.convolve(turned, w)
        scored = chosen = None
        if index is not None:
            scored = run.score(rows, w, index)
            chosen = index.choose(scored) if run.attention.kind == "moba" else None
        attended, kept = run.attention.forward(q, k, v, True, chosen)
        loss = dindex = None
        if index is not None and scored is not None and learns:
            # Once, whatever the layer redoes: the gradient of the scorer's weights is small beside what it comes of.
            loss, grads = index.learn(scored, q, k, run.attention.lse(kept), run.attention.scale, chosen)
            dindex = run.score_backward(rows, w, index, grads)
            del grads
        del scored
        keep_all = run.memory.recompute == "none"
        before = None if w.key_conv is None else turned
        qkv: list[Tensor | None] = [q, k, v, before] if keep_all else [None] * 4
        # What is not kept goes before the feed-forward network needs memory.
        del q, k, v, turned, before
        kept = kept if keep_all else kept.without_index()
        mid, gate_up = run.finish(rows, attended.flatten(1), w, out.view_as(rows), keep_all)
        if run.memory.recompute == "full":
            # The choice is kept: attention that is computed again attends to the same blocks.
            tensors = [rows, dindex, chosen, None, *qkv, mid, gate_up]
        else:
            tensors = [rows, dindex, None, attended, *qkv, mid, gate_up, *kept.tensors]
        ctx.parked = run.offloader.park(tensors, run.memory.to_host)
        ctx.run, ctx.made = run, kept.made
        # Autograd checks that nobody changes the weights meanwhile, and FSDP empties and fills their storage.
        ctx.save_for_backward(*weights)
        return out, loss

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout: Tensor, dloss: Tensor | None):
        run, w = ctx.run, LayerWeights(*ctx.saved_tensors)
        rows, dindex, chosen, attended, q, k, v, turned, mid, gate_up, *kept = ctx.parked.take()
        kept, sums = Kept(kept, ctx.made), _Sums(w, ctx.needs_input_grad[2:])
        if run.memory.recompute == "full":
            q, turned, v = run.project(rows, w)
            k = run.convolve(turned, w)
            attended, kept = run.attention.forward(q, k, v, True, chosen)
        # What follows attention comes first: where it was not kept, q, k and v need not exist by then.
        dhidden, dattended = run.finish_backward(
            rows, attended.flatten(1), mid, gate_up, w, dout.contiguous().view_as(rows), sums
        )
        del mid, gate_up
        if q is None:
            q, turned, v = run.project(rows, w)
            k = run.convolve(turned, w)
        dq, dk, dv = run.attention.backward(kept, q, k, v, attended, dattended.view_as(attended))
        del q, k, v, attended, dattended, kept
        dk = run.convolve_backward(dk, turned, w, sums)
        run.project_backward(rows, w, dq, dk, dv, dhidden, sums)
        if dindex is not None and dloss is not None:
            sums.add("scorer", dindex * dloss)
        return dhidden.view_as(dout), None, *sums.result()


def layer_forward(hidden: Tensor, run: LayerRun, weights: LayerWeights) -> tuple[Tensor, Tensor | None]:
    """The layer's output, with gradients where they are wanted; and the loss of its index branch, where that learns.

    Args:
        hidden: [L, 1, H] or [L, H], contiguous, in the weights' dtype.

    Returns:
        the output like hidden; and [] wide, of :meth:`moba_cp.index.branch.IndexBranch.learn`, whose gradient goes to
        the index branch's weights alone, or None.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or any(x is not None and x.requires_grad for x in weights)):
        return _Layer.apply(hidden, run, *weights)
    rows, out, index = hidden.view(-1, hidden.shape[-1]), torch.empty_like(hidden), run.index
    with torch.no_grad():
        chosen = None
        if index is not None and run.attention.kind == "moba":
            chosen = index.choose(run.score(rows, weights, index))
        q, k, v = run.project(rows, weights)
        attended, _ = run.attention.forward(q, run.convolve(k, weights), v, False, chosen)
        run.finish(rows, attended.flatten(1), weights, out.view_as(rows), False)
    return out, None
