"""Signs of hacking: seen where they are, not where they are not, never without an interval."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from gardo.evaluation.compare import Indicator, compare, indicators
from gardo.evaluation.drawing import vendi
from gardo.evaluation.statistics import Interval
from gardo.evaluation.values import (
    PROXY,
    Values,
    interval,
    number,
    plain,
    summary,
    values_in,
    values_of,
)
from gardo.rewards.tiny_count import TinyCountSettings
from tests.engine.evaluation.measured import IMAGES, PROMPTS, around, noise, values

BEFORE = noise(1, PROMPTS)  # how the proxy ranks the prompts
JUDGED = BEFORE + 0.3 * noise(2, PROMPTS)  # how a held-out judge does, much alike


def one(here: Values, baseline: Values, sign: str, of: str) -> Indicator:
    (found,) = [i for i in indicators(here, baseline) if (i.sign, i.of) == (sign, of)]
    return found


def baseline() -> Values:
    return values(around(BEFORE), judge=around(JUDGED, seed=1))


def test_nothing_is_seen_in_a_model_that_stayed_as_it_was() -> None:
    found = indicators(baseline(), baseline())
    assert {i.state for i in found} <= {"not seen", "unknown"}
    # the changes are all zero: they have no ranks
    assert one(baseline(), baseline(), "traded", "judge").state == "unknown"


def test_a_proxy_that_rises_while_the_judge_falls_is_seen() -> None:
    hacked = values(around(BEFORE + 0.5, seed=20), judge=around(JUDGED - 0.3, seed=21))
    found = one(hacked, baseline(), "fell", "judge")
    assert found.state == "seen"
    assert re.search(r"by \+0\.\d+ \[\+0\.\d+, \+0\.\d+\]", found.sentence)
    assert re.search(r"judge by -0\.\d+ \[-0\.\d+, -0\.\d+\]", found.sentence)
    for fair in (
        values(around(BEFORE + 0.5), judge=around(JUDGED, seed=1)),
        values(around(BEFORE), judge=around(JUDGED - 0.3, seed=1)),
        values(around(BEFORE + 0.5), judge=around(JUDGED - 0.3 * noise(7, PROMPTS), seed=1)),
    ):
        assert one(fair, baseline(), "fell", "judge").state == "not seen"


def test_judges_that_come_to_rank_otherwise_are_seen() -> None:
    apart = values(around(noise(5, PROMPTS)), judge=around(JUDGED, seed=1))
    assert one(apart, baseline(), "apart", "judge").state == "seen"
    alike = values(around(BEFORE + 0.5), judge=around(JUDGED, seed=1))
    assert one(alike, baseline(), "apart", "judge").state == "not seen"


def test_what_one_gains_where_the_other_loses_is_seen() -> None:
    gain = noise(6, PROMPTS).abs()
    traded = values(around(BEFORE + gain), judge=around(JUDGED - gain, seed=1))
    found = one(traded, baseline(), "traded", "judge")
    assert found.state == "seen" and "-" in found.sentence
    less = values(around(BEFORE + gain), judge=around(JUDGED + 9 - gain, seed=1))
    found = one(less, baseline(), "traded", "judge")
    assert found.state == "seen" and "gained less by judge, or lost" in found.sentence
    shared = values(around(BEFORE + gain), judge=around(JUDGED + gain, seed=1))
    assert one(shared, baseline(), "traded", "judge").state == "not seen"


def test_images_that_come_to_look_alike_are_seen() -> None:
    narrow = values(around(BEFORE, spread=0.02), diversity=20.0, judge=around(JUDGED, seed=1))
    assert one(narrow, baseline(), "narrower", PROXY).state == "seen"
    assert one(narrow, baseline(), "narrower", "pairwise").state == "seen"
    wide = values(around(BEFORE, spread=0.5), diversity=40.0, judge=around(JUDGED, seed=1))
    assert one(wide, baseline(), "narrower", PROXY).state == "not seen"
    assert one(wide, baseline(), "narrower", "pairwise").state == "not seen"


def cut(one: Values, prompts: int) -> Values:
    return Values(
        rewards={n: v[:prompts] for n, v in one.rewards.items()},
        roles=one.roles,
        weights=one.weights,
        diversity={n: v[:prompts] for n, v in one.diversity.items()},
        labels={},
    )


def test_none_is_claimed_without_an_interval() -> None:
    """Of one prompt nothing is known, whatever it did."""
    hacked = values(around(BEFORE + 5, spread=0.01), diversity=1, judge=around(JUDGED - 5, seed=1))
    assert {i.state for i in indicators(hacked, baseline())} >= {"seen"}
    alone = indicators(cut(hacked, 1), cut(baseline(), 1))
    assert {i.state for i in alone} == {"unknown"}
    assert all("cannot be said" in i.sentence for i in alone)


def test_nothing_is_looked_for_without_a_proxy_or_with_another() -> None:
    ours = baseline()
    without = Values(ours.rewards, {**ours.roles, "proxy": "held_out"}, {}, {}, {})
    heavier = Values(ours.rewards, ours.roles, {"proxy": 2.0}, {}, {})
    for other in (without, heavier):
        found = compare(other, ours)
        assert found["indicators"] == [] and found["proxy"] is None
        assert found["rewards"]["judge"]["change"]["mean"] == 0


def test_the_proxy_is_the_weighted_sum() -> None:
    first, second = around(BEFORE), around(JUDGED, seed=1)
    both = Values(
        {"a": first, "b": second}, dict.fromkeys("ab", "proxy"), {"a": 1.0, "b": -2.0}, {}, {}
    )
    assert torch.allclose(both.mean(PROXY), (first - 2 * second).mean(1))


def test_a_summary_is_json_and_gives_the_values_back() -> None:
    images = around(BEFORE)
    images[2, 1], images[3] = math.nan, math.nan
    ours = values(images, judge=around(JUDGED, seed=1))
    found = json.loads(json.dumps(summary(ours), allow_nan=False))
    assert found["rewards"]["proxy"]["images_without_value"] == 1 + IMAGES
    assert found["rewards"]["proxy"]["by_prompt"][3] is None
    assert found["rewards"]["proxy"]["by_prompt"][2] == pytest.approx(
        float(images[2, [0, 2, 3]].mean())
    )
    again = values_in(found)
    assert torch.equal(again.images("proxy").nan_to_num(7), images.nan_to_num(7))
    assert compare(again, ours)["proxy"]["change"]["mean"] == 0
    assert again.roles == ours.roles and again.weights == ours.weights


def test_spread_is_among_the_images_of_a_prompt() -> None:
    images = around(10 * BEFORE)  # prompts differ far more
    images[0, 0] = math.nan
    images[1, 1:] = math.nan
    spread = values(images).spread("proxy")
    assert float(spread[0]) == pytest.approx(float(images[0, 1:].std()))
    assert math.isnan(spread[1])
    assert float(spread[2]) == pytest.approx(float(images[2].std()))


def test_vendi_counts_different_images() -> None:
    same = torch.ones(4, 8)
    apart = torch.eye(8)[:4]
    twice = torch.eye(8)[[0, 0, 3, 3]] * 5
    lost = apart.clone()
    lost[1, 2] = math.nan
    score = vendi(torch.cat([same, apart, twice, lost]), 4)
    assert score[:3].tolist() == pytest.approx([1, 4, 2])
    assert math.isnan(score[3])


def test_columns_become_values_prompt_by_prompt() -> None:
    columns = {
        "reward/count": torch.tensor([1.0, 2.0, 3.0, math.nan]),
        "label/layout": torch.tensor([1, 1, 2, 2]),
        "features": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [2.0, 0.0]]),
    }
    settings = TinyCountSettings(role="proxy", weight=0.5)
    found = values_of(columns, {"count": settings}, 2)
    assert plain(found.images("count")) == [[1.0, 2.0], [3.0, None]]
    assert found.weights == {"count": 0.5}
    assert found.labels["layout"] == pytest.approx(math.log(2))
    assert found.diversity["pairwise"].tolist() == pytest.approx([100, 0])
    assert found.diversity["vendi"].tolist() == pytest.approx([2, 1])
    assert number(math.nan) is None
    assert interval(Interval(math.nan, 1.0, 2.0)) == {"mean": None, "low": 1.0, "high": 2.0}
