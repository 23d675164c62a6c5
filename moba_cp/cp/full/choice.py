"""Which of ring and all-gather brings K and V of full attention."""

from torch import Tensor

from ..context import CPContext
from .schedule import schedule_of

# Below this a ring's steps are too short to hide their latency.
SMALL_BYTES = 64 << 20


def without_heads(k: Tensor, cp: CPContext) -> str:
    """``allgather`` where K and V of the whole sequence are small and nearly all of it is seen, else ``ring``; k
    [L, Hkv, D]."""
    small = 2 * k.nbytes * cp.size <= SMALL_BYTES
    return "allgather" if small and cp.size > 1 and max(schedule_of(cp).hops) == cp.size - 1 else "ring"
