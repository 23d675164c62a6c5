"""Copies from the host's memory."""

import time

import pytest
import torch

from moba_cp.host import to_device


@pytest.mark.parametrize("shape", [(0,), (3, 2)], ids=str)
def test_values_arrive(shape):
    x = torch.randn(shape, dtype=torch.float64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = to_device(x, device)
    assert there.device.type == device.type and torch.equal(there.cpu(), x)


@pytest.mark.gpu
def test_nobody_waits_for_the_stream():
    device = torch.device("cuda")
    x = torch.arange(2**21)
    to_device(x, device)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    busy.record()
    began = time.monotonic()
    there = to_device(x, device)
    assert not busy.query() and time.monotonic() - began < 0.5
    assert torch.equal(there.cpu(), x) and busy.query()
