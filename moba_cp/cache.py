"""Keys and values of sequences that grow, as when a model generates, with the mean keys of their blocks beside them.

Legend: b sequences, n tokens of each that come at once, Hq query heads, Hkv key/value heads, D head dim, B block size,
L tokens of each sequence so far, padding included, C tokens there is room for.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import checked_inputs, full_attention
from .autograd import bounds_of, bytes_of, table_stream
from .blocks import BlockTable, fitted_block_size, local_pages
from .config import Gate, MoBAConfig
from .ops import backend
from .transforms import autocast_off, without_autocast

# Rows of a sequence up to which kernels spread the blocks of each over the GPU; see kernels/decoding.py.
FEW_ROWS = 16
# Room beyond what is needed: at least so many tokens, and this part of those there are.
MIN_ROOM, ROOM_PART = 256, 16


class KVCache:
    """Keys and values of one layer; for inference, no gradient flows through it.

    All sequences have the same length. Those that are shorter begin with padding: ``padding`` [b] int64 or int32 in the
    calls says how many tokens of each, 0 or more, belong to nobody. It must have the same values in all calls for these
    sequences.

    Args:
        block_size: B of the MoBA layers that will ask.
        capacity: C, tokens that will come; with fewer, storage grows by copies.

    Raises:
        ValueError: an argument is out of range, or what is appended does not fit what is there.
    """

    def __init__(self, block_size: int, capacity: int = 0):
        MoBAConfig(block_size=block_size, top_k=1)
        if not isinstance(capacity, int) or capacity < 0:
            raise ValueError(f"capacity={capacity!r} is not a number of tokens; use 0 or more")
        self.block_size = block_size
        self.length = 0
        """L."""
        self.step: Any = None
        """A :class:`moba_cp.steps.Step` that serves the next calls."""
        self._capacity = capacity
        self._k: Tensor | None = None
        """[b, C, Hkv, D], undefined from L on; ``_v`` likewise."""
        self._v: Tensor | None = None
        self._means: Tensor | None = None
        """[b, M, Hkv, D], right for blocks that were complete after ``_averaged`` tokens; M exceeds what C needs."""
        self._averaged = 0
        self._asked: tuple | None = None
        """What was found to fit: heads, dtype, device and scale of q; ``_scale`` is then the scale."""
        self._scale = 1.0

    @property
    def k(self) -> Tensor:
        """[b, L, Hkv, D]."""
        return self._filled(self._k)

    @property
    def v(self) -> Tensor:
        """[b, L, Hkv, D]."""
        return self._filled(self._v)

    @property
    def nbytes(self) -> int:
        """Memory of keys, values and means, room included."""
        return sum(x.nbytes for x in (self._k, self._v, self._means) if x is not None)

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """The next tokens of all sequences: k, v [b, n, Hkv, D]; they are kept in the dtype of the first ones."""
        for name, x in (("k", k), ("v", v)):
            if x.dim() != 4:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; pass [sequences, tokens, heads, head_dim]")
        if k.shape != v.shape:
            raise ValueError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; they must be equal")
        held = self._k
        if held is not None and (k.shape[0], *k.shape[2:]) != (held.shape[0], *held.shape[2:]):
            raise ValueError(
                f"k has shape {tuple(k.shape)} but the cache holds {tuple(self.k.shape)}; sequences, heads and "
                "head_dim must be equal"
            )
        if self.step is not None:
            return self.step.append(self, k, v)
        until = self.length + k.shape[1]
        if held is None or until > held.shape[1]:
            self._grow(until, k)
        for storage, x in ((self._k, k), (self._v, v)):
            storage[:, self.length : until].copy_(x)
        self.length = until
        return None

    def moba_attention(
        self, q: Tensor, config: MoBAConfig, softmax_scale: float | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """MoBA of the last n tokens of each sequence, whose keys were appended: q and the result [b, n, Hq, D].

        As :func:`moba_cp.moba_attention` of q and all keys, but for few tokens scores are summed in another order:
        where two blocks' scores differ by no more than their rounding, another one may be selected. Rows of padding get
        0.
        """
        if config.block_size != self.block_size:
            raise ValueError(
                f"config.block_size={config.block_size}, but the cache was made for block_size={self.block_size}; "
                "use one for both"
            )
        q, scale = self._checked(q, softmax_scale)
        padding = self._checked_padding(padding)
        if self.step is not None:
            return self.step.moba_attention(self, q, config, scale)
        table = self._table(q.shape[1], padding)
        self._average(padding)
        return self.attend(q, table, config, scale, self.length // self.block_size)

    @torch.no_grad()
    @without_autocast
    def attend(self, q: Tensor, table: BlockTable, config: MoBAConfig, scale: float, most: int) -> Tensor:
        """MoBA of q [b, n, Hq, D] to the blocks of ``table``, of whose means those of candidates are right; at most
        ``most`` of them are a row's candidates."""
        rows = q.flatten(0, 1)
        k, v, means = (x.flatten(0, 1) for x in (self._k, self._v, self._means))
        ops, pages = backend(rows), local_pages(k, v, table)
        blocks, seen = (table.first, table.current_block, config.top_k), (table.current_block, table.visible)
        few = q.shape[1] <= FEW_ROWS
        # Field by field: torch.compile knows no properties of a config that it holds constant.
        gate = Gate(config.shared_by_group, config.score, config.min_recent, config.sink)
        if gate.score == "max":
            how = gate.shared_by_group, gate.min_recent, gate.sink
            asked = table.start, table.first, table.current_block, table.block_size, config.top_k
            block_indices = ops.select_by_keys(rows, k, *asked, *how)
        elif few and gate == Gate():
            block_indices = ops.select_few(rows, means, *blocks, most=most)
        else:
            how = gate.shared_by_group, gate.min_recent, gate.sink
            block_indices = ops.select_blocks(rows, means, *blocks, *how)
        if few:
            if gate.shared:
                block_indices = block_indices.repeat_interleave(rows.shape[1] // k.shape[1], 1)
            out, _ = ops.attend_few(rows, pages, block_indices, *seen, scale)
        else:
            index = ops.routing_index(rows, block_indices, *seen, pages.row)
            out, _ = ops.attend(rows, pages, block_indices, *seen, scale, out_dtype=q.dtype, index=index)
        return out.view(q.shape)

    def full_attention(self, q: Tensor, softmax_scale: float | None = None, padding: Tensor | None = None) -> Tensor:
        """Exact attention of the last n tokens of each sequence: q and the result [b, n, Hq, D]."""
        q, scale = self._checked(q, softmax_scale)
        padding = self._checked_padding(padding)
        if self.step is not None:
            return self.step.full_attention(self, q, scale)
        batch, n_rows, n_heads, _ = q.shape
        if n_rows > FEW_ROWS:
            rows, k, v = (x[0] if batch == 1 else x.flatten(0, 1) for x in (q, self.k, self.v))
            how = {}
            if batch > 1 or padding is not None:
                how = dict(
                    zip(("cu_seqlens", "cu_seqlens_k"), documents(batch, n_rows, self.length, padding, q.device))
                )
            with torch.no_grad():
                return full_attention(rows, k, v, softmax_scale=scale, **how).view(q.shape)
        mask = None
        if n_rows > 1 or padding is not None:
            position = torch.arange(self.length, device=q.device)
            mask = position <= position[self.length - n_rows :, None]
            if padding is not None:
                # A row of padding sees itself, so that it is a number.
                own = position == position[self.length - n_rows :, None]
                mask = own | mask & (position >= padding.to(q.device)[:, None, None])
            mask = mask.expand(batch, n_rows, self.length)[:, None]
        with torch.no_grad():
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, self.k, self.v)),
                mask,
                scale=scale,
                enable_gqa=n_heads != self._k.shape[2],
            )
        return out.transpose(1, 2).contiguous()

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length} is not between 0 and the {self.length} tokens that are there")
        self.length, self._averaged = length, min(self._averaged, length)

    def select(self, sequences: Tensor) -> None:
        """Go on with some sequences, in any order and any number of times: ``sequences`` [b'] int64."""
        for name in ("_k", "_v", "_means"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held.index_select(0, sequences.to(held.device)))

    @property
    def storage(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [b, C, Hkv, D], undefined from L on, and means [b, M, Hkv, D] of blocks; room included."""
        self._filled(self._k)
        return self._k, self._v, self._means

    def average(self, padding: Tensor | None = None) -> None:
        """Bring the means of all complete blocks up to date, as MoBA does when it is asked for."""
        self._average(padding)

    def advance(self, averaged: bool) -> None:
        """A token was written behind the last one by a :class:`moba_cp.steps.Step`, and with ``averaged`` the means are
        up to date."""
        self.length += 1
        if averaged:
            self._averaged = self.length

    def _filled(self, storage: Tensor | None) -> Tensor:
        if storage is None:
            raise ValueError("the cache is empty; append keys and values first")
        return storage[:, : self.length]

    def _checked(self, q: Tensor, softmax_scale: float | None) -> tuple[Tensor, float]:
        """q as it is attended with and the scale, or ValueError."""
        if not isinstance(q, Tensor) or q.dim() != 4:
            shape = tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__
            raise ValueError(f"q is {shape}; pass a tensor [sequences, tokens, heads, head_dim]")
        if q.requires_grad and torch.is_grad_enabled():
            raise ValueError("q requires a gradient, and none flows through a cache; use torch.no_grad()")
        if q.shape[0] != self.k.shape[0] or q.shape[1] > self.length:
            raise ValueError(
                f"q has shape {tuple(q.shape)}, but the cache holds {self.length} tokens of {self.k.shape[0]} "
                "sequences; append the keys of its tokens first"
            )
        asked = q.shape[2:], q.dtype, q.device, softmax_scale
        if asked != self._asked:
            # Of the first sequence, if there is any.
            *_, self._scale = checked_inputs(*(x[:1].flatten(0, 1) for x in (q, self.k, self.v)), None, softmax_scale)
            self._asked = asked
        # Under autocast they may differ: keys are as they were appended.
        return q.to(self._k.dtype), self._scale

    def _checked_padding(self, padding: Tensor | None) -> Tensor | None:
        """``padding`` if it fits the cache, or ValueError; on a GPU values are checked where tables are made."""
        if padding is None:
            return None
        batch = self.k.shape[0]
        rule = f"pass int64 [{batch}], how many tokens at the beginning of each sequence are padding"
        integers = torch.int64, torch.int32
        if not isinstance(padding, Tensor) or padding.dtype not in integers or padding.shape != (batch,):
            what = f"{tuple(padding.shape)} {padding.dtype}" if isinstance(padding, Tensor) else repr(padding)
            raise ValueError(f"padding is {what}; {rule}")
        if padding.is_cpu and (padding < 0).any():
            raise ValueError(f"padding={padding.tolist()} has numbers below 0; {rule}")
        if self.step is not None:
            raise ValueError("padding was passed within a Step, whose sequences have none; leave it out there")
        return padding

    def _grow(self, needed: int, like: Tensor) -> None:
        capacity = max(self._capacity, needed)
        if capacity == needed > self._capacity:
            capacity += max(MIN_ROOM, needed // ROOM_PART)
        shape, n_blocks = like.shape, capacity // self.block_size + 3
        for name, size in (("_k", capacity), ("_v", capacity), ("_means", n_blocks)):
            # Blocks that are not complete have no mean yet; what is never candidate is read nowhere.
            held = getattr(self, name)
            grown = (like if held is None else held).new_empty(shape[0], size, *shape[2:])
            if held is not None:
                grown[:, : held.shape[1]].copy_(held)
            setattr(self, name, grown)

    def _table(self, n_rows: int, padding: Tensor | None) -> BlockTable:
        sizes = n_rows, self.length, self._k.shape[0], self._k.shape[1], self._means.shape[1], self.block_size
        device = self._k.device
        stream = table_stream(device)
        by_value = padding is None or padding.is_cpu
        # A tensor may be the next sequences' too, with other values: its version says so, which few tensors lack.
        if stream is None or not by_value and padding.is_inference():
            return _table(*sizes, padding, device)
        if padding is None:
            return _kept_table(sizes, None, device, stream)
        return _kept_table(sizes, bytes_of(padding) if by_value else (padding, padding._version), device, stream)

    @torch.no_grad()
    def _average(self, padding: Tensor | None) -> None:
        """Means of the blocks that became complete since the last call."""
        size, since, until = self.block_size, self._averaged, self.length
        batch, capacity, n_blocks = self._k.shape[0], self._k.shape[1], self._means.shape[1]
        self._averaged = until
        first, last = since // size, until // size
        if padding is None and first == last:
            return
        device = self._k.device
        # With padding the first block that was not complete is another one in each sequence.
        begin = torch.zeros(batch, dtype=torch.int64, device=device) if padding is None else padding.to(device)
        count = last - first if padding is None else (until - since) // size + 2
        block = ((since - begin).clamp(min=0) // size)[:, None] + torch.arange(count, device=device)  # [b, count]
        start = begin[:, None] + block * size
        length = (until - start).clamp(min=0, max=size)
        sequence = torch.arange(batch, device=device)[:, None]
        start = torch.where(length > 0, start + sequence * capacity, 0).flatten()
        k = self._k.flatten(0, 1)
        fitted = fitted_block_size(size, until)
        with autocast_off(device):
            means = backend(k).block_means(k, start, length.flatten().int(), fitted)
        at = sequence * n_blocks + block.clamp(max=n_blocks - 1)
        self._means.view(-1, *k.shape[1:]).index_copy_(0, at.flatten(), means)


def _table(
    n_rows: int,
    length: int,
    batch: int,
    capacity: int,
    n_blocks: int,
    block_size: int,
    padding: Tensor | None,
    device: torch.device,
) -> BlockTable:
    """Where blocks lie in [b * C] storage rows, and where the last ``n_rows`` tokens of each sequence lie in them.

    Block ``j`` of sequence ``i`` is number ``i * n_blocks + j``."""
    with torch.inference_mode(False):
        if padding is None:
            padding = torch.zeros(batch, dtype=torch.int64, device=device)
        elif padding.is_cuda:
            torch._assert_async((padding >= 0).all())
        begin = padding.to(device=device, dtype=torch.int64)[:, None]
        sequence = torch.arange(batch, device=device)[:, None]
        in_sequence = begin + torch.arange(n_blocks, device=device) * block_size  # [b, M]
        of_block = (length - in_sequence).clamp(min=0, max=block_size)
        start = torch.where(of_block > 0, in_sequence + sequence * capacity, 0)
        position = torch.arange(length - n_rows, length, device=device) - begin  # [b, n]
        first = (sequence * n_blocks).expand(batch, n_rows)
        current = first + position.clamp(min=0) // block_size
        offset = torch.where(position >= 0, position % block_size, -1)
        return BlockTable(
            block_size=block_size,
            start=start.flatten(),
            length=of_block.flatten().int(),
            current_block=current.flatten().int(),
            first=first.flatten().int(),
            offset=offset.flatten().int(),
        )


# The layers of a model ask for the same one after the other.
@lru_cache(maxsize=4)
def _kept_table(
    sizes: tuple[int, ...], known: bytes | tuple[Tensor, int] | None, device: torch.device, _stream: int
) -> BlockTable:
    """:func:`_table`, with padding as its bytes on the host, or as a tensor and its version."""
    if isinstance(known, bytes):
        padding = bounds_of(known)
    else:
        padding = None if known is None else known[0]
    return _table(*sizes, padding, device)


def documents(batch: int, n_rows: int, length: int, padding: Tensor | None, device) -> tuple[Tensor, Tensor]:
    """``cu_seqlens`` of the last ``n_rows`` tokens of each sequence and ``cu_seqlens_k`` of all ``length``, as int32;
    padding is a document of its own in front of each sequence."""
    sequence = torch.arange(batch, device=device)
    if padding is None:
        padding = torch.zeros_like(sequence)
    padding = padding.to(device).clamp(max=length)
    rows = (padding - (length - n_rows)).clamp(min=0, max=n_rows)
    ends = []
    for size, before in ((n_rows, rows), (length, padding)):
        pairs = torch.stack([sequence * size + before, (sequence + 1) * size], 1).flatten()
        ends.append(torch.cat([pairs.new_zeros(1), pairs]).int())
    return ends[0], ends[1]
