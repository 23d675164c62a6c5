"""The index branch in Megatron's own layers, where autograd schedules the backward pass.

Legend: L tokens of one sequence on this rank, b sequences, H hidden size, h query heads and g key/value heads,
D head dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ..attention import full_attention, moba_attention
from ..index.branch import IndexBranch
from ..index.config import IndexConfig
from ..passes import AttentionPasses
from ..transforms import once_differentiable, without_autocast


class IndexWeights(nn.Module):
    """The parameters of a layer's index branch.

    Args:
        options: of the branch.
        config: of the model, not split by tensor parallelism.

    Raises:
        ValueError: the model is split so, or computes in float16.
    """

    def __init__(self, options: IndexConfig, config: TransformerConfig):
        super().__init__()
        if config.tensor_model_parallel_size > 1:
            raise ValueError(
                f"attention.index with tensor_model_parallel_size={config.tensor_model_parallel_size}: index branches "
                "are not split over tensor-parallel ranks; use 1, or leave attention.index out"
            )
        self.options = options
        shape = options.width(config.num_query_groups), config.hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        """[width, H]: of each KV head its queries, its key and the queries' weights."""
        if config.perform_initialization:
            config.init_method(self.weight)
        self.loss: Tensor | None = None
        """[] of the last batch, the mean over this rank's tokens: how far the branch is from what attention gives the
        blocks, in nats; None where it did not learn, or :class:`moba_cp.megatron.MoBAGPTModel` says it."""

    def extra_repr(self) -> str:
        return f"heads={self.options.heads}, dim={self.options.dim}, score={self.options.score}"


class IndexInput(NamedTuple):
    """What the index branch of a layer reads."""

    hidden: Tensor
    """[L, b, H], the normed input of the layer's self-attention."""
    rotary: Tensor | None
    """[L, 1, 1, D], the angles by which heads turn, twice side by side."""
    per_token: bool
    """Whether the trainer divides the gradients of summed losses by the number of tokens."""


def watch_input(attention: nn.Module) -> None:
    """From now on a layer's self-attention tells its core attention what it reads, where that has an index branch."""
    core = attention.core_attention
    if core.index is None:
        return

    def tell(module, args, kwargs) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        core.index_input = IndexInput(hidden, kwargs.get("rotary_pos_emb"), module.config.calculate_per_token_loss)

    attention.register_forward_pre_hook(tell, with_kwargs=True)


def attend_by_index(
    weights: IndexWeights,
    given: IndexInput | None,
    passes: AttentionPasses,
    branch: IndexBranch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Attention to what the branch chooses, or full attention, from which it learns; [L, b, h * D].

    Args:
        given: None where nobody has told.
        query: [L, b, h, D]; key, value: [L, b, g, D].

    Raises:
        ValueError: what the branch reads is not known, or sequences are packed by Megatron's own parameters.
    """
    name = passes.layer
    if given is None:
        raise ValueError(
            f"attention.index in {name}: its index branch reads the layer's input, which is not known here: a module "
            "of the layer was replaced or has a hook, the layer runs under autocast or recomputes its core attention "
            "alone, or it is neither one of moba_cp.megatron.build_model's nor of layer_spec's; leave that out, or "
            "attention.index"
        )
    if query.dim() == 3:
        raise ValueError(
            f"attention.index in {name}: packed sequences (thd) are not served; leave them out, or attention.index"
        )
    if not isinstance(given.rotary, Tensor) or given.rotary.shape[::3] != (query.shape[0], query.shape[3]):
        shape = tuple(given.rotary.shape) if isinstance(given.rotary, Tensor) else given.rotary
        raise ValueError(
            f"attention.index in {name}: rotary_pos_emb is {shape}, but index branches turn as whole heads do, by "
            f"[{query.shape[0]}, 1, 1, {query.shape[3]}]; use rotary positions of whole heads, or no attention.index"
        )
    angles = given.rotary[:, 0, 0, : query.shape[3] // 2].detach()
    outs, losses = [], []
    for hidden, q, k, v in zip(given.hidden.unbind(1), query.unbind(1), key.unbind(1), value.unbind(1)):
        out, loss = _attend_and_learn(weights, hidden.detach(), angles, given.per_token, passes, branch, q, k, v)
        outs.append(out.flatten(1))
        losses.append(loss)
    weights.loss = None if losses[0] is None else torch.stack(losses).mean()
    return torch.stack(outs, 1)


def _attend_and_learn(
    weights, hidden, angles, per_token: bool, passes, branch, q, k, v
) -> tuple[Tensor, Tensor | None]:
    """Of one sequence: out [L, h, D], and the loss per token."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    context = passes.context
    context.comm.layer = passes.layer
    with torch.no_grad():
        projected = branch.empty(hidden)
        branch.split(F.linear(hidden, weights.weight), cos, sin, projected)
        scored = branch.gather(projected)
        chosen = branch.choose(scored) if passes.kind == "moba" else None
    where = {"cp": context} if passes.across_ranks else {"cu_seqlens": context.cu_seqlens}
    options = {"softmax_scale": passes.scale, "return_lse": True, **where}
    if chosen is None:
        out, lse = full_attention(q, k, v, deterministic=passes.config.deterministic, **options)
    else:
        out, lse = moba_attention(q, k, v, passes.config, block_indices=chosen, **options)
    if not (torch.is_grad_enabled() and weights.weight.requires_grad):
        return out, None
    with torch.no_grad():
        loss, grads = branch.learn(scored, q, k, lse, passes.scale, chosen)
        dmixed = branch.split_backward(grads, cos, sin)
        gradient = dmixed.to(hidden.dtype).T @ hidden
        if not per_token:
            gradient /= hidden.shape[0]
    return _Beside.apply(out, weights.weight, gradient), loss / hidden.shape[0]


class _Beside(torch.autograd.Function):
    """A tensor as it is; with its gradient another tensor gets one that is known already."""

    @staticmethod
    @without_autocast
    def forward(ctx, x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dx: Tensor) -> tuple[Tensor, Tensor, None]:
        return dx, ctx.saved_tensors[0], None
