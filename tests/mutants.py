"""Faults made by hand, one at a time: the tests named beside each must fail.

    python -m tests.mutants              # all of them, in a copy of the checkout; some minutes each on a busy machine
    python -m tests.mutants NAME ...     # some
    python -m tests.mutants --check      # only that each still has its place in the source

The copy's tests are run first without any fault. A fault that no test sees is listed, and the exit code is 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """One fault: ``old`` becomes ``new`` in ``file``, and one of ``tests`` (pytest's arguments) has to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


# Some tests of each file, so that all faults are tried within an hour on two cores.
ATTENTION = "tests/test_attention.py -k golden or random_float64 or ties_and or equal_keys or nan_stays"
MOBA = "tests/cp/test_moba.py tests/cp/test_exchange.py -k many_ranks_equal_one or every_mode_equals_one_rank"
FULL = "tests/cp/test_full.py -k test_ranks_equal_one"
GIVEN = "tests/test_selection.py -k any_gate or passed_over or names_the_first_row"
CHECKPOINT = "tests/train/test_checkpoint.py"
MUTANTS = [
    # Masks.
    Mutant(
        "causal mask lets one key more through", "moba_cp/eager/attention.py",
        "offset >= self.tasks.limit[tasks][..., None]", "offset > self.tasks.limit[tasks][..., None]", ATTENTION,
    ),
    Mutant(
        "the current block is a candidate too", "moba_cp/eager/select.py",
        "(block >= oldest) & (block < current)", "(block >= oldest) & (block <= current)", ATTENTION,
    ),
    Mutant(
        "blocks of earlier documents are candidates", "moba_cp/eager/select.py",
        "(block >= oldest) & (block <", "(block >= 0) & (block <", ATTENTION,
    ),
    # Other gates, and selections from outside.
    Mutant(
        "a given block may be the current one", "moba_cp/eager/select.py",
        "(block_indices < current_block - first)", "(block_indices <= current_block - first)", GIVEN,
    ),
    Mutant(
        "a block that is named twice counts twice", "moba_cp/eager/select.py",
        "masked_fill_(again, -1)", "masked_fill_(again & (slot < 0), -1)", GIVEN,
    ),
    Mutant(
        "the sink is not taken", "moba_cp/eager/select.py",
        "candidate & (block == oldest)", "candidate & (block < oldest)", GIVEN,
    ),
    Mutant(
        "the first check passes what is named twice", "moba_cp/given.py",
        "| (named >= limit) | again", "| (named >= limit)", GIVEN,
    ),
    Mutant(
        "heads of a group that part choose by themselves", "moba_cp/cp/moba.py",
        "config.gate.shared and tables.shares_kv", "config.gate.shared and tables.shares_kv and False",
        "tests/cp/test_selection.py -k spread_over_ranks",
    ),
    # Scales: forward, backward, across ranks.
    Mutant(
        "no softmax scale", "moba_cp/eager/attention.py",
        "k_rows.transpose(1, 2)) * scale", "k_rows.transpose(1, 2))", ATTENTION,
    ),
    Mutant(
        "no softmax scale in the gradient", "moba_cp/eager/attention.py",
        "head.gather_rows(delta, tasks)[..., None]) * scale", "head.gather_rows(delta, tasks)[..., None])", ATTENTION,
    ),
    Mutant(
        "gradients are averaged over ranks", "moba_cp/train/loop.py",
        "(loss * (self.plan.size / labels.clamp(min=1)))", "(loss / labels.clamp(min=1))",
        "tests/train/test_ranks.py -k ranks_and_layouts",
    ),
    # Ties.
    Mutant(
        "the older of two equal blocks wins", "moba_cp/eager/select.py",
        "rank, order = rank.sort(dim=-1, descending=True, stable=True)\n        best = (n - 1 - order",
        "rank, order = rank.flip(-1).sort(dim=-1, descending=True, stable=True)\n        best = (order", ATTENTION,
    ),
    Mutant(
        "NaN ranks above numbers", "moba_cp/eager/select.py",
        "return torch.where(score.isnan(), torch.iinfo(torch.int64).min + 1, bits)", "return bits", ATTENTION,
    ),
    # Merges.
    Mutant(
        "partial outputs are summed unweighted", "moba_cp/eager/attention.py",
        "out += part * (part_lse - shift).exp()[..., None]", "out += part", ATTENTION,
    ),
    Mutant(
        "the log-sum-exp of the last part is the whole's", "moba_cp/eager/attention.py",
        "return out, lse\n", "return out, lses[-1]\n", ATTENTION,
    ),
    # The plan of an exchange.
    Mutant(
        "a row is sent once for each block", "moba_cp/eager/exchange.py",
        "first[..., slot] &= ~(at[..., :slot] == at[..., slot : slot + 1]).any(-1)", "pass",
        MOBA,
    ),
    Mutant(
        "rows ask for all blocks wherever they go", "moba_cp/eager/exchange.py",
        "wanted = (block >= 0) & (goes == goes.gather(1, (slot % n_slots)[:, None]))", "wanted = block >= 0",
        MOBA,
    ),
    # The return of gradients.
    Mutant(
        "gradients of straddling blocks' tails stay", "moba_cp/cp/straddle.py",
        "local[geometry.tail_from] = tails", "local[geometry.tail_from] += tails", MOBA,
    ),
    Mutant(
        "gradients of fetched blocks are added one row late", "moba_cp/cp/exchange/fetch.py",
        "arrived, begin = wait(), 0", "arrived, begin = wait().roll(1, 0), 0", MOBA,
    ),
    Mutant(
        "gradients of the ring's first step are lost", "moba_cp/cp/full/ring.py",
        "dk.add_to(grads[:, 0])\n", "pass\n", FULL,
    ),
    # Kept stages.
    Mutant(
        "a kept stage is not copied", "moba_cp/cp/allgather/strategy.py",
        "self._kept.append(self._arrived(stage).clone())", "self._kept.append(torch.zeros_like(self._arrived(stage)))",
        "tests/cp/test_allgather.py -k equals_one_rank or stages_of_limited",
    ),
    Mutant(
        "stages restore one another's blocks", "moba_cp/cp/exchange/fetch.py",
        "stage.received, saved = list(saved[:count]), saved[count:]",
        "stage.received, saved = list(saved[:count])[::-1], saved[:count] + saved[count:][count:]",
        MOBA,
    ),
    # Layouts.
    Mutant(
        "zigzag takes a neighbour's last chunk", "moba_cp/cp/layout.py",
        "(start + (2 * size - 1 - rank) * chunk, chunk)", "(start + (size + rank) * chunk, chunk)",
        "tests/cp/test_layout.py",
    ),
    Mutant(
        "positions go on over documents", "moba_cp/cp/context.py",
        "self.document_positions = torch.from_numpy(positions - starts)",
        "self.document_positions = torch.from_numpy(positions)",
        "tests/cp/test_context.py tests/megatron/test_model.py",
    ),
    # Timeouts.
    Mutant(
        "a group of half an hour", "moba_cp/train/mesh.py",
        "dist.new_group(range(i, i + context), timeout=timeout)", "dist.new_group(range(i, i + context))",
        "tests/train/test_heartbeat.py -k every_group",
    ),
    # Schedule.
    Mutant(
        "warm-up begins one step late", "moba_cp/train/optimizer.py",
        "return config.lr * step / config.warmup_steps", "return config.lr * (step - 1) / config.warmup_steps",
        "tests/train/test_optimizer.py",
    ),
    Mutant(
        "a phase ends one step early", "moba_cp/model/schedule.py",
        "if step <= end)", "if step < end)", "tests/model/test_schedule.py",
    ),
    # Resume.
    Mutant(
        "a resumed run repeats a step", "moba_cp/train/loop.py",
        "self.step = checkpoint.read_meta(resume).step\n", "self.step = checkpoint.read_meta(resume).step - 1\n",
        "tests/train/test_kills.py -k goes_on",
    ),
    Mutant(
        "the optimizer's state is not read", "moba_cp/train/checkpoint.py",
        "    storage.read(state, path, group)\n    set_state_dict(",
        "    storage.read({\"model\": state[\"model\"]}, path, group)\n    set_state_dict(", CHECKPOINT,
    ),
    Mutant(
        "the checkpoint's weight decay holds", "moba_cp/train/checkpoint.py",
        "own.update(configured)", "pass", CHECKPOINT,
    ),
    Mutant(
        "hashes are not compared", "moba_cp/train/manifest.py",
        "if found != content[\"files\"][name][\"sha256\"]:", "if False:", CHECKPOINT,
    ),
    Mutant(
        "deleted file by file under its own name", "moba_cp/train/checkpoint.py",
        "path.rename(gone)\n    shutil.rmtree(gone, ignore_errors=True)", "shutil.rmtree(path, ignore_errors=True)",
        CHECKPOINT,
    ),
    # Clipping, and steps that are not finite.
    Mutant(
        "gradients are not clipped", "moba_cp/train/optimizer.py",
        "if clip_norm is not None:\n            nn.utils", "if False:\n            nn.utils",
        "tests/train/test_optimizer.py",
    ),
    Mutant(
        "a step that is not finite is taken", "moba_cp/train/traffic.py",
        ".isfinite()).float()", ".isfinite()).float() * 0", "tests/train/test_nonfinite.py",
    ),
    Mutant(
        "ranks need not agree", "moba_cp/train/agreement.py",
        "    if not names:\n", "    if True:\n", "tests/train/test_agreement.py -k any_key",
    ),
]  # fmt: skip


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="words of the names of those to try")
    parser.add_argument("--check", action="store_true", help="only look whether each fault has its place")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if not arguments.names or any(name in m.name for name in arguments.names)]
    for mutant in chosen:
        count = (ROOT / mutant.file).read_text().count(mutant.old)
        if count != 1:
            print(f"{mutant.name}: stands {count} times in {mutant.file}")
            return 1
    if arguments.check:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        missed = [mutant.name for mutant in chosen if not _caught(mutant, copy)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} were caught", *missed, sep="\n  ")
    return 1 if missed else 0


def _caught(mutant: Mutant, copy: Path) -> bool:
    """Whether a test fails with the fault, and none without it."""
    file, started = copy / mutant.file, time.monotonic()
    whole = file.read_text()
    if (unhurt := _test(mutant.tests, copy)) is not None:
        print(f"?      {mutant.name}: fails without it: {unhurt}", flush=True)
        return False
    file.write_text(whole.replace(mutant.old, mutant.new))
    failure = _test(mutant.tests, copy)
    file.write_text(whole)
    verdict = "caught" if failure is not None else "MISSED"
    print(f"{verdict} {mutant.name} ({time.monotonic() - started:.0f} s): {failure or ''}", flush=True)
    return failure is not None


_passed: set[str] = set()


def _test(tests: str, copy: Path) -> str | None:
    """The first failure of some tests in the copy; None if they pass. What has passed without any fault is not run
    again."""
    whole = all((copy / m.file).read_bytes() == (ROOT / m.file).read_bytes() for m in MUTANTS)
    if whole and tests in _passed:
        return None
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no"]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    files, _, words = tests.partition(" -k ")
    chosen = [*files.split(), *(["-k", words] if words else [])]
    done = subprocess.run([*command, *chosen], cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        if whole:
            _passed.add(tests)
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0][:150] if lines else f"exit code {done.returncode}: {(done.stdout + done.stderr)[-300:]}"


if __name__ == "__main__":
    sys.exit(main())
