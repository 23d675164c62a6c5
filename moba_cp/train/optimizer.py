"""AdamW over matrices and vectors, the learning rate by step, and clipping by the global norm."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ..index.config import INDEX_WEIGHT

# The ends of their parameters' names.
_EMBEDDINGS = ("word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and one of three schedules."""

    lr: float = 1e-3
    """Learning rate after warm-up."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """How the rate falls after warm-up. constant: not at all. cosine: from the first step to the last, so that the
    whole schedule depends on run.steps. wsd (warm-up, stable, decay): ``lr`` until the last steps, in which it falls
    linearly; a run with it can be prolonged (``--resume`` with more steps) and then computes what it would have
    computed had it been longer from the start. It writes a checkpoint before its decay, which stays."""

    decay: int | float = 0.2
    """Length of the decay at the end of wsd: below 1 a share of run.steps, else a number of steps; 0 for no decay."""

    final_lr_ratio: float = 0.1
    """The learning rate at the last step as a share of ``lr`` (0 to 1)."""

    warmup_steps: int = 20
    """Steps over which the learning rate grows linearly from zero."""

    embedding_lr_ratio: float = 1.0
    """The learning rate of the token embedding and the output layer as a multiple of that of all others; 0 keeps them
    as they are."""

    vector_lr_ratio: float = 1.0
    """The same for norms and biases."""

    weight_decay: float = 0.1
    """Decay of matrices; norms and biases have none."""

    beta1: float = 0.9
    """Decay of the mean of the gradient (0 to 1)."""

    beta2: float = 0.95
    """Decay of the mean of its square (0 to 1)."""

    eps: float = 1e-8
    """Added to the root of that mean."""

    moments: Literal["float32", "bfloat16"] = "float32"
    """How the means of the gradient and of its square are kept between steps; computed in float32 either way.
    ``bfloat16`` takes half the memory and needs ``beta2`` of 0.99 or less: smaller changes would be rounded off."""

    clip_norm: float | None = 1.0
    """Largest norm of the gradient of all parameters together; null for no clipping."""

    skip_nonfinite: int = 0
    """How many steps in a row are left out whose loss or gradient is infinite or NaN: they change no weight. One more
    ends the run; with 0 the first does."""

    def __post_init__(self):
        for name, low, high, rule in (
            ("lr", 0.0, 1.0, "above 0 and below 1"),
            ("eps", 0.0, 1.0, "above 0 and below 1"),
            ("clip_norm", 0.0, math.inf, "above 0; use null for no clipping"),
        ):
            value = getattr(self, name)
            if value is not None and not low < value < high:
                raise ValueError(f"{name}={value} must be {rule}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.moments == "bfloat16" and self.beta2 > 0.99:
            raise ValueError(
                f"moments='bfloat16' with beta2={self.beta2}: a step changes the mean by less than bfloat16 can tell; "
                "use beta2 of 0.99 or less, or moments: float32"
            )
        if self.decay < 0 or (self.decay > 1 and self.decay % 1):
            raise ValueError(f"decay={self.decay} is neither a share below 1 nor a number of steps; 0.2 is usual")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio={self.final_lr_ratio} must be between 0 and 1")
        for name in ("warmup_steps", "weight_decay", "skip_nonfinite", "embedding_lr_ratio", "vector_lr_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; use 0 for none")

    def decay_start(self, steps: int) -> int:
        """The last step of a run of ``steps`` before the rate falls."""
        if self.schedule == "constant":
            return steps
        if self.schedule == "cosine":
            return min(self.warmup_steps, steps)
        decay = round(self.decay * steps) if self.decay < 1 else int(self.decay)
        return min(steps, max(self.warmup_steps, steps - decay))


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of ``module``; its learning rates are set before each step by
    :func:`set_learning_rate`."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    # One group with matrices where all have one rate.
    apart = config.embedding_lr_ratio != 1
    embeddings = [p for name, p in named if apart and name.endswith(_EMBEDDINGS)]
    matrices = [p for name, p in named if p.dim() >= 2 and not (apart and name.endswith(_EMBEDDINGS))]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    if embeddings:
        groups.append({"params": embeddings, "weight_decay": config.weight_decay})
    kind = torch.optim.AdamW if config.moments == "float32" else BFloat16AdamW
    return kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimizerConfig, rate: float) -> None:
    """Set ``rate`` in an optimizer of :func:`build_optimizer`, times what each group has by ``config``."""
    for group, ratio in zip(optimizer.param_groups, (1.0, config.vector_lr_ratio, config.embedding_lr_ratio)):
        group["lr"] = rate * ratio


class BFloat16AdamW(torch.optim.AdamW):
    """AdamW whose moments are bfloat16 between steps; a parameter's are widened while it is updated."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step; gradients may be missing. ``closure`` is not served."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"], state["exp_avg_sq"] = (
                        torch.zeros_like(parameter, dtype=torch.bfloat16) for _ in range(2)
                    )
                for name in ("exp_avg", "exp_avg_sq"):
                    # Loaded from a checkpoint they have the parameter's dtype.
                    state[name] = state[name].to(torch.bfloat16)
                moments = [_local(state[name]) for name in ("exp_avg", "exp_avg_sq")]
                wide = [x.float() for x in moments]
                adamw(
                    [_local(parameter)], [_local(parameter.grad)], [wide[0]], [wide[1]], [], [state["step"]],
                    fused=True, grad_scale=None, found_inf=getattr(self, "found_inf", None), amsgrad=False,
                    beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                    weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                )  # fmt: skip
                for kept, new in zip(moments, wide, strict=True):
                    kept.copy_(new)


def _local(x: Tensor) -> Tensor:
    """This rank's shard."""
    return x.to_local() if isinstance(x, DTensor) else x


def finite_step(optimizer: torch.optim.Optimizer, nonfinite: Tensor) -> None:
    """``optimizer.step()``, which changes nothing where ``nonfinite`` is 1; the host does not wait to know.

    Args:
        optimizer: a fused one, whose kernels look at what ``torch.amp.GradScaler`` calls ``found_inf``.
        nonfinite: [] float32, 0 or 1; equal on all ranks. Where the parameters are in host memory it is waited for.
    """
    assert all(group.get("fused") for group in optimizer.param_groups), "an optimizer that would not look at found_inf"
    optimizer.found_inf, optimizer.grad_scale = nonfinite.to(optimizer.param_groups[0]["params"][0].device), None
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of ``step`` (1 to ``steps``)."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = config.decay_start(steps)
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    left = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)


def clip_gradients(module: nn.Module, clip_norm: float | None) -> Tensor:
    """Scale all gradients so that their common norm is at most ``clip_norm``; return the norm before that (fp32).

    Index branches learn from a loss of their own: their gradients have a norm of their own, and leave those of the
    model as they are without them. The norm that is returned is the model's, and infinite or NaN if either is.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.grad is not None]
    norms = []
    for of_index in (False, True):
        parameters = [p for name, p in named if name.endswith(INDEX_WEIGHT) == of_index]
        if not parameters:
            continue
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    # Zero times a finite norm changes nothing; times another it is NaN.
    return norms[0] if len(norms) == 1 else norms[0] + 0 * norms[1]
