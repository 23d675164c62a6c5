import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import TIME_SCALE


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: threads only get in one another's way, and in that of other ranks."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _stop_distributed():
    """Building a model of Megatron's starts torch.distributed for one process; no test file inherits it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def pytest_collection_modifyitems(config, items):
    """Every test's timeout, times MOBA_CP_TEST_TIME_SCALE."""
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0]) if marker else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(seconds * TIME_SCALE), append=False)
