"""AdamW over matrices and vectors, the learning rate by step, and clipping by the global norm."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1e-3
    """Learning rate after warm-up."""

    final_lr_ratio: float = 0.1
    """The learning rate at the last step as a share of ``lr`` (0 to 1)."""

    warmup_steps: int = 20
    """Steps over which the learning rate grows linearly from zero."""

    weight_decay: float = 0.1
    """Decay of matrices; norms and biases have none."""

    beta1: float = 0.9
    """Decay of the mean of the gradient (0 to 1)."""

    beta2: float = 0.95
    """Decay of the mean of its square (0 to 1)."""

    eps: float = 1e-8
    """Added to the root of that mean."""

    clip_norm: float | None = 1.0
    """Largest norm of the gradient of all parameters together; null for no clipping."""

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
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio={self.final_lr_ratio} must be between 0 and 1")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            name = "warmup_steps" if self.warmup_steps < 0 else "weight_decay"
            raise ValueError(f"{name}={getattr(self, name)} is negative; use 0 for none")


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of ``module``; its learning rate is set before each step by :func:`learning_rate`."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of ``step`` (1 to ``steps``)."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.final_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def clip_gradients(module: nn.Module, clip_norm: float | None) -> Tensor:
    """Scale all gradients so that their common norm is at most ``clip_norm``; return the norm before that (fp32)."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(module.parameters(), clip_norm, norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
