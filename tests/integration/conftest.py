"""The process that ranks are forked from imports while other tests run, if they do run here first.

One of several workers starts it when it is asked for a launch: only one of them is.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.launch import server


def pytest_collection_finish(session: pytest.Session) -> None:
    here = [i for i in session.items if Path(__file__).parent in i.path.parents]
    forking = [item for item in here if not item.get_closest_marker("gpu")]
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    if forking and alone and not session.config.option.collectonly:
        server()
