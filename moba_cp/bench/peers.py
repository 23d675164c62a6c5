"""Sparse attention of others beside MoBA with one selection for a group: what is installed, and how each is called.

None computes quite the same; :attr:`Peer.differs` says what it does instead, and stands in its row.

Legend: T tokens, Hq query heads, Hkv key/value heads, D head dim, B block size, S blocks that a query selects besides
its current one, k = S + 1.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..transforms import once_differentiable, without_autocast
from .timing import Candidate

TILE = 128
"""Queries and keys of a tile of the kernels that take a list of tiles."""


@dataclass(frozen=True)
class Inputs:
    """One document, and what MoBA selected of it."""

    leaves: list[Tensor]
    """q [T, Hq, D], k, v [T, Hkv, D]."""
    dout: Tensor
    """[T, Hq, D]."""
    selection: Tensor
    """[T, Hkv, S] int32, -1 for none."""
    block_size: int

    @property
    def whole_selection(self) -> Tensor:
        """[T, Hkv, k] int32, the current block included."""
        n_tokens, n_kv, _ = self.selection.shape
        current = torch.arange(n_tokens, dtype=torch.int32, device=self.selection.device) // self.block_size
        return torch.cat([self.selection, current[:, None, None].expand(-1, n_kv, 1)], -1)


@dataclass(frozen=True)
class Peer:
    """A kernel library."""

    module: str
    """What must be installed."""
    make: Callable[[Inputs], Candidate]
    """Raises ValueError or RuntimeError for a shape that it does not take."""
    differs: str

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported, by its name alone: importing may take a second and a CUDA context."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False


def tiles_of(inputs: Inputs) -> Tensor:
    """[Hkv, T / TILE, T / TILE] bool: the tiles of keys that any query of a tile of queries attends to, its own tile
    included."""
    n_tokens, n_kv, _ = inputs.selection.shape
    n_tiles, per_block = -(-n_tokens // TILE), max(1, inputs.block_size // TILE)
    chosen = inputs.whole_selection.long()
    if inputs.block_size < TILE:
        tiles = torch.where(chosen < 0, n_tiles, chosen * inputs.block_size // TILE)[..., None]
    else:
        within = torch.arange(per_block, device=chosen.device)
        tiles = torch.where(chosen[..., None] < 0, n_tiles, chosen[..., None] * per_block + within).clamp(max=n_tiles)
    union = torch.zeros(n_kv, n_tiles, n_tiles + 1, dtype=torch.bool, device=chosen.device)
    row = (torch.arange(n_tokens, device=chosen.device) // TILE)[:, None, None, None]
    head = torch.arange(n_kv, device=chosen.device)[None, :, None, None]
    union[head, row, tiles] = True
    # A long block reaches past the queries of its own tile.
    return union[..., :n_tiles].tril()


def _lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row of tiles [..., n] are set, and which [..., n], as int32, the others behind."""
    return tiles.sum(-1, dtype=torch.int32), tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()


def _nsa(inputs: Inputs) -> Candidate:
    from fla.ops.nsa.parallel import parallel_nsa

    blocks = inputs.whole_selection.long()[None]
    call = lambda: parallel_nsa(
        *(x[None] for x in inputs.leaves), block_indices=blocks, block_counts=blocks.shape[-1],
        block_size=inputs.block_size,
    )  # fmt: skip
    return Candidate("nsa", call, inputs.dout[None], inputs.leaves, inference=True)


def _msa(inputs: Inputs) -> Candidate:
    from flash_msa import flash_msa_func

    if inputs.block_size != TILE:
        raise ValueError(f"its blocks have {TILE} keys")
    q, k, v = (x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in inputs.leaves)
    q_index, k_index = (torch.randn_like(x).requires_grad_() for x in (k, k[:, :1]))
    n_keys = inputs.whole_selection.shape[-1] * TILE
    call = lambda: flash_msa_func(q_index, k_index, q, k, v, n_keys, q.shape[-1] ** -0.5)[0]
    return Candidate("msa", call, inputs.dout.flatten(1)[None], [q, k, v, q_index, k_index], inference=True)


def _fa4(inputs: Inputs) -> Candidate:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    group = inputs.leaves[0].shape[1] // inputs.leaves[1].shape[1]
    tiles = tiles_of(inputs).repeat_interleave(group, 0)[None]
    diagonal = torch.eye(tiles.shape[-1], dtype=torch.bool, device=tiles.device).expand_as(tiles)

    def lists(full: Tensor, partial: Tensor):
        (full_count, full_index), (count, index) = _lists(full), _lists(partial)
        return BlockSparseTensorsTorch(count, index, full_count, full_index, block_size=(TILE, TILE))

    forward = lists(tiles & ~diagonal, diagonal)
    backward = lists((tiles & ~diagonal).mT, diagonal)
    call = lambda: flash_attn_func(
        *(x[None] for x in inputs.leaves), causal=True, block_sparse_tensors=forward, block_sparse_tensors_bwd=backward
    )[0]
    return Candidate("fa4-tiles", call, inputs.dout[None], inputs.leaves, inference=True)


class _CudnnTiles(torch.autograd.Function):
    """cuDNN's block-sparse attention of q, k, v [1, H, T, D] with lists of tiles."""

    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, index, count):
        from cudnn.block_sparse_attention import BSA

        made = BSA.block_sparse_attention_forward(q, k, v, index, q2k_block_nums=count, sparse_block_size=TILE)
        ctx.save_for_backward(q, k, v, made["o_tensor"], made["lse_tensor"], index, count)
        return made["o_tensor"]

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout):
        from cudnn.block_sparse_attention import BSA

        *tensors, index, count = ctx.saved_tensors
        made = BSA.block_sparse_attention_backward(
            dout.contiguous(), *tensors, index, q2k_block_nums=count, sparse_block_size=TILE
        )
        return made["dq_tensor"], made["dk_tensor"], made["dv_tensor"], None, None


def _cudnn(inputs: Inputs) -> Candidate:
    q, k, v = inputs.leaves
    group = q.shape[1] // k.shape[1]
    k, v = (x.detach().repeat_interleave(group, 1) for x in (k, v))
    leaves = [x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in (q, k, v)]
    count, index = _lists(tiles_of(inputs).repeat_interleave(group, 0)[None])
    call = lambda: _CudnnTiles.apply(*leaves, index, count)
    return Candidate("cudnn-tiles", call, inputs.dout.transpose(0, 1)[None].contiguous(), leaves, inference=True)


UNION = f"{TILE} queries attend to all that any of them selected, given"
PEERS = {
    "nsa": Peer("fla", _nsa, "the selection is given, not computed"),
    "msa": Peer("flash_msa", _msa, "selects by an index branch of its own, and computes that branch's gradients too"),
    "fa4-tiles": Peer("flash_attn.cute", _fa4, UNION),
    "cudnn-tiles": Peer("cudnn", _cudnn, f"{UNION}; not causal within a tile; K and V repeated for every query head"),
}
