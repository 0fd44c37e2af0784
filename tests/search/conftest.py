from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.search.in_process import workers_in_process


@pytest.fixture
def in_process() -> Iterator[None]:
    """Workers are threads of this process, which start at once. The results of one worker are the same."""
    with workers_in_process():
        yield
