"""Every test runs on one thread, from the same seed."""

import pytest
import torch
from hypothesis import settings

from bilevel.registry import INNER_SOLVERS, LINEAR_SOLVERS, METHODS, PRECONDITIONERS, PROBLEMS

# Property tests draw the same examples at every run and leave no database behind.
settings.register_profile("bilevel", deadline=None, derandomize=True, database=None)
settings.load_profile("bilevel")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def as_it_was(monkeypatch):
    """A page may set, or register, what holds for the whole process."""
    for registry in (INNER_SOLVERS, LINEAR_SOLVERS, METHODS, PRECONDITIONERS, PROBLEMS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
