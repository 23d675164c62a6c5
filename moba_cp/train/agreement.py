"""Ranks that do the same: what one of them decides, all follow, and what they were given must be equal.

Objects travel through torch.distributed's pickles, between the ranks of one run alone.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_first(decide: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What ``decide()`` returns on the first rank, on all of them; a collective call.

    Raises:
        ValueError, OSError: on all ranks, what ``decide`` raised on the first.
    """
    result: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            result[0] = decide()
        except (ValueError, OSError) as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    if result[1] is not None:
        raise result[1]
    return result[0]
