"""From transformers' masks and position ids to the boundaries of documents; nothing of size tokens x tokens.

What the mask function returns goes to every layer as its ``attention_mask``: None for one document per sequence, or
[2, n_docs + 1] int32, ``cu_seqlens`` of the rows and of the keys of the flattened batch. Padding is documents of its
own: nobody else sees them, and what their rows compute nobody reads.

Legend: b sequences, n rows and L keys of each.
"""

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..blocks import check_cu_seqlens


def moba_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device=None,
    **kwargs,
) -> Tensor | None:
    """What transformers calls for the mask of a forward pass; arguments as of its own mask functions.

    Args:
        q_length, q_offset: of transformers 5; ``cache_position`` [n] of 4.57 says the same.
        attention_mask: [b, L] bool, False where a token is padding; or of more tokens, which are still to come.
        local_size: of a sliding window or a chunk.

    Raises:
        ValueError: the mask is none of causal attention within documents.
    """
    if local_size is not None:
        raise ValueError(f"a layer attends within {local_size} tokens; MoBA does not serve sliding windows and chunks")
    if cache_position is not None:
        q_length, device = cache_position.shape[0], cache_position.device
        static = kv_length != q_length if torch.compiler.is_compiling() else False
        q_offset = kv_length - q_length if static or not len(cache_position) else q_offset
        # A graph's numbers are not those of the pass that made it.
        unknown = torch.compiler.is_compiling() or capturing(cache_position)
        holds = kv_length if unknown else int(cache_position[-1]) + 1
    else:
        holds = kv_length if isinstance(q_offset, Tensor) else q_offset + q_length
    if kv_offset or isinstance(q_offset, Tensor) or holds != kv_length:
        raise ValueError(
            f"the cache gives {kv_length} keys for {q_length} queries that end at {holds}: MoBA needs exactly the keys "
            "there are; use moba_cp.hf.MoBACache or a DynamicCache, not a static or sliding one"
        )
    packed = mask_function is not causal_mask_function
    if packed and not torch.compiler.is_compiling():
        _check_is_packed(mask_function)
    if attention_mask is not None and attention_mask.shape[1] > kv_length:
        attention_mask = attention_mask[:, :kv_length]
    if attention_mask is not None and (torch.compiler.is_compiling() or not attention_mask.all()):
        if attention_mask.shape[1] < kv_length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} tokens but there are {kv_length}, those in the cache "
                "included; pass one of all tokens so far"
            )
        if not torch.compiler.is_compiling():
            _check_no_holes(attention_mask)
        return _padding_ends(attention_mask, q_length)
    if packed and q_length == kv_length:
        # A row begins a document if it does not see the key in front of it.
        row = torch.arange(q_length, device=device)[None]
        sequence = torch.arange(batch_size, device=device)[:, None]
        sees = mask_function(sequence, 0, row, (row - 1).clamp(min=0)).expand(batch_size, q_length)
        return _packed_ends(sees)
    return None


def capturing(x: Tensor) -> bool:
    """Whether what is done with ``x`` becomes part of a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_is_packed(mask_function) -> None:
    """Raise ValueError unless a mask function is causal attention within documents, as transformers makes it."""
    cells = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    parts = cells[0] if len(cells) == 1 and isinstance(cells[0], tuple) else (mask_function,)
    for part in parts:
        name = getattr(part, "__qualname__", repr(part))
        if part is not causal_mask_function and not name.startswith("packed_sequence_mask_function."):
            raise ValueError(
                f"the model asks for a mask of its own ({name}); MoBA serves causal attention to documents"
            )


def _check_no_holes(attention_mask: Tensor) -> None:
    left, right = _content(attention_mask)
    holes = (attention_mask.sum(1) != right - left).nonzero()
    if len(holes):
        raise ValueError(
            f"attention_mask of sequence {int(holes[0])} has padding between tokens; pad on the left (for generation) "
            "or on the right"
        )


def _content(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """[b] each: where the tokens begin and end that are no padding; 0 and 0 where there are none."""
    mask = attention_mask.long()
    left = mask.argmax(1)
    right = mask.shape[1] - mask.flip(1).argmax(1)
    return left, torch.where(mask.any(1), right, 0)


def _padding_ends(attention_mask: Tensor, n_rows: int) -> Tensor:
    """[2, 3 b + 1] int32: padding, content, padding of each sequence."""
    batch, length = attention_mask.shape
    left, right = _content(attention_mask)
    ends = torch.stack([left, right, torch.full_like(left, length)], 1)
    sequence = torch.arange(batch, device=ends.device)[:, None]
    rows = (ends - (length - n_rows)).clamp(min=0) + sequence * n_rows
    both = torch.stack([rows.flatten(), (ends + sequence * length).flatten()])
    return torch.cat([both.new_zeros(2, 1), both], 1).int()


def batch_ends(
    shape, attention_mask: Tensor | None, position_ids: Tensor | None, device, cu_seqlens: Tensor | None = None
) -> Tensor:
    """[n_docs + 1] int64, boundaries in the flattened batch of ``shape`` (b, S).

    Args:
        attention_mask: [b, S] or [1, S], 0 where a token is padding; None for no padding.
        position_ids: [b, S] or [1, S], which begin again with each document; None for one document per sequence.
        cu_seqlens: [n_docs + 1], the boundaries of documents in a batch of one, in place of those.

    Raises:
        ValueError: padding between tokens, or another shape.
    """
    for name, x in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if x is not None and (x.dim() != 2 or x.shape[1] != shape[1] or x.shape[0] not in (1, shape[0])):
            raise ValueError(f"{name} has shape {tuple(x.shape)} but input_ids {tuple(shape)}; they must be equal")
    starts = torch.zeros(shape, dtype=torch.bool, device=device)
    starts[:, 0] = True
    if cu_seqlens is not None:
        if shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q with {shape[0]} sequences; packed documents come as one sequence")
        check_cu_seqlens(cu_seqlens, shape[1])
        begin = cu_seqlens[:-1].to(device)
        # Documents of zero length may begin behind the last token.
        starts[0, begin[begin < shape[1]].long()] = True
    elif position_ids is not None:
        starts[:, 1:] |= position_ids.diff(dim=1) != 1
    if attention_mask is not None:
        mask = attention_mask.bool().expand(shape)
        _check_no_holes(mask)
        starts[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    at = starts.flatten().nonzero()[:, 0]
    return torch.cat([at, at.new_full((1,), starts.numel())])


@torch.compiler.disable
def _packed_ends(sees: Tensor) -> Tensor | None:
    """[2, n_docs + 1] int32 from sees [b, n] bool, False where a row begins a document; the host waits for it."""
    starts = ~sees
    starts[:, 0] = True
    at = starts.flatten().nonzero()[:, 0]
    if len(at) == len(sees):
        return None
    return torch.cat([at, at.new_full((1,), starts.numel())]).int().expand(2, -1)


def padding_of(ends: Tensor, n_keys: int) -> Tensor:
    """[b] int64, padding in front of each sequence, from what :func:`_padding_ends` gave."""
    before = ends[1, 1::3].long()
    return before - torch.arange(len(before), device=ends.device) * n_keys
