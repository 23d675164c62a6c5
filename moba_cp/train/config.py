"""The sections of a training run's YAML file; each is a dataclass that stands beside the code that uses it."""

import os
from dataclasses import dataclass, field, replace
from typing import Literal

from ..cp.options import ExchangeOptions
from ..data.config import DataConfig
from ..model.attention import AttentionConfig
from ..model.config import ModelConfig
from .memory import MemoryConfig
from .optimizer import OptimizerConfig

_YEAR = 366 * 86_400.0


@dataclass(frozen=True)
class RunConfig:
    """Length, folder and device of the run, and what it writes when."""

    directory: str = "runs/train"
    """Where log, resolved config, versions, curve and checkpoints go."""

    steps: int = 1000
    """Optimizer steps."""

    seed: int = 0
    """Decides the initial weights and the order of the data."""

    start_from: str | None = None
    """Weights to begin with: a run's folder or one of its checkpoints, or a folder of Hugging Face's with config.json
    and safetensors (Llama, Mistral, Qwen2, Qwen3); of the same model whatever its attention and rotary embedding. The
    optimizer and the steps begin anew; to go on with a run as it was, use ``--resume``."""

    context_size: int | None = None
    """Ranks that share one sequence; null for all. The others divide the sequences of a step among them."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of forward and backward; weights, sums of gradients and optimizer state are float32."""

    deterministic: bool = False
    """Bit-identical runs, resumed ones too, on the same number of ranks and the same devices: attention.deterministic,
    links that are assumed and not measured (exchange.measure_links), and PyTorch's own operators where they have such
    a variant. Slower on GPUs; CPUs need nothing. On two GPUs runs were seen that differ all the same
    (docs/reliability.md)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of each rank where there is one (NCCL), else the CPU (gloo)."""

    validate_every: int = 100
    """Steps between validations; there is always one before the first step and one after the last."""

    position_range: int | None = None
    """Positions of each range for which a validation logs its loss, by the position of a token in its document; null
    for ranges that double, from 128 on."""

    checkpoint_every: int = 500
    """Steps between checkpoints; there is always one after the last step."""

    selection_maps: bool = False
    """At each validation, record which blocks the queries of the first sequence choose (selection.pt, for
    moba-cp bench exchange --gate) and draw it layer by layer (selection.png)."""

    selection_statistics: bool = False
    """At each validation, log for each MoBA layer how far back the queries of the first sequence choose, how evenly,
    how often a document's first block and the one before their own, and how alike in the heads of a group and in rows
    that follow one another."""

    tensorboard: bool = False
    """Write what is logged for TensorBoard too, into the run's folder ``tensorboard``."""

    wandb: str | None = None
    """A project of Weights & Biases to report to; null for none."""

    trace_step: int | None = None
    """A step of which rank 0 writes a trace (``trace.json.gz``, for Perfetto or chrome://tracing), a snapshot of the
    device's memory (``memory.pickle``, for pytorch.org/memory_viz) and the time by part into the log; null for none."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay; 0 for all."""

    background_save: bool = False
    """Write checkpoints while training goes on, from a copy of weights and optimizer state in host memory: a step waits
    for that copy, and for the checkpoint before if it is not written yet."""

    failed_save: Literal["stop", "go_on"] = "stop"
    """When a checkpoint cannot be written (a full disk): end the run, or say so and go on to the next. What was there
    stays. The checkpoint after the last step has to be written."""

    timeout_seconds: float = 300.0
    """How long a rank waits for the others before it ends the run with an error."""

    def __post_init__(self):
        if not self.directory.strip():
            raise ValueError(f"directory={self.directory!r} is empty; name a folder such as runs/demo")
        for name in ("directory", "start_from"):
            if (given := getattr(self, name)) is not None and given.startswith("~"):
                path = os.path.expanduser(given)
                if path.startswith("~"):
                    raise ValueError(f"{name}={given!r} names a home folder that is not known; give the whole path")
                object.__setattr__(self, name, path)
        least = {"steps": 1, "seed": 0, "validate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 0}
        for name, bound in (least | {"context_size": 1, "trace_step": 1, "position_range": 1}).items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}={value} is below {bound}; use {bound} or more")
        if self.seed >= 2**31:
            raise ValueError(f"seed={self.seed} is above 2**31 - 1; use a smaller one")
        if not 0 < self.timeout_seconds <= _YEAR:
            rule = "is not above 0" if self.timeout_seconds <= 0 else "is more than a year"
            raise ValueError(f"timeout_seconds={self.timeout_seconds} {rule}; 300 is usual")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Which layers attend how, and how a sequence lies on the ranks."""

    exchange: ExchangeOptions = field(default_factory=ExchangeOptions)
    """What MoBA layers move between the ranks that share a sequence, and how."""

    data: DataConfig = field(default_factory=DataConfig)
    """Text and sequences."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Where a step's tensors are kept."""

    run: RunConfig = field(default_factory=RunConfig)
    """Length, place and device of the run."""

    def __post_init__(self):
        if self.run.deterministic and not self.attention.deterministic:
            object.__setattr__(self, "attention", replace(self.attention, deterministic=True))
        if self.run.deterministic and self.exchange.measure_links:
            # What is measured may differ from start to start, and with it the order of sums.
            object.__setattr__(self, "exchange", replace(self.exchange, measure_links=False))
