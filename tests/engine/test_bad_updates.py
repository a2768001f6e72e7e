"""When updates that could not be made end a run, and what of them is counted."""

from __future__ import annotations

import pytest
import torch

from gardo.bad_updates import BadUpdates, BadUpdateSettings, Made
from gardo.types import Metrics


def after(*bad: bool, **settings: float) -> BadUpdates:
    updates = BadUpdates(BadUpdateSettings(**settings))
    for one in bad:
        updates.note(bad=one)
    return updates


def test_so_many_in_a_row_end_the_run() -> None:
    assert after(True, True, False, True, True).reason_to_stop() is None
    assert after(False, True, True, True).reason_to_stop() == (
        "3 updates in a row could not be made"
    )
    assert after(True, in_a_row=1).reason_to_stop()


def test_a_share_of_a_whole_window_ends_the_run() -> None:
    some = [True, False, False, False]
    assert after(*some, window=8, share=0.25).reason_to_stop() is None  # half a window
    assert after(*some, *some, window=8, share=0.25).reason_to_stop() == (
        "2 of the last 8 updates could not be made"
    )
    assert after(*some, *some, False, window=8, share=0.25).reason_to_stop() is None


def test_the_count_goes_on_from_a_checkpoint() -> None:
    before = after(False, True, True)
    resumed = after()
    resumed.load_state_dict(before.state_dict())
    assert resumed.state_dict() == before.state_dict() == {
        "total": 2, "in_a_row": 2, "recent": [False, True, True],
    }  # fmt: skip
    resumed.note(bad=True)
    assert resumed.reason_to_stop()


def test_metrics_are_those_of_updates_that_were_made() -> None:
    made = Made()
    for loss, skipped in ((1.0, False), (float("nan"), True), (3.0, False)):
        value = torch.tensor([loss])
        made.add(value.sum(), Metrics().mean("loss", value))
        made.end_update(loss, skipped=skipped)
    assert made.totals["loss"] == 2.0
    assert made.norms == [1.0, 3.0] and made.skipped == 1 and len(made.losses) == 3


def test_a_limit_of_nothing_is_refused() -> None:
    for settings in ({"in_a_row": 0}, {"share": 0.0}, {"share": 1.5}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BadUpdateSettings(**settings)
