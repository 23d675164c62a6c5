"""MoBA and full attention: the public functions.

Legend: T tokens (the local share under context parallelism), Hq query heads, Hkv key/value heads, D head dim.
"""

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .autograd import full_attention_op, moba_attention_op, numbers_in_documents_op, table_stream
from .blocks import check_cu_seqlens_kind
from .config import MoBAConfig
from .given import check_block_indices
from .transforms import cast_inputs, check_no_tangent

if TYPE_CHECKING:
    from .cp.context import CPContext

Method = Literal["auto", "ring", "allgather", "heads"]
Backend = Literal["auto", "fa4", "cudnn", "flash", "plain"]
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    cp: "CPContext | None" = None,
    return_lse: Literal[False] = False,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_indices: Tensor | None = None,
    check_indices: bool = False,
    return_selection: Literal[False] = False,
) -> Tensor: ...
@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    cp: "CPContext | None" = None,
    *,
    return_lse: Literal[True],
    cu_seqlens_k: Tensor | None = None,
    block_indices: Tensor | None = None,
    check_indices: bool = False,
    return_selection: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    cp: "CPContext | None" = None,
    return_lse: bool = False,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_indices: Tensor | None = None,
    check_indices: bool = False,
    return_selection: Literal[True],
) -> tuple[Tensor, ...]: ...
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    cp: "CPContext | None" = None,
    return_lse: bool = False,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_indices: Tensor | None = None,
    check_indices: bool = False,
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Mixture of Block Attention (arXiv 2502.13189): each query attends to its own block and the best k - 1 others.

    Args:
        q: [T, Hq, D] float64, float32, bfloat16 or float16; or [b, T, Hq, D], whose sequences are documents.
        k, v: [T, Hkv, D] or [b, T, Hkv, D], same dtype and device; Hq must be a multiple of Hkv. Keys as attention sees
            them, after RoPE and any norm. They may have more tokens than q, whose rows are then the last ones of their
            documents' keys, as when a prompt comes in pieces. Under autocast q, k and v are cast to its dtype, float64
            excepted, as PyTorch's own attention does.
        config: block size and top-k, and how blocks are chosen.
        cu_seqlens: [n_docs + 1] int32, boundaries of packed documents; None for one document. Not with ``cp``, nor with
            a batch dimension.
        softmax_scale: factor of the scores; ``D ** -0.5`` by default.
        cp: a :class:`moba_cp.CPContext`; T is then this rank's share of the sequence, and documents are the context's.
        return_lse: also return the log-sum-exp of the scaled scores.
        cu_seqlens_k: [n_docs + 1] int32, boundaries of the documents among the keys, where they have more tokens than
            q and ``cu_seqlens`` says where those of q end. A document without queries is allowed.
        block_indices: a selection made elsewhere, [T, Hq, S] or [T, Hkv, S] int32 (with the batch dimension if q has
            it), S at most 63: the blocks that each query attends to beside its own, or those of all query heads of a KV
            head. Blocks are counted within the query's document, 0 is its first; -1 stands for none. No gradient flows
            to it. Of ``config`` only ``block_size`` and ``deterministic`` count then. What is not a block of the
            query's document before its own is passed over, and so is a block that an earlier slot of the row names: it
            counts once.
        check_indices: refuse such entries of ``block_indices`` instead. The host waits for the device, and with ``cp``
            ranks for one another: all of them ask for it, or none.
        return_selection: also return what was selected, as ``block_indices`` takes it: given back, it gives the same
            bits. The same on all ranks of ``cp``.

    Returns:
        out like q, in its dtype or autocast's; with ``return_lse`` also lse [T, Hq] or [b, T, Hq], natural log, in
        float32 (float64 for float64 inputs); with ``return_selection`` also [T, G, S] or [b, T, G, S] int32, G being
        Hq, or Hkv where heads share their selection. No gradient flows through lse and selection.

    Raises:
        ValueError: shapes, dtypes or devices do not fit one another, or ``cu_seqlens`` does not fit T or ``cp``; with
            ``check_indices``, a row of ``block_indices`` names what it must not, and the message the first such row; or
            an input has a tangent: there is no forward-mode differentiation.
        RuntimeError: a gradient is differentiated again.

    ``torch.compile`` takes it into its graph without ``cp``, and ends the graph once with it.
    """
    if not isinstance(config, MoBAConfig):
        raise ValueError(f"config={config!r} is not a MoBAConfig; pass MoBAConfig(block_size=512, top_k=3)")
    shape = getattr(q, "shape", None)
    q, k, v, cu_seqlens, cu_seqlens_k = _packed(q, k, v, cu_seqlens, cu_seqlens_k, cp)
    q, k, v, scale = checked_inputs(q, k, v, cu_seqlens, softmax_scale, cu_seqlens_k)
    if block_indices is not None:
        if shape is not None and isinstance(block_indices, Tensor) and block_indices.dim() == len(shape) == 4:
            block_indices = block_indices.flatten(0, 1)
        check_block_indices(block_indices, q, k)
        # What is given is all that is attended to, whatever would have been chosen.
        config = MoBAConfig(config.block_size, block_indices.shape[2] + 1, config.deterministic)
    elif check_indices:
        raise ValueError("check_indices=True, but there are no block_indices; pass them, or leave it out")
    if cp is not None:
        from .cp.moba import moba_attention as across_ranks

        _refuse_documents(q, k, cu_seqlens, cu_seqlens_k)
        out, lse, selection = across_ranks(q, k, v, config, scale, cp, block_indices, check_indices, return_selection)
    else:
        options = config.block_size, config.top_k, scale, config.deterministic
        # Field by field: torch.compile knows no properties of a config that it holds constant.
        gate = config.shared_by_group, config.score, config.min_recent, config.sink
        of_selection = block_indices, check_indices, *gate
        # A copy of what is on the host, because backward reads it too.
        cu_seqlens, cu_seqlens_k = (x.clone() if x is not None and x.is_cpu else x for x in (cu_seqlens, cu_seqlens_k))
        out, lse, selection, _ = moba_attention_op(q, k, v, cu_seqlens, *options, cu_seqlens_k, *of_selection)
        if return_selection:
            selection = numbers_in_documents_op(selection, q, k, cu_seqlens, config.block_size, cu_seqlens_k)
    results = [out]
    if return_lse:
        results.append(lse)
    if return_selection:
        results.append(selection)
    if shape is not None and out.shape != shape:
        results = [x.view(*shape[:2], *x.shape[1:]) for x in results]
    return results[0] if len(results) == 1 else tuple(results)


@overload
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    cp: "CPContext | None" = None,
    return_lse: Literal[False] = False,
    *,
    method: Method = "auto",
    backend: Backend = "auto",
    deterministic: bool = False,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor: ...
@overload
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    cp: "CPContext | None" = None,
    *,
    return_lse: Literal[True],
    method: Method = "auto",
    backend: Backend = "auto",
    deterministic: bool = False,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    cp: "CPContext | None" = None,
    return_lse: bool = False,
    *,
    method: Method = "auto",
    backend: Backend = "auto",
    deterministic: bool = False,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention; arguments, results and errors as :func:`moba_attention`, and:

    Args:
        cu_seqlens: kernels are chosen by the lengths of documents; on a GPU, reading them makes the host wait.
        method: with ``cp``, how K and V move: ``ring``, ``allgather`` by slices of heads, or ``auto`` by size.
        backend: local kernels: ``fa4`` (flash-attn-4, if installed), ``cudnn``, ``flash``, ``plain``, or ``auto`` for
            the fastest that can serve. float64, float32 and CPU tensors are served by ``plain``.
        deterministic: bit-identical gradients from run to run on a fixed number of ranks, at some cost in speed.

    Raises:
        ValueError: also where a named backend cannot serve; the message says why.
    """
    shape = getattr(q, "shape", None)
    q, k, v, cu_seqlens, cu_seqlens_k = _packed(q, k, v, cu_seqlens, cu_seqlens_k, cp, "cpu")
    q, k, v, scale = checked_inputs(q, k, v, cu_seqlens, softmax_scale, cu_seqlens_k)
    if cu_seqlens is not None and cu_seqlens.is_meta:
        raise ValueError("cu_seqlens is on the meta device and has no values; full_attention needs them, pass values")
    if cp is not None:
        from .cp.full.attention import full_attention as across_ranks

        _refuse_documents(q, k, cu_seqlens, cu_seqlens_k)
        out, lse = across_ranks(q, k, v, scale, cp, method, backend, deterministic)
    else:
        # Kernels are chosen on the host; a copy, because backward reads it too.
        rows, keys = (None if x is None else x.to("cpu", copy=True) for x in (cu_seqlens, cu_seqlens_k))
        out, lse_by_head = full_attention_op(q, k, v, rows, scale, backend, deterministic, keys)
        lse = lse_by_head.t()
    if shape is not None and out.shape != shape:
        out, lse = out.view(shape), lse.reshape(shape[:-1])
    return (out, lse) if return_lse else out


def _packed(q, k, v, cu_seqlens, cu_seqlens_k, cp, device=None):
    """q, k, v [b, T, H, D] as packed documents, with their boundaries (on ``device``; by default where they are read
    soonest); others as they are."""
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)):
        return q, k, v, cu_seqlens, cu_seqlens_k
    batch, n_rows, n_keys = q.shape[0], q.shape[1], k.shape[1]
    if k.shape[0] != batch:
        raise ValueError(f"q has shape {tuple(q.shape)} but k has {tuple(k.shape)}; they must have as many sequences")
    if cu_seqlens is not None or cu_seqlens_k is not None:
        raise ValueError(
            "cu_seqlens was passed with a batch dimension, whose sequences are documents; for documents within them "
            "pass x.flatten(0, 1) of q, k and v"
        )
    if cp is not None and batch > 1:
        raise ValueError(
            f"q has {batch} sequences, but cp shares one; flatten them before they are sharded and give their ends to "
            "CPContext(..., cu_seqlens=...)"
        )
    # Of one sequence nothing is copied, whatever its strides.
    q, k, v = (x[0] if batch == 1 else x.flatten(0, 1) for x in (q, k, v))
    if batch > 1:
        if device is None:
            # On the host they name tables that are kept from call to call, but a graph cannot hold a copy from there.
            in_graph = torch.compiler.is_compiling() or table_stream(q.device) is None
            device = q.device if in_graph else "cpu"
        ends = torch.arange(batch + 1, dtype=torch.int32, device=device)
        cu_seqlens = ends * n_rows
        cu_seqlens_k = None if n_keys == n_rows else ends * n_keys
    return q, k, v, cu_seqlens, cu_seqlens_k


def checked_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    softmax_scale: float | None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v as autocast wants them, and the softmax scale; ValueError unless the arguments fit one another."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; pass a tensor [tokens, heads, head_dim]")
        if x.dim() != 3 or x.dtype not in DTYPES:
            hint = "; q, k and v have a batch dimension, or none of them" if x.dim() == 4 else ""
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}; pass [tokens, heads, head_dim] in float32, "
                f"bfloat16, float16 or float64{hint}"
            )
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; they must be equal")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q has shape {tuple(q.shape)} but k has {tuple(k.shape)}; head_dim must be equal")
    if q.shape[0] > k.shape[0]:
        raise ValueError(
            f"q has {q.shape[0]} tokens but k has {k.shape[0]}; queries are the last tokens of their document's keys, "
            "so there cannot be more of them"
        )
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, not a positive multiple of the {k.shape[1]} heads of k and v")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}; move them to one device")
    check_no_tangent(q=q, k=k, v=v)
    q, k, v = cast_inputs(q, k, v)
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    if q.shape[2] == 0:
        raise ValueError("head_dim=0; it must be positive")
    for name, ends in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is not None:
            check_cu_seqlens_kind(ends, name)
            if ends.is_meta and not q.is_meta:
                raise ValueError(f"{name} is on the meta device and has no values, but q is on {q.device}; pass values")
    if cu_seqlens_k is not None and (cu_seqlens is None or cu_seqlens.shape != cu_seqlens_k.shape):
        n_docs = "none" if cu_seqlens is None else cu_seqlens.numel() - 1
        raise ValueError(
            f"cu_seqlens_k has {cu_seqlens_k.numel() - 1} documents but cu_seqlens {n_docs}; pass the ends of the same "
            "documents in both, among the keys and among the queries"
        )
    if cu_seqlens is not None and cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q has {q.shape[0]} tokens but k has {k.shape[0]}, and cu_seqlens says where documents end in q alone; "
            "pass cu_seqlens_k with their ends in k and v"
        )
    return q, k, v, _checked_scale(softmax_scale, q.shape[2])


def _checked_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    # A comparison, which torch.compile knows of a number that it holds open.
    if not (isinstance(softmax_scale, (int, float)) and abs(softmax_scale) < math.inf):
        raise ValueError(f"softmax_scale={softmax_scale!r} is not a finite number; leave it out for head_dim ** -0.5")
    return float(softmax_scale)


def _refuse_documents(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    if cu_seqlens is not None or cu_seqlens_k is not None:
        raise ValueError("cu_seqlens was passed together with cp; give it to CPContext(..., cu_seqlens=...) instead")
    if q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q has {q.shape[0]} tokens but k has {k.shape[0]}, together with cp; across ranks they must have as many"
        )
