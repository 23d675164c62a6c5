import pytest
import torch

from tests.helpers.distributed import TIME_SCALE


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: threads only get in one another's way, and in that of other ranks."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Every test's timeout, times MOBA_CP_TEST_TIME_SCALE."""
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0]) if marker else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(seconds * TIME_SCALE), append=False)
