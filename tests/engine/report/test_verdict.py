"""What a run came to: only intervals that exclude zero count."""

import math

import pytest

from gardo.report.verdict import gaps, judge, spread_between_prompts
from tests.engine.report.records import evaluation_record


@pytest.mark.parametrize(
    ("proxy", "held_out", "tone", "words"),
    [
        (0.1, 0.0, "good", "count rose by 0.100 [0.090, 0.110], from 0.600 to 0.700."),
        (0.1, -0.2, "bad", "quality fell by 0.200 [0.190, 0.210], from 0.900 to 0.700."),
        (0.0, -0.2, "bad", "count did not clearly change: +0.000 [-0.010, +0.010]"),
        (0.1, -0.02, "", "quality fell by 0.020 [0.010, 0.030], from 0.900 to 0.880."),
        (0.005, 0.0, "", "count did not clearly change"),
    ],
)
def test_verdict(proxy: float, held_out: float, tone: str, words: str) -> None:
    middle = evaluation_record(30, proxy=9, held_out=-9)
    last = evaluation_record(60, proxy=proxy, held_out=held_out)
    verdict = judge([evaluation_record(0), middle, last])
    assert verdict.tone == tone and words in " ".join(verdict.sentences)
    assert "layout 3.00 to 2.40 (-20\u00a0%)" in verdict.sentences[-1]
    assert ("hacking" in verdict.conclusion) == (proxy == 0.1 and held_out == -0.2)


def test_verdict_concludes_nothing_without_intervals() -> None:
    last = evaluation_record(60, proxy=0.1)
    del last["change"]
    assert judge([evaluation_record(0), last]).tone == ""
    last["change"] = {"count": {"mean": 0.1, "low": math.nan, "high": math.nan}}
    assert "no interval" in judge([evaluation_record(0), last]).sentences[0]
    assert judge([]).sentences == judge([last]).sentences == ()


def test_verdict_says_what_held_out_judges_think_of_the_gated() -> None:
    """Of the last twenty steps those that had a gate; nothing of the proxy."""

    def step(gated: float | None) -> dict[str, object]:
        caught = {} if gated is None else {"gated": gated}
        held_out = {"mean": 0.75, "role": "held_out", **caught}
        return {"rewards": {"quality": held_out, "count": {"mean": 1, "role": "proxy", "gated": 1}}}

    steps = [step(0.0), *[step(0.5)] * 18, step(0.7), step(None)]
    last = evaluation_record(60, proxy=0.1)
    (said,) = judge([evaluation_record(0), last], steps).sentences[3:]
    assert said == (
        "By quality the gated samples had 0.511, all together 0.750 (last 19 steps with a gate)."
    )
    assert len(judge([evaluation_record(0), last], [step(None)]).sentences) == 3


def test_the_gap_is_in_standard_deviations_between_prompts() -> None:
    first = evaluation_record(0)
    # half an interval is 1.96 standard errors: 0.01 of 36 prompts
    assert spread_between_prompts(first, "count") == pytest.approx(0.01 / 1.96 * 6)
    exact = first | {"by_prompt": {"count": [0.5, 0.7], "quality": [0.9, math.nan]}}
    assert spread_between_prompts(exact, "count") == pytest.approx(0.1 * math.sqrt(2))
    assert math.isnan(spread_between_prompts({}, "count"))
    at = gaps([first, evaluation_record(20, proxy=0.1, held_out=-0.05)])
    assert [one.step for one in at] == [0, 20] and at[0].gap == 0
    assert at[1].proxy == pytest.approx(0.1 / (0.01 / 1.96 * 6))
    assert at[1].gap == pytest.approx(1.5 * at[1].proxy)
    alone = first | {"rewards": {"count": first["rewards"]["count"]}}
    assert gaps([alone]) == gaps([]) == []
