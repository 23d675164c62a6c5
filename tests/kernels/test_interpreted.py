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
    "test_key_conv_compiles",
    "test_kernels_gpu",
    "test_shared_gpu",
)
# Each process imports PyTorch and Triton anew, so that files share one: those that take long one or two, first, so that
# none of them is what the last worker still runs alone; the others all.
LONG = [
    ["test_storages"],
    ["test_attention"],
    ["test_select", "test_select_gated"],
    ["test_public", "test_shared"],
    ["test_backward", "test_routing"],
    ["test_index_branch"],
]
SHORT = {path.stem for path in Path(__file__).parent.glob("test_*.py")} - {*NOT_HERE, *sum(LONG, [])}


@pytest.mark.parametrize("files", [*LONG, sorted(SHORT)], ids="+".join)
def test_in_the_interpreter(files):
    paths = [str(Path(__file__).with_name(f"{name}.py")) for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *paths]
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
