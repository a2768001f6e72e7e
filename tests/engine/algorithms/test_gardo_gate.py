"""GARDO's gate: uncertainty, the choice of samples, the fraction that adapts."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo.algorithms.gardo import Gate, GateSettings, most_uncertain
from gardo.algorithms.uncertainty import uncertainty
from tests.engine.algorithms.judged import (
    gardo,
    generator,
    random_scores,
    scores_of,
    uncertain,
)

# ---- uncertainty and the choice of samples ----------------------------------------------------


def test_uncertainty_by_hand():
    proxy = [0.9, 0.5, 0.5, 0.1]  # win rates 3/4, 1/4, 1/4, 0: a tie wins against nobody
    auxiliaries = {"a": [1, 1, 0, 0], "b": [0, 1, 2, 3]}  # 1/2, 1/2, 0, 0 and 0, 1/4, 1/2, 3/4
    result = uncertainty(scores_of(proxy, auxiliaries), "batch")
    assert result.tolist() == [0.5, -0.125, 0.0, -0.375]
    grouped = uncertainty(scores_of(proxy, auxiliaries, group=[8, 8, 2, 2]), "group")
    assert grouped.tolist() == [0.5, -0.25, 0.5, -0.25]


def test_failed_scores_are_in_nobodys_population():
    nan = float("nan")
    whole = scores_of([0.9, 0.5, 0.0, 0.1], {"a": [1, 2, nan, 3]}, valid=[True, True, False, True])
    kept = scores_of([0.9, 0.5, 0.1], {"a": [1, 2, 3]})
    result = uncertainty(whole, "batch")
    assert torch.equal(result[whole.valid_B], uncertainty(kept, "batch"))
    assert uncertainty(kept, "batch").tolist() == pytest.approx([2 / 3, 0, -2 / 3], abs=1e-6)
    gate_B, statistic = Gate(GateSettings(fraction=1.0, limits=(0.0, 1.0))).select(whole)
    assert gate_B.tolist() == [True, True, False, True]
    assert statistic == pytest.approx(2 / 9, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=25),
    st.sampled_from([0.0, 0.02, 0.1, 0.2, 0.37, 1.0]),
    st.randoms(use_true_random=False),
)
def test_choice_is_the_exact_count_of_the_most_uncertain(drawn, fraction, random):
    level, valid = zip(*drawn, strict=True)
    sample = random.sample(range(100), len(drawn))
    gate_B = most_uncertain(
        torch.tensor(level, dtype=torch.float64) / 4,
        torch.tensor(valid),
        torch.tensor(sample),
        fraction,
    )
    ranking = sorted((-u, s) for u, v, s in zip(level, valid, sample, strict=True) if v)
    count = int(fraction * len(ranking) + 0.5)
    expected = {s for _, s in ranking[:count]}
    assert {s for s, g in zip(sample, gate_B.tolist(), strict=True) if g} == expected


def test_many_exact_ties_go_by_sample_id():
    sample = torch.randperm(50, generator=generator(3))
    equal = scores_of(torch.ones(50), {"a": torch.ones(50)}, sample=sample)
    gate_B, statistic = Gate(GateSettings(fraction=0.1)).select(equal)
    assert sorted(sample[gate_B].tolist()) == [0, 1, 2, 3, 4]
    assert statistic == 0


def test_ties_that_only_rounding_could_break_stay_ties():
    # Win rates .1 and .2 of sample 1, .3 and 0 of sample 3: the same mean, but not in binary.
    auxiliaries = {"a": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "b": [3, 2, 1, 0, 4, 5, 6, 7, 8, 9]}
    result = uncertainty(scores_of(torch.ones(10), auxiliaries), "batch")
    assert result[1] == result[3] == pytest.approx(-0.15)


def official_uncertainty(scores):
    """The release: rank 1 is the best, U = rank(proxy) - mean rank(auxiliaries)."""

    def rank(values):
        return 1 + values.argsort(descending=True).argsort().double()

    others = torch.stack([rank(scores.rewards[n]) for n in scores.auxiliaries]).mean(0)
    return rank(scores.proxy_B) - others


def test_the_release_gates_the_other_end():
    scores = random_scores()
    ours, theirs = uncertainty(scores, "batch"), official_uncertainty(scores)
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] == pytest.approx(-1, abs=1e-5)
    paper, _ = Gate(GateSettings(fraction=0.1)).select(scores)
    official, _ = Gate(GateSettings(fraction=0.1, sign="official_code")).select(scores)
    assert paper.sum() == official.sum() == 6
    assert not (paper & official).any()
    assert ours[paper].min() >= ours[~paper].max()
    assert theirs[official].min() >= theirs[~official].max()


@pytest.mark.parametrize("population", ["batch", "group"])
def test_the_order_of_the_gathered_batch_does_not_matter(population):
    scores = random_scores(seed=4)
    tied = (scores.rewards["fidelity"] * 4).round()  # many ties
    scores = scores_of((scores.proxy_B * 4).round(), {"a": tied}, group=scores.group_B)
    order = torch.randperm(60, generator=generator(5))
    shuffled = scores_of(
        scores.proxy_B[order], {"a": tied[order]}, group=scores.group_B[order], sample=order
    )
    chosen = []
    for one in (scores, shuffled):
        credit = gardo(gate=GateSettings(fraction=0.15, population=population)).credit(one)
        chosen.append(set(one.sample_B[credit.gate_B].tolist()))
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 9


# ---- the fraction follows the statistic -------------------------------------------------------


def fractions(gate, levels):
    seen = []
    for k in levels:
        gate_B, statistic = gate.select(uncertain(k))
        assert statistic == pytest.approx(k * (100 - k) / 1e4, abs=1e-6)
        assert int(gate_B.sum()) == int(gate.fraction * 100 + 0.5), "the new fraction gates"
        seen.append(gate.fraction)
    return seen


def test_fraction_follows_the_window():
    gate = Gate(GateSettings(fraction=0.1, warmup=3, window=2))
    assert fractions(gate, [5, 2, 8]) == [0.1] * 3  # warm-up
    up = 0.1 * 1.1
    assert fractions(gate, [9]) == [pytest.approx(up)]  # above 2 and 8
    assert fractions(gate, [5]) == [pytest.approx(up * 0.9)]  # below 8 and 9
    assert fractions(gate, [7]) == [pytest.approx(up * 0.9)]  # between 9 and 5
    assert fractions(gate, [8]) == [pytest.approx(up * 0.9 * 1.1)]  # above 5 and 7; 9 has left
    assert fractions(gate, [8, 8]) == [pytest.approx(up * 0.9 * 1.1)] * 2  # equal is not above


def test_fraction_is_clamped():
    gate = Gate(GateSettings(fraction=0.1, warmup=1, window=3, limits=(0.07, 0.2)))
    climb = fractions(gate, range(1, 14))
    assert climb[1] == pytest.approx(0.11) and climb == sorted(climb)
    assert climb[-1] == climb[-3] == 0.2
    descent = fractions(gate, range(11, 0, -1)) + fractions(gate, [0])
    assert descent == sorted(descent, reverse=True)
    assert descent[-1] == 0.07 < descent[-3]


def test_limits_must_be_ordered():
    for limits in ((0.2, 0.1), (-0.1, 0.2), (0.5, 1.1)):
        with pytest.raises(ValueError, match="low <= high"):
            GateSettings(limits=limits)
    assert GateSettings(limits=[0.0, 1.0]).limits == (0.0, 1.0)


def test_gate_state_continues_identically():
    parts = GateSettings(warmup=2, window=3)
    gate = Gate(parts)
    fractions(gate, [3, 5, 7, 9])
    restored = Gate(parts)
    restored.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    levels = [11, 8, 9, 2, 1, 12]
    assert fractions(restored, levels) == fractions(gate, levels)
    assert fractions(Gate(parts), levels) != fractions(restored, levels), "state decides nothing"
