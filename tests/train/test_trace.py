"""A traced step: files, and time by part from the kernels' names."""

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moba_cp.train import trace
from tests.helpers.train_runs import logged, train, write_text

CUDA = torch.autograd.DeviceType.CUDA


@pytest.mark.parametrize(
    "kernel, part",
    [
        ("dkdv_kernel", "attention"),
        ("dkdv_rows_kernel", "attention"),
        ("_dkdv_kernel", "attention"),
        ("_row_stats_kernel", "routing"),
        ("_score_kernel", "routing"),
        ("_index_masses_kernel", "index branch"),
        ("_index_score_kernel", "index branch"),
        ("_dq_kernel", "attention"),
        ("long_block_kernel", "attention"),
        ("_merge_visits_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("select_kernel", "routing"),
        ("_scatter_kernel", "routing"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "linear layers"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "exchange"),
        ("Memcpy PtoP (Device -> Device)", "exchange"),
        ("Memcpy HtoD (Pinned -> Device)", "host copies"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        # Named after what is fused, a tensor's "select" among it.
        ("triton_poi_fused_copy_copy__select_1", "element by element"),
        ("void at::native::vectorized_elementwise_kernel<4>", "element by element"),
    ],
)
def test_parts_of_kernels(kernel, part):
    assert trace.part_of(kernel) == part


def test_all_kernels_have_a_part():
    """Those of token-wise work and of convolved keys alone are element by element; a step decodes nothing."""
    root = Path(trace.__file__).parents[2] / "kernels"
    for file in sorted(set(root.rglob("*.py")) - {root / "decoding.py"}):
        names = re.findall(r"jit[^\n]*\n(?:@[^\n]*\n)*def (\w+_kernel)\(", file.read_text())
        tokenwise = file.name in ("tokenwise.py", "key_conv.py")
        for name in names:
            assert (trace.part_of(name) == "element by element") == tokenwise, (file.name, name)


def test_waiting_is_when_nothing_runs():
    def event(name, start, end, kind=CUDA):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))

    events = [
        event("nvjet_a", 0, 1_000_000),
        event("ncclDevKernel", 500_000, 1_500_000),
        event("dq_kernel", 2_000_000, 2_250_000),
        event("aten::mm", 0, 9_000_000, torch.autograd.DeviceType.CPU),
    ]
    assert trace.seconds_by_part(events) == {
        "linear layers": 1.0,
        "exchange": 1.0,
        "attention": 0.25,
        "waiting": 0.5,
    }


def test_a_step_is_traced_on_request(tmp_path):
    write_text(tmp_path / "text")
    options = [f"data.path={tmp_path / 'text'}", "run.steps=2", "run.trace_step=2"]
    train(1, ([*options, f"run.directory={tmp_path / 'run'}"], None))
    with gzip.open(tmp_path / "run" / trace.TRACE) as file:
        assert json.load(file)["traceEvents"]
    # Where the device's peak is not known there is no utilization.
    assert logged(tmp_path / "run", "mfu") == {}
