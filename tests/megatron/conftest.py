"""Building a model starts torch.distributed for one process; no test file inherits it."""

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True, scope="module")
def _stop_distributed():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
