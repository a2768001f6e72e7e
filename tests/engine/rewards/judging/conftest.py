"""What the tests of judges share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.rewards.judging.endpoint import Endpoint, serving


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as server:
        yield server
