"""Where a run reports beside its log: TensorBoard and Weights & Biases. Only rank 0 reports."""

import importlib.util
import secrets
from pathlib import Path
from typing import Any, Protocol

from .config import RunConfig, TrainConfig
from .yaml_config import to_dict

TENSORBOARD, _WANDB_ID = "tensorboard", "wandb-id.txt"
# Of the log's entries: what is no quantity, or has a name of its own below.
_NOT_SHOWN = ("step", "attention", "loss", "validation_loss", "validation_by_position", "selection", "exchange")


class Sink(Protocol):
    """Takes what a step has measured."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Values by their names, such as ``loss/training``."""

    def close(self) -> None:
        """No more comes."""


def check(run: RunConfig) -> None:
    """Raise ModuleNotFoundError for a package that ``run`` asks for and that is not there."""
    for wanted, package in ((run.tensorboard, "tensorboard"), (run.wandb is not None, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"run.{package}", name=package)


def open_sinks(config: TrainConfig, folder: Path, start_step: int) -> list[Sink]:
    """What ``config`` asks for, for the steps after ``start_step``."""
    sinks: list[Sink] = []
    if config.run.tensorboard:
        sinks.append(_TensorBoard(folder / TENSORBOARD, start_step))
    if config.run.wandb is not None:
        sinks.append(_WandB(config, folder, start_step))
    return sinks


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step's log entry by the names that charts have."""
    values = {"loss/training": record.get("loss"), "loss/validation": record.get("validation_loss")}
    for row in record.get("validation_by_position", ()):
        values[f"loss by position/{row['from']:07d} to {row['to']}"] = row["loss"]
    for layer, of_layer in record.get("selection", {}).items():
        values |= {f"selection {name}/{layer}": value for name, value in of_layer.items()}
    exchange = record.get("exchange", {})
    values |= {f"exchange/{name}": x for name, x in exchange.items() if name not in ("layers", "first_rank")}
    values |= {f"exchange of rank 0/{name}": x for name, x in exchange.get("first_rank", {}).items()}
    values |= {f"run/{name}": value for name, value in record.items() if name not in _NOT_SHOWN}
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


class _TensorBoard:
    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier start wrote of later steps is hidden.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if "loss/validation" in values:
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: TrainConfig, folder: Path, start_step: int):
        import wandb

        # A resumed run goes on in the same chart.
        file = folder / _WANDB_ID
        if not (start_step and file.is_file()):
            file.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=config.run.wandb,
            name=folder.absolute().name,
            id=file.read_text(),
            resume="allow",
            dir=str(folder),
            config=to_dict(config),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
