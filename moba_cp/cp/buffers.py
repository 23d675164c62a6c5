"""Memory in which rows of other ranks stand while layers attend to them. Host arithmetic, before anything runs.

Copy engines bring them into buffers that all ranks map, which stay from the first pass on and which PyTorch's allocator
does not count. Where NCCL brings them, tensors of about these sizes stand as long as a pass.
"""

from .allgather import copies as gather_copies
from .allgather.costs import pass_seconds
from .allgather.stages import heads_of_stages
from .heads import copies as head_copies
from .heads.choice import Layer, choose_across_nodes, choose_team, team_size
from .heads.costs import HeadCosts
from .links import ASSUMED
from .options import ExchangeOptions
from .symmetric_memory import slot_bytes


def planned_team(layer: Layer, options: ExchangeOptions) -> int:
    """Ranks that will exchange tokens for heads, 1 for none."""
    if layer.size == 1:
        return 1
    if options.head_ranks is not None or options.mode == "heads":
        return options.head_ranks or layer.size
    if options.mode == "auto" and team_size(options, layer.size) < layer.size:
        # Links are measured once the ranks have met; of what they decide sizes differ little.
        return choose_across_nodes(layer, options, ASSUMED, True, True).h
    return choose_team(layer, options).h if options.mode == "auto" and layer.moba is not None else 1


def buffer_bytes(layer: Layer, options: ExchangeOptions) -> int:
    """Bytes of a rank's buffers for a layer, forward and backward, by the way that serves it where nothing is planned:
    what selected blocks take that are exchanged instead is known only with the selection."""
    if layer.size == 1:
        return 0
    h = planned_team(layer, options)
    size, n_local, heads = layer.size, layer.n_local, layer.heads
    total = 0
    if h > 1:
        costs = HeadCosts(h, n_local, heads, layer.dim, layer.dtype, options)
        total += head_copies.SLOTS * sum(map(slot_bytes, costs.stage_bytes(layer.moba is None)))
        size, n_local = size // h, h * n_local
        heads = costs.units * costs.unit, costs.units
    if layer.moba is None or size == 1:
        return total
    token = 2 * layer.dim * layer.dtype.itemsize
    seconds = pass_seconds(n_local * heads[0], layer.dim, *layer.moba, size * n_local)
    stages = heads_of_stages(heads[1], options.stages, size * n_local * token, seconds)
    rows = size * n_local * max(stage.stop - stage.start for stage in stages)
    gradient = 2 * layer.dim * options.wire_dtype(layer.dtype).itemsize
    slots = gather_copies.SLOTS
    return total + slots["kv"] * slot_bytes(rows * token) + slots["gradients"] * slot_bytes(rows * gradient)
