"""MoBA attention written plainly: the specification that every other path is compared with.

No Triton, no process group, loops over documents, heads and queries' own blocks. Works in any floating dtype,
float64 included, and is differentiable by autograd.

Legend: T tokens, Hq query heads, Hkv key/value heads, D head dim, B block size, k top-k.
Source: MoBA, arXiv 2502.13189, section 2.2, and its authors' ``moba_naive``.
"""

import torch
from torch import Tensor

from .transforms import without_autocast


def _documents(n_tokens: int, cu_seqlens) -> list[tuple[int, int]]:
    ends = [0, n_tokens] if cu_seqlens is None else [int(x) for x in cu_seqlens]
    return list(zip(ends[:-1], ends[1:]))


def block_means(k: Tensor, block_size: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Representatives of the blocks of all documents: mean keys, ``[n_blocks, Hkv, D]`` in k's dtype.

    Sums run in float32 (float64 for float64 keys). They carry no gradient.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    means = [
        k[start : min(start + block_size, end)].detach().to(wide).mean(0)
        for begin, end in _documents(k.shape[0], cu_seqlens)
        for start in range(begin, end, block_size)
    ]
    return torch.stack(means).to(k.dtype) if means else k.new_zeros(0, *k.shape[1:])


def select_blocks(
    q: Tensor,
    k: Tensor,
    block_size: int,
    top_k: int,
    cu_seqlens: Tensor | None = None,
    shared_by_group: str = "none",
    score: str = "mean",
    min_recent: int = 0,
    sink: bool = False,
) -> Tensor:
    """The blocks each query chooses besides its own.

    Args:
        q: [T, Hq, D].
        k: [T, Hkv, D], as attention sees them (after RoPE and any norm).
        block_size, top_k: B and k.
        cu_seqlens: [n_docs + 1] int, document boundaries; None for one document.
        shared_by_group, score, min_recent, sink: as of :class:`moba_cp.MoBAConfig`. Of scores that are NaN a maximum
            takes no notice; a sum with one is NaN.

    Returns:
        [T, G, k - 1] int64, best first, -1 where there are fewer candidates; G is Hq, or Hkv where a group shares its
        selection. Blocks that are always taken come first, the newest of them in front. Block ids number the blocks of
        all documents in order; with one document, id ``j`` covers tokens ``[jB, (j + 1)B)``.
    """
    n_tokens, n_heads, _ = q.shape
    n_kv = k.shape[1]
    group = n_heads // n_kv
    # Query heads that choose together.
    together = 1 if shared_by_group == "none" else group
    means = block_means(k, block_size, cu_seqlens).to(torch.promote_types(q.dtype, torch.float32))
    chosen = torch.full((n_tokens, n_heads // together, top_k - 1), -1, dtype=torch.int64, device=q.device)
    first_block = 0
    for begin, end in _documents(n_tokens, cu_seqlens):
        for own, start in enumerate(range(begin, end, block_size)):
            n_take = min(top_k - 1, own)
            if n_take == 0:
                continue
            rows = slice(start, min(start + block_size, end))
            for head in range(n_heads // together):
                kv = head * together // group
                of_members = []
                for member in range(head * together, (head + 1) * together):
                    row = q[rows, member].detach()
                    if score == "mean":
                        of_members.append(_block_scores(row, means[first_block : first_block + own, kv]))
                    else:
                        of_keys = _block_scores(row, k[begin : begin + own * block_size, kv].detach())
                        of_members.append(_largest(of_keys.unflatten(-1, (own, block_size)), -1))
                total = of_members[0]
                for other in of_members[1:]:
                    total = total + other if shared_by_group == "sum" else _largest(torch.stack([total, other]), 0)
                # Candidates run from the newest to the oldest, so that a stable sort lets the newer win a tie.
                newest_first = total.flip(-1)
                taken = torch.zeros(own, dtype=torch.bool, device=q.device)
                taken[:min_recent] = True
                if sink:
                    taken[-1] = True
                number = newest_first.nan_to_num(-torch.inf, torch.inf, -torch.inf)
                order = number.argsort(dim=-1, descending=True, stable=True)
                # NaN goes behind every number, -inf included, and what is always taken in front of all.
                rank = newest_first.isnan().to(torch.int8) * 2
                rank = torch.where(taken, -1, rank).gather(-1, order)
                order = order.gather(-1, rank.argsort(dim=-1, stable=True))
                n_taken = min(int(taken.sum()), n_take)
                order[:, :n_taken] = order[:, :n_taken].sort(-1).values
                chosen[rows, head, :n_take] = first_block + own - 1 - order[:, :n_take]
        first_block += -(-(end - begin) // block_size)
    return chosen


def _block_scores(rows: Tensor, keys: Tensor) -> Tensor:
    """Scores [R, n] of rows [R, D] and keys, or mean keys, [n, D], rounded to the wide dtype."""
    return _dot(rows, keys).to(torch.promote_types(rows.dtype, torch.float32))


def _largest(score: Tensor, dim: int) -> Tensor:
    """The maximum over a dimension; NaN only where all are NaN."""
    largest = score.masked_fill(score.isnan(), -torch.inf).amax(dim)
    return largest.masked_fill(score.isnan().all(dim), torch.nan)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products [R, n] of all rows of a [R, D] and b [n, D], summed in float64.

    Sums are elementwise, half of the terms to the other half: a score's rounding follows from its row and its block
    alone. In a matrix product it also follows from the column, and equal blocks would not tie.
    """
    terms = a.double().T[:, :, None] * b.double().T[:, None, :]
    n = terms.shape[0]
    while n > 1:
        half = n // 2
        terms[:half] += terms[n - half : n]
        n -= half
    return terms[0]


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One head: q [Tq, D], k, v [Tk, D], mask [Tq, Tk] -> out [Tq, D], lse [Tq].

    A key whose score is -inf has no weight, so a row that has no other keys gets 0, and lse -inf.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    score = (_Product.apply(q.to(wide), k.to(wide).T) * scale).masked_fill(~mask, -torch.inf)
    nothing = (score == -torch.inf).all(-1, keepdim=True)
    prob = score.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return _Product.apply(prob, v.to(wide)), score.logsumexp(-1)


class _Product(torch.autograd.Function):
    """``a @ b`` in their dtype, and gradients likewise: products are what autocast would round."""

    @staticmethod
    @without_autocast
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return _Product.apply(grad, b.T), _Product.apply(a.T, grad)


def _last_rows(n_rows: int, n_tokens: int, cu_rows, cu_keys, device) -> Tensor:
    """[Tq] int64, the key that each query row is."""
    documents = zip(_documents(n_rows, cu_rows), _documents(n_tokens, cu_keys), strict=True)
    rows = [torch.arange(end - (until - begin), end, device=device) for (begin, until), (_, end) in documents]
    return torch.cat(rows)


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    top_k: int,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    chosen: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    shared_by_group: str = "none",
    score: str = "mean",
    min_recent: int = 0,
    sink: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """MoBA attention of packed documents.

    Args:
        q: [T, Hq, D].
        k, v: [T, Hkv, D]; Hq must be a multiple of Hkv. Where they have more tokens than q, the rows of q are the last
            ones of their documents' keys.
        block_size, top_k: B and k.
        cu_seqlens: [n_docs + 1] int, document boundaries; None for one document.
        softmax_scale: factor of the scores; ``D ** -0.5`` by default.
        return_lse: also return the log-sum-exp of the scaled scores, natural log.
        chosen: [T, Hq, S] or [T, Hkv, S] block ids to attend to instead of those of :func:`select_blocks`, any number
            of them for each row, so that results in two precisions can be compared under one selection. Repeats count
            once; -1, and what lies in another document or not before a row's own block, not at all.
        cu_seqlens_k: [n_docs + 1] int, boundaries of the documents among the keys, where ``cu_seqlens`` has those among
            the queries.
        shared_by_group, score, min_recent, sink: as of :func:`select_blocks`.

    Returns:
        out [T, Hq, D] in q's dtype, and lse [T, Hq] in float32 (float64 for float64 inputs) if asked for.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    if q.shape[0] != k.shape[0]:
        # Rows that nobody asked for go in front of those of q, and out of the results.
        keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        rows = _last_rows(q.shape[0], k.shape[0], cu_seqlens, keys, q.device)
        padded = q.new_zeros(k.shape[0], *q.shape[1:]).index_copy(0, rows, q)
        if chosen is not None:
            chosen = chosen.new_full((k.shape[0], *chosen.shape[1:]), -1).index_copy(0, rows, chosen)
        gate = shared_by_group, score, min_recent, sink
        results = moba_attention(padded, k, v, block_size, top_k, keys, scale, True, chosen, None, *gate)
        out, lse = (x[rows] for x in results)
        return (out, lse) if return_lse else out
    if chosen is None:
        chosen = select_blocks(q, k, block_size, top_k, cu_seqlens, shared_by_group, score, min_recent, sink)
    together = q.shape[1] // chosen.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [q.new_zeros(0, q.shape[1], q.shape[2])], [q.new_zeros(0, q.shape[1], dtype=wide)]
    first_block = 0
    for begin, end in _documents(q.shape[0], cu_seqlens):
        length = end - begin
        position = torch.arange(length, device=q.device)
        block = position // block_size
        causal_own = (block[:, None] == block[None, :]) & (position[:, None] >= position[None, :])
        heads = []
        for head in range(q.shape[1]):
            mask = causal_own.clone()
            for slot in range(chosen.shape[2]):
                number = chosen[begin:end, head // together, slot] - first_block
                past = (number >= 0) & (number < block)
                mask |= past[:, None] & (number[:, None] == block[None, :])
            kv = head // group
            heads.append(_masked_attention(q[begin:end, head], k[begin:end, kv], v[begin:end, kv], mask, scale))
        if length:
            outs.append(torch.stack([out for out, _ in heads], 1).to(q.dtype))
            lses.append(torch.stack([lse for _, lse in heads], 1))
        first_block += -(-length // block_size)
    out = torch.cat(outs)
    return (out, torch.cat(lses)) if return_lse else out


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Full causal attention of packed documents; arguments and results as :func:`moba_attention`."""
    # One block that holds the longest document is every query's own block.
    block_size = max(1, k.shape[0])
    return moba_attention(q, k, v, block_size, 1, cu_seqlens, softmax_scale, return_lse, cu_seqlens_k=cu_seqlens_k)
