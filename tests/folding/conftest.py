"""Repairs `import timm` before a test file of this room imports it; keeps tests to one thread."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.models.torchvision_repair import repair

repair()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Many tiny tensor operations: a second thread only waits for the first, longest on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
