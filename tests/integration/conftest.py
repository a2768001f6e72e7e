"""The process that ranks are forked from imports while other tests run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.launch import server


def pytest_collection_finish(session: pytest.Session) -> None:
    here = [i for i in session.items if Path(__file__).parent in i.path.parents]
    forking = [item for item in here if not item.get_closest_marker("gpu")]
    if forking and not session.config.option.collectonly:
        server()
