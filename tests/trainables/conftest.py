"""Every test of this folder runs on one thread with eager kernels, whatever ran before it."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from trainables import quantize

settings.register_profile("no deadline", deadline=None)  # the first example may compile or import
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def one_thread_and_eager_kernels() -> Iterator[None]:
    """Two threads cost more than they give at these sizes; a test that wants compiled kernels says so."""
    torch.set_num_threads(1)
    quantize.use_compiled(False)
    yield
    quantize.use_compiled(False)


@pytest.fixture(params=["eager", "compiled"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Runs a test once with each set of kernels."""
    quantize.use_compiled(request.param == "compiled")
    return request.param
