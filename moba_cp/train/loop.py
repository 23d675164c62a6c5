"""The training loop: FSDP2 over all ranks, sequences over the context ranks, one optimizer step after another."""

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ..cp.recorder import SelectionRecorder
from ..megatron.model import build_model
from . import checkpoint, memory
from .background import Background
from .batch import Batches, MicroBatch
from .log import CHECKPOINTS, SELECTION, versions
from .mesh import Mesh
from .optimizer import build_optimizer, clip_gradients, finite_step, learning_rate, set_learning_rate
from .plan import RunPlan
from .positions import LossByPosition
from .report import Reporter
from .selection import SelectionStatistics
from .signals import Stopped, StopRequest
from .storage import StorageError
from .trace import backends, device_memory, peak_flops, tracing
from .traffic import StepTotals
from .weights import load_weights
from .yaml_config import to_dict


class Trainer:
    """One training run on one rank: built or resumed, trained to the last step.

    Args:
        plan: the checked run.
        mesh: this rank's place; all ranks construct and call together.
        resume: a checkpoint of this model to go on from.
        check_folder: called by the first rank before a checkpoint takes its name; raises ValueError where the run's
            folder is no longer this run's.
        facts: what else the manifests of its checkpoints say.
    """

    def __init__(
        self,
        plan: RunPlan,
        mesh: Mesh,
        resume: Path | None,
        check_folder: Callable[[], None] = lambda: None,
        facts: dict[str, Any] | None = None,
    ):
        config = plan.config
        self.plan, self.config, self.mesh = plan, config, mesh
        self.folder = Path(config.run.directory)
        self.batches = Batches(plan, mesh)
        mesh.heartbeat.at(0, "building the model")
        # Shard the module on the meta device, before it has weights: no rank ever holds all of them.
        self._attention = config.attention.at(1, config.run.steps)
        module = build_model(config.model, self._attention, cp_group=mesh.context_group, device="meta")
        fit = mesh.size, plan.tokens_per_rank(), mesh.device, mesh.group, mesh.context_size
        self.memory = memory.choose(config, *fit)
        module.set_memory(self.memory.layers)
        on_host = config.memory.state == "host"
        self.module = shard_weights(module, mesh, getattr(torch, config.run.dtype), on_host, self.memory.gathered)
        self.module.to_empty(device="cpu" if on_host else mesh.device)
        self.module.init_weights(config.run.seed)
        self.optimizer = build_optimizer(self.module, config.optimizer)
        # A prolonged run goes on from the last step before the decay.
        self._kept_step = config.optimizer.decay_start(config.run.steps) if config.optimizer.schedule == "wsd" else None
        self._ahead: tuple[int, list[MicroBatch]] = (0, [])
        """A step, and its sequences made ahead."""
        self.step, self._start, self._check_folder, self._facts = 0, resume, check_folder, facts or {}
        self._skipped = 0
        self._background = Background(mesh.save_group) if mesh.save_group is not None else None
        self._beside_validation: dict[str, Any] = {}
        if resume is not None:
            self.step = checkpoint.read_meta(resume).step
            mesh.heartbeat.at(self.step, "loading the checkpoint")
            checkpoint.load(resume, self.module, self.optimizer, mesh.group)
        elif config.run.start_from is not None:
            load_weights(config.run.start_from, self.module, mesh.group)

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the last step's log entry, on every rank.

        Raises:
            ValueError: loss or gradient were infinite or NaN in more than ``optimizer.skip_nonfinite`` steps in a row.
            Stopped: the run was asked to stop, and has saved.
        """
        run = self.config.run
        # Rank 0 writes files only after every rank has passed its checks.
        dist.barrier(self.mesh.group)
        with (
            Reporter(self.plan, self.mesh, self.step, self._start, self.memory) as reporter,
            StopRequest(self.mesh.group) as stop,
        ):
            reporter.note(*self.memory.lines(), *backends(self.config, self.mesh.device))
            if self.step == 0 and (loss := self.validation_loss()) is not None:
                reporter.start(loss, self._beside_validation)
            record: dict[str, Any] = {}
            while self.step < run.steps:
                with tracing(self.folder, self.step + 1 == run.trace_step, self.mesh) as parts:
                    record = self.train_step()
                record |= parts
                # Save at once: the machines may be gone in a minute.
                if stop.agreed() and self.step < run.steps:
                    self._save(last=True)
                    reporter.report(record)
                    stop.answer(self.step)
                    raise Stopped(self.step)
                if self.step % run.validate_every == 0 or self.step == run.steps:
                    if (loss := self.validation_loss()) is not None:
                        record |= {"validation_loss": loss, **self._beside_validation}
                reporter.report(record)
                if self.step % run.checkpoint_every == 0 or self.step in (run.steps, self._kept_step):
                    if problem := self._save(last=self.step == run.steps):
                        reporter.note(f"step {self.step}: {problem}")
                    reporter.draw()
        return record

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over all sequences of the step; returns its log entry."""
        started = time.monotonic()
        self.step += 1
        config, step = self.config, self.step
        heartbeat = self.mesh.heartbeat
        heartbeat.at(step, "data")
        self._follow_schedule()
        # Random numbers depend on seed and step alone, so a checkpoint need not store a generator's state.
        torch.manual_seed(config.run.seed * 2**32 + step)
        self.batches.comm.reset_counters()
        batches = self._batches_of(step)
        labels = sum(batch.label_count() for batch in batches)
        dist.all_reduce(labels, group=self.mesh.group)
        loss_sum, index_sum = torch.zeros(2, dtype=torch.float64, device=self.mesh.device).unbind()
        heartbeat.at(step, "forward and backward")
        for batch in batches:
            loss = self._loss_sum(batch)
            # FSDP averages gradients over ranks, but the loss is a mean over the labels of all ranks: undo the average.
            (loss * (self.plan.size / labels.clamp(min=1))).backward()
            loss_sum += loss.detach()
            if (of_index := self.module.index_loss) is not None:
                index_sum += of_index
        heartbeat.at(step, "optimizer")
        norm = clip_gradients(self.module, config.optimizer.clip_norm)
        rate = learning_rate(config.optimizer, step, config.run.steps)
        set_learning_rate(self.optimizer, config.optimizer, rate)
        totals = StepTotals(loss_sum, labels, norm, self.batches.comm, self.mesh.group, index_sum)
        # On the device: a loss or gradient that is not finite changes no weight, and nobody waits to learn of it.
        finite_step(self.optimizer, totals.nonfinite)
        self.optimizer.zero_grad()
        del batches
        # Read and copied while the device is still busy.
        if step < config.run.steps:
            self._ahead = step + 1, list(self.batches.training(step + 1))
        heartbeat.at(step, "waiting for the device")
        # The one wait of the host in a step; not for the optimizer.
        loss, count, gradient_norm, exchange, index_loss = totals.get()
        skipped = self._skip(loss, gradient_norm)
        seconds = time.monotonic() - started
        return {
            "step": step,
            "loss": loss,
            "labels": count,
            **({"index_loss": index_loss} if self.module.index_loss is not None else {}),
            "gradient_norm": gradient_norm,
            "learning_rate": rate,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.plan.tokens_per_step / seconds, 1),
            **self.plan.utilization(self._attention, self.plan.tokens_per_step / seconds, peak_flops(self.mesh.device)),
            **device_memory(self.mesh.device),
            "attention": self._attention.default,
            "exchange": exchange,
            **({"skipped": True} if skipped else {}),
        }

    def _batches_of(self, step: int) -> list[MicroBatch]:
        """This rank's sequences of a step, made ahead or now."""
        (made_for, batches), self._ahead = self._ahead, (0, [])
        return batches if made_for == step else list(self.batches.training(step))

    def _skip(self, loss: float, norm: float) -> bool:
        """Whether the step was left out because its loss or gradient is not finite; ValueError for one too many."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._skipped = 0
            return False
        self._skipped += 1
        if self._skipped > self.config.optimizer.skip_nonfinite:
            raise ValueError(
                f"loss {loss}, gradient norm {norm} at step {self.step}: not finite, {self._skipped} times in a row; "
                f"no weight was changed by it. Lower optimizer.lr={self.config.optimizer.lr}, raise "
                "optimizer.warmup_steps, or raise optimizer.skip_nonfinite to leave such steps out"
            )
        return True

    @torch.no_grad()
    def validation_loss(self) -> float | None:
        """Mean loss per label of the validation sequences, the same on every rank; None without validation data."""
        self.mesh.heartbeat.at(self.step, "validation")
        run, watches = self.config.run, self.mesh.data_rank == 0
        recorder = SelectionRecorder() if run.selection_maps and watches else None
        statistics = SelectionStatistics() if run.selection_statistics and watches else None
        observers = [observer for observer in (recorder, statistics) if observer is not None]
        sums = LossByPosition(self.config.data.seq_len, self.mesh.device, run.position_range)
        self.module.eval()
        for index, batch in enumerate(self.batches.validation(_all_of(observers))):
            if index == 0 and statistics is not None:
                statistics.context = batch.context
            sums.add(
                self.module(batch.tokens, batch.labels, batch.context), batch.labels, batch.context.document_positions
            )
            if index == 0 and recorder is not None:
                recorder.save(self.folder / SELECTION, batch.context)
        self.module.train()
        loss, by_position = sums.reduce(self.mesh.group)
        selection = statistics.result() if statistics is not None else {}
        self._beside_validation = {"validation_by_position": by_position} | (
            {"selection": selection} if selection else {}
        )
        return loss

    def _follow_schedule(self) -> None:
        """Set the attention that the schedule has for this step; it depends on the step alone, also when resumed."""
        attention = self.config.attention.at(self.step, self.config.run.steps)
        if attention != self._attention:
            self.module.set_attention(attention)
            self._attention = attention

    def _loss_sum(self, batch: MicroBatch) -> Tensor:
        """Loss of this rank's labels in one sequence, summed; scalar fp32."""
        return self.module(batch.tokens, batch.labels, batch.context, "sum")

    def _save(self, last: bool) -> str | None:
        """Write a checkpoint; why it could not be written, where the run is to go on all the same. After the ``last``
        step it does not."""
        self.mesh.heartbeat.at(self.step, "checkpoint")
        run = self.config.run
        meta = checkpoint.CheckpointMeta(self.step, to_dict(self.config), self.plan.corpus.fingerprint, run.seed)
        ranks = {"ranks": self.plan.size, "context_size": self.plan.context_size}
        facts = {**ranks, "versions": versions(), **self._facts}
        try:
            checkpoint.save(
                self.folder / CHECKPOINTS,
                meta,
                self.module,
                self.optimizer,
                keep=run.keep_checkpoints,
                keep_step=self._kept_step,
                check=self._check_folder,
                facts=facts,
                group=self.mesh.group,
                background=self._background,
            )
            if last and self._background is not None:
                self._background.finish()
        except StorageError as error:
            if run.failed_save == "stop" or last:
                raise
            return str(error)
        return None


def _all_of(observers: list) -> Callable | None:
    """One observer that passes on to all; None for none."""
    if len(observers) < 2:
        return observers[0] if observers else None

    def observe(*seen) -> None:
        for observer in observers:
            observer(*seen)

    return observe


def shard_weights(
    module: nn.Module, mesh: Mesh, dtype: torch.dtype, on_host: bool = False, gathered: bool = False
) -> nn.Module:
    """Shard each transformer layer and the rest over all ranks (FSDP2); compute in ``dtype``, sum gradients in fp32.

    ``on_host``: weights, gradients and what the optimizer keeps stay in page-locked host memory. ``gathered``: weights
    of a layer are gathered once, for both passes.
    """
    # Do not cast inputs: FSDP would also round rotary angles, and rebuild the context to cast tensors inside it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if on_host else OffloadPolicy()
    options = {"mesh": mesh.shard_mesh, "mp_policy": policy, "offload_policy": offload}
    for layer in module.decoder.layers:
        fully_shard(layer, reshard_after_forward=not gathered, **options)
    return fully_shard(module, **options)
