"""The CPContext of a batch: given with the batch, or built from what Megatron passes.

Megatron passes ``packed_seq_params`` to every layer unchanged, in activation recompute too, so that is where a batch's
context goes. A batch without one has Megatron's own layout.

Legend: L tokens of this rank, P context-parallel ranks.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ..cp.comm import Communicator
from ..cp.context import CPContext
from ..cp.options import ExchangeOptions
from ..model.offload import Offloader

_DEFAULT_EXCHANGE = ExchangeOptions()


class MoBAPackedSeqParams:
    """Carries a batch's CPContext in Megatron's argument ``packed_seq_params``.

    Has the attributes of Megatron's ``PackedSeqParams``. Megatron treats a batch as packed only if ``qkv_format`` is
    ``"thd"``; with this object q, k and v stay ``[L, b, heads, D]`` and rotary angles are applied row by row.

    Not a dataclass, and so not a ``PackedSeqParams``: FSDP2's mixed precision rebuilds dataclass arguments and casts
    their floating-point fields, which would round the angles to bf16 and lose the context's tables.

    Args:
        context: layout and documents of the sequence, of which this rank holds a share.
        angles: gives [L, D / 2] float32, by which each token's heads turn, for layers that take them from this object.
        offloader: what the layers keep for the backward pass goes to.
    """

    qkv_format = "sbhd"
    cu_seqlens_q = cu_seqlens_kv = cu_seqlens_q_padded = cu_seqlens_kv_padded = None
    local_cp_size = cp_group = None

    def __init__(
        self, context: CPContext, angles: Callable[[], Tensor] | None = None, offloader: Offloader | None = None
    ):
        if not isinstance(context, CPContext):
            raise ValueError(f"context={context!r} is not a CPContext; pass that of the batch")
        self.context, self.offloader = context, offloader
        self.max_seqlen_q = self.max_seqlen_kv = context.seq_len
        self._angles = angles
        self.index_losses: list[Tensor] = []
        """[] each, of the index branches of layers that have computed this batch, summed over rows."""

    def take_index_loss(self, loss: Tensor | None) -> None:
        """A layer's index branch has learned from the batch, if ``loss`` is not None."""
        if loss is not None:
            self.index_losses.append(loss)

    # Made by the first layer that asks, for all of them: a batch whose layers are of one kind holds one kind.
    @cached_property
    def turns(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles, [L, D / 2] float32 each."""
        angles = self._angles()
        return angles.cos(), angles.sin()

    @cached_property
    def rotary_angles(self) -> Tensor:
        """[L, 1, 1, D] float32, as Megatron's own layers take them."""
        angles = self._angles()
        return torch.cat((angles, angles), -1)[:, None, None]


def batch_context(
    packed_seq_params: PackedSeqParams | MoBAPackedSeqParams | None,
    n_tokens: int,
    group: dist.ProcessGroup | None,
    layout: str,
    device: torch.device,
    exchange: ExchangeOptions = _DEFAULT_EXCHANGE,
) -> CPContext:
    """The context of a batch, on the rank that calls.

    Args:
        packed_seq_params: what Megatron passes: None, packed sequences (thd), or :class:`MoBAPackedSeqParams`.
        n_tokens: L, tokens of each sequence of the batch on this rank.
        group: the context-parallel process group; None is one rank.
        layout: how the tokens of batches without a context are spread over the ranks.
        device: where the context's tensors go.
        exchange: how batches without a context exchange blocks and rows.

    Raises:
        ValueError: the batch does not fit L or the group, or is of a kind that is not served.
    """
    if isinstance(packed_seq_params, MoBAPackedSeqParams):
        check_group(packed_seq_params.context, group)
        return packed_seq_params.context
    if packed_seq_params is None:
        return _context_of_shape(group, layout, n_tokens, device, exchange)
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format={packed_seq_params.qkv_format!r} is not served; "
            "use 'thd', or MoBAPackedSeqParams(context=CPContext(...))"
        )
    if packed_seq_params.local_cp_size is not None:
        raise ValueError(
            f"packed_seq_params.local_cp_size={packed_seq_params.local_cp_size}: a context-parallel size that changes "
            "from batch to batch is not served; leave hybrid_context_parallel off"
        )
    if packed_seq_params.cp_group not in (None, group):
        raise ValueError(
            "packed_seq_params.cp_group is not the layer's context-parallel group: a group that changes from batch to "
            "batch is not served; leave cp_group=None"
        )
    # All layers of a batch share the object, and what is kept goes when the batch goes.
    where = n_tokens, group, device, exchange
    kept = getattr(packed_seq_params, "_moba_context", None)
    if kept is None or not kept.holds(packed_seq_params, where):
        context = _context_of_documents(_bounds(packed_seq_params), *where)
        kept = packed_seq_params._moba_context = _Kept(packed_seq_params, where, context)
    return kept.context


def check_group(context: CPContext, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError if a batch's context is of another size than the group of the layer that gets it."""
    if context.size != group_size(group):
        raise ValueError(
            f"the batch's context is for {context.size} ranks but the layer's context-parallel group has "
            f"{group_size(group)}; build the model and the CPContext with the same group"
        )


def group_size(group) -> int:
    """Ranks of a process group; None is one."""
    return 1 if group is None else group.size()


_BOUNDS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


class _Kept:
    """A context, and the state of the PackedSeqParams that it was made of.

    The object can get other boundaries, in place or not, and can be copied together with what is kept in it. A tensor
    on the CPU is compared with a copy. To read one on a GPU would stop the host in every layer: there PyTorch's count
    of changes tells, which does not see what ``tensor.data`` or another library's kernel changes in place.
    """

    def __init__(self, params: PackedSeqParams | None = None, where=None, context: CPContext | None = None):
        self.where, self.context = where, context
        self.states = [_state(getattr(params, name)) for name in _BOUNDS] if params is not None else []

    def holds(self, params: PackedSeqParams, where: tuple) -> bool:
        """Whether the context is still that of ``params``; ``where`` is all else that it depends on."""
        if self.where != where:
            return False
        return all(_unchanged(getattr(params, name), state) for name, state in zip(_BOUNDS, self.states))

    def __reduce__(self):
        # A process group can neither be copied nor pickled: a deep copy of the batch starts without a context.
        return _Kept, ()


def _state(x: Tensor | None) -> tuple:
    """What tells whether a tensor still has the values it has now."""
    if x is None or x.is_cpu:
        return (None if x is None else x.clone(),)
    return () if x.is_inference() else (x, x._version, x.data_ptr(), x.shape, x.stride())


def _unchanged(x: Tensor | None, state: tuple) -> bool:
    if not state:
        return False
    if x is None or state[0] is None:
        return x is state[0]
    if x.is_cpu:
        return x.shape == state[0].shape and x.dtype == state[0].dtype and state[0].is_cpu and torch.equal(x, state[0])
    return x is state[0] and not x.is_inference() and (x._version, x.data_ptr(), x.shape, x.stride()) == state[1:]


def _bounds(params: PackedSeqParams) -> tuple[int, ...]:
    """The documents' boundaries, read to the host; those of queries and of keys must be equal."""
    values, read = {}, {}
    for name in _BOUNDS:
        bounds = getattr(params, name)
        if bounds is None:
            values[name] = None
            continue
        if not isinstance(bounds, Tensor) or bounds.dim() != 1:
            what = f"shape {tuple(bounds.shape)}" if isinstance(bounds, Tensor) else f"type {type(bounds).__name__}"
            raise ValueError(f"packed_seq_params.{name} has {what}; pass a tensor of integers, [documents + 1]")
        if id(bounds) not in read:
            read[id(bounds)] = tuple(bounds.tolist())
        values[name] = read[id(bounds)]
    for name in ("cu_seqlens_kv", "cu_seqlens_kv_padded"):
        other, mine = values[name], values[name.replace("_kv", "_q")]
        if other is not None and mine is not None and other != mine:
            raise ValueError(f"packed_seq_params.{name} differs from {name.replace('_kv', '_q')}; they must be equal")
    # Padding comes at the end of a document, and attention is causal: no real token attends to it, nor selects a block
    # that holds it. So a padded document is treated as a document of the padded length.
    bounds = values["cu_seqlens_q"] if values["cu_seqlens_q_padded"] is None else values["cu_seqlens_q_padded"]
    if bounds is None:
        raise ValueError("packed_seq_params.cu_seqlens_q=None; thd batches need the boundaries of their documents")
    return bounds


# A context's tables can be large: few are kept for batches to come.
@lru_cache(maxsize=2)
def _context_of_documents(bounds: tuple[int, ...], n_tokens: int, group, device, exchange) -> CPContext:
    return _context(group, "zigzag_per_document", n_tokens, torch.tensor(bounds, dtype=torch.int64), device, exchange)


@lru_cache(maxsize=8)
def _context_of_shape(group, layout: str, n_tokens: int, device: torch.device, exchange) -> CPContext:
    return _context(group, layout, n_tokens, None, device, exchange)


def _context(group, layout: str, n_tokens: int, cu_seqlens: Tensor | None, device, exchange) -> CPContext:
    size = group_size(group)
    # On one rank all layouts are one, but contiguous takes any length.
    layout = layout if size > 1 else "contiguous"
    # None is one rank here, whatever others there are.
    group = Communicator(None) if group is None else group
    return CPContext(group, layout, n_tokens * size, cu_seqlens=cu_seqlens, device=device, exchange=exchange)
