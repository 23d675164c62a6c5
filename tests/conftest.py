import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: threads only get in one another's way, and in that of other ranks."""
    torch.set_num_threads(1)
