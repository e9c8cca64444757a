import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices: threads cost more than they give, and would share two cores with xdist."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
