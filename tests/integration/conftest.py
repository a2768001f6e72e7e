"""The process that ranks are forked from imports while other tests run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.launch import server


def pytest_collection_finish(session: pytest.Session) -> None:
    here = Path(__file__).parent
    if not session.config.option.collectonly and any(here in i.path.parents for i in session.items):
        server()
