"""Runs the other tests of this folder in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.distributed import TIME_SCALE

ROOT = Path(__file__).parents[2]
NOT_HERE = (
    "test_interpreted",
    "test_hopper_compiles",
    "test_in_place_compiles",
    "test_index_compiles",
    "test_kernels_gpu",
    "test_shared_gpu",
)
# The longest first, so that none of them is what the last worker still runs alone.
LONGEST = ("test_storages", "test_attention", "test_select")
FILES = sorted(
    (path for path in Path(__file__).parent.glob("test_*.py") if path.stem not in NOT_HERE),
    key=lambda path: (LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST), path.stem),
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_in_the_interpreter(path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280 * TIME_SCALE,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
