"""Every test runs on one thread, from the same seed."""

import pytest
import torch
from hypothesis import settings

# Property tests draw the same examples at every run and leave no database behind.
settings.register_profile("bilevel", deadline=None, derandomize=True, database=None)
settings.load_profile("bilevel")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
