"""Process groups for Megatron-core's modules, as arguments: its global ``parallel_state`` is not touched."""

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


def process_groups(cp_group: dist.ProcessGroup | None) -> ProcessGroupCollection:
    """Groups of a model that is parallel over the context alone.

    Megatron's layers ask their tensor- and context-parallel groups for their sizes, so those groups must exist: here
    they hold this rank alone. If torch.distributed has not been started, it is started for one process, in memory.

    Args:
        cp_group: context-parallel group; None is one rank.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    alone = dist.group.WORLD
    if dist.get_world_size() > 1:
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return ProcessGroupCollection(tp=alone, pp=alone, cp=cp_group or alone, embd=None)
