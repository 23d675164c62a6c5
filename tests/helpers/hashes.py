"""Where two training runs part that should be equal to the bit: a hash of what each part of a step gives.

Hashes are computed on the device, in its order, and read when the step is over, so that nobody waits for them.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from moba_cp import eager, kernels
from moba_cp.cp import comm, moba
from moba_cp.cp.full import attention as full
from moba_cp.kernels import attention, launches, work
from moba_cp.model.layer import LayerRun
from moba_cp.train.loop import Trainer

_PRIME = 65521
_OF_ATTENTION = ("attend", "merge_rows", "copy_pages", "gather_rows", "block_means", "select_blocks")


def watch(folder: str) -> None:
    """From now on this process writes a line for each step into ``folder/RANK``: number, loss, norm of the gradient,
    and name and hashes of each part in the order in which they were issued."""
    parts: list[tuple[str, list[torch.Tensor]]] = []
    weights: dict[tuple[int, torch.device], torch.Tensor] = {}

    def hashed(x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().contiguous().view(-1).view(torch.uint8)
        key = flat.numel(), flat.device
        if key not in weights:
            weights[key] = torch.arange(1, flat.numel() + 1, device=flat.device) % _PRIME
        return (flat.long() * weights[key]).sum()

    def note(name: str, values) -> None:
        values = values if isinstance(values, (tuple, list)) else [values]
        parts.append((name, [hashed(x) for x in values if isinstance(x, torch.Tensor) and x.numel()]))

    def watched(owner, name: str, label: str) -> None:
        real: Callable = getattr(owner, name)

        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            note(label, result)
            return result

        setattr(owner, name, call)

    for name in ("project", "finish", "finish_backward"):
        watched(LayerRun, name, f"{name} of a layer")
    watched(moba, "forward_pass", "MoBA")
    watched(full, "forward_pass", "full attention")
    for backend in (eager, kernels):
        for name in _OF_ATTENTION:
            watched(backend, name, name)
    build, merge = work.build_routing, launches.merge_visits

    def build_routing(*tables):
        index = build(*tables)
        used = torch.arange(index.n_visits, device=index.flat.device) < index.list_start[-1]
        note("index of visits", [index.list_start, torch.where(used, index.visits, -1)])
        return index

    def merge_visits(part, part_lse, *out, **options):
        note("partial results", [part_lse, torch.where(part_lse[..., None] > -torch.inf, part, 0)])
        return merge(part, part_lse, *out, **options)

    work.build_routing = attention.build_routing = build_routing
    launches.merge_visits = merge_visits
    started = comm.Communicator._started

    def start(self, work, x, out, what):
        note(f"{what}: sent", x)
        wait = started(self, work, x, out, what)

        def waited():
            received = wait()
            note(f"{what}: received", received)
            return received

        return waited

    comm.Communicator._started = start
    train_step = Trainer.train_step
    Path(folder).mkdir(parents=True, exist_ok=True)

    def step(self):
        parts.clear()
        record = train_step(self)
        sums = iter(torch.stack([x.to(self.mesh.device) for _, values in parts for x in values]).tolist())
        found = [[name, [next(sums) for _ in values]] for name, values in parts]
        with open(Path(folder) / os.environ["RANK"], "a", encoding="utf-8") as file:
            file.write(json.dumps([record["step"], record["loss"], record["gradient_norm"], found]) + "\n")
        return record

    Trainer.train_step = step


def differences(folders: list[Path], ranks: int = 2) -> list[str]:
    """For each run that does not have the loss and norm that most have, the first step in which it has not, and on each
    rank the first part of that step that differs."""
    runs = [[_lines(folder / str(rank)) for rank in range(ranks)] for folder in folders]
    found = []
    steps = min(len(run[0]) for run in runs)
    usual = [Counter(tuple(run[0][i][1:3]) for run in runs).most_common(1)[0][0] for i in range(steps)]
    for folder, run in zip(folders, runs, strict=True):
        at = next((i for i in range(steps) if tuple(run[0][i][1:3]) != usual[i]), None)
        if at is None:
            continue
        other = next(x for x in runs if tuple(x[0][at][1:3]) == usual[at])
        for rank in range(ranks):
            pairs = zip(other[rank][at][3], run[rank][at][3], strict=False)
            part = next((mine[0] for theirs, mine in pairs if theirs != mine), "no part")
            step, loss = run[0][at][:2]
            found.append(f"{folder.name}, step {step}, rank {rank}: loss {loss}, of most {usual[at][0]}; first {part}")
    return found


def _lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
