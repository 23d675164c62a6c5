"""Blocks or rows between nodes, decided by all ranks together.

A rank's own decision moves the fewest bytes to and from it. But links carry both directions at once, and a pass takes
as long as the busier one: where ranks of one node send rows and those of another fetch blocks, one direction may get
twice what the other gets, and more than if all did the same. So ranks tell one another what their decision would move
under each of three policies, and all take the one under which the busiest direction has least.

Legend: P ranks, C candidates, N nodes. A policy is a row of :data:`FACTORS`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...dtypes import WIDE
from ...eager.exchange import Prices, Weighed, token_prices
from ...host import to_device
from ..options import ExchangeOptions

FACTORS = 1.0, 1e9, 1e-9
"""Of the price of rows to other nodes: each owner's cheapest candidate; everything is fetched; the least is."""
LEAST_GAIN = 0.98
"""Of the bytes of the busiest direction: another policy than each rank's own decision brings less than this of it."""


class Directions(NamedTuple):
    """Bytes that move to (0) and from (1) the rank that asks, in a forward (0) and a backward pass (1)."""

    token: tuple[tuple[int, int], tuple[int, int]]
    """Of a token of a fetched (KV head, block)."""
    row: tuple[tuple[int, int], tuple[int, int]]
    """Of a row that is sent to a block's owner."""

    @classmethod
    def of(cls, dtype: torch.dtype, dim: int, n_slots: int, options: ExchangeOptions, ids: torch.dtype) -> "Directions":
        """Of inputs of ``dtype``, see :class:`.costs.WireCosts`, whose sums these are."""
        e, g, w = dtype.itemsize, options.wire_dtype(dtype).itemsize, WIDE[dtype].itemsize
        again, ids_bytes = 0 if options.keep else 1, n_slots * ids.itemsize
        return cls(
            token=((2 * dim * e, 0), (again * 2 * dim * e, 2 * dim * g)),
            row=(
                ((dim + 1) * w, dim * e + ids_bytes),
                (dim * g, again * (dim * e + ids_bytes) + dim * e + 2 * w),
            ),
        )


@dataclass(frozen=True)
class PolicyTables:
    """What is the same in every call of a layer's shape."""

    directions: Tensor
    """[2, 2, 2] float64: token or row; pass; to or from the rank that asks."""
    node_of: Tensor
    """[P] int64."""
    n_nodes: int
    factors: Tensor
    """[policies] float64, :data:`FACTORS` on the device."""

    @classmethod
    def of(cls, directions: Directions, size: int, per_node: int, device: torch.device) -> "PolicyTables":
        """``per_node``: ranks of a node."""
        node_of = torch.arange(size, device=device) // per_node
        numbers, factors = (to_device(torch.tensor(x, dtype=torch.float64), device) for x in (directions, FACTORS))
        return cls(numbers, node_of, -(-size // per_node), factors)


def offers(weighed: Weighed, rows: Tensor, prices: Prices) -> Tensor:
    """[policies, P, 2] float64, tokens and rows between this rank and each owner of another node under each policy; of
    tokens the part that this rank has in those which its node shares. Whole numbers, of which sums are exact."""
    tokens, rows = weighed.tokens.double(), rows.sum(0).double()
    price = token_prices(prices, weighed.stats)
    share = price / prices.token
    found = []
    for factor in FACTORS:
        cost = tokens * price + rows * (prices.row * factor)
        cost[0] *= prices.all_for_less
        best = cost.argmin(0, keepdim=True)
        found.append(torch.stack([(tokens.gather(0, best)[0] * share).round(), rows.gather(0, best)[0]], 1))
    return torch.stack(found) * prices.far[:, None]


def busiest(offered: Tensor, tables: PolicyTables) -> Tensor:
    """[policies] float64, bytes of the busiest direction of a node, forward and backward; ``offered`` [P, policies, P,
    2] are the :func:`offers` of all ranks."""
    n = tables.n_nodes
    by_node = offered.new_zeros(n, *offered.shape[1:]).index_add_(0, tables.node_of, offered)
    by_node = by_node.new_zeros(n, offered.shape[1], n, 2).index_add_(2, tables.node_of, by_node)
    # asks[x] are of what node x asks for, asked[x] of what others ask it for: their arrivals are its departures.
    asks, asked = by_node.sum(2), by_node.sum(0).transpose(0, 1)
    # [nodes, policies, 2, 2, 2], to be summed over tokens and rows.
    moved = asks[..., None, None] * tables.directions + asked[..., None, None] * tables.directions.flip(2)
    return moved.sum(2).amax(3).amax(0).sum(1)


def factor_of(offered: Tensor, tables: PolicyTables) -> Tensor:
    """[] float64, the factor of the policy that all ranks take: one of :data:`FACTORS`."""
    bytes_ = busiest(offered, tables)
    bytes_[0] *= LEAST_GAIN
    # The host waits for nothing.
    return tables.factors.gather(0, bytes_.argmin(0, keepdim=True))[0]


def under(prices: Prices, factor: Tensor) -> Prices:
    """The prices under a policy."""
    return prices._replace(row=torch.where(prices.far, prices.row * factor, prices.row))
