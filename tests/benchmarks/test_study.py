"""The study of ./run study: its protocol, what a cell leaves, measures, tables and figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gardo.config import load as load_recipe
from gardo.session import open_session
from gardo.train import train as train_run
from study import raw
from study.__main__ import HERE, train
from study.drift import drift
from study.lead import raised, seen
from study.measures import (
    HELD_OUT,
    NEVER,
    PROXY,
    Curve,
    area,
    both,
    curve,
    images_to_level,
    stopped_early,
    wins,
)
from study.protocol import Cell, Protocol, Rules, load, merged
from study.report import RESULTS, collected, draw, sections
from tests import ROOT

REWARDS = (PROXY, HELD_OUT, "tiny_patches", "tiny_shape", "tiny_purity")
RULES = Rules()
SMALL = {
    "data": {"prompts_per_step": 2, "images_per_prompt": 3},
    "train": {"micro_batch": 9, "weights": {"rank": 2, "alpha": 4}},
    "evaluate": {"every": 1, "prompt_count": 3, "images_per_prompt": 1, "steps": 2},
    "checkpoint": {"every": 1},
}


def protocols() -> list[Path]:
    return sorted(HERE.glob("*.yaml"))


def small(*arms: str) -> Protocol:
    """The protocol with runs of two iterations on a handful of images, of some arms, one seed."""
    protocol = load(HERE / "protocol.yaml")
    return protocol.model_copy(
        update={
            "iterations": 2,
            "recipe": merged(protocol.recipe, SMALL),
            "seeds": {name: [1] for name in protocol.seeds},
            "arms": {name: protocol.arms[name] for name in arms},
        }
    )


# ---- the protocol ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", protocols(), ids=lambda path: path.stem)
def test_every_arm_is_a_recipe_that_runs(path, tmp_path):
    protocol = load(path)
    first = {cell.arm: cell for cell in reversed(protocol.cells())}
    assert set(first) == set(protocol.arms)
    for cell in first.values():
        recipe = load_recipe(cell.write_recipe(tmp_path))
        assert recipe.run_folder == tmp_path / cell.name
        assert recipe.run.seed == cell.seed
        assert recipe.algorithm.base.name == cell.recipe["algorithm"]["base"]["name"]


def test_all_arms_normalise_advantages_alike_and_sample_as_many_images():
    protocol = load(HERE / "protocol.yaml")
    advantages, images = [], set()
    for cell in protocol.cells():
        algorithm = cell.recipe["algorithm"]["base"]
        advantages.append(algorithm.get("base", algorithm)["advantage"])
        data = cell.recipe["data"]
        images.add(data["prompts_per_step"] * data["images_per_prompt"])
    assert all(advantage == advantages[0] for advantage in advantages)
    assert images == {protocol.images}


def test_seeds_of_the_exploration_are_not_used_again():
    used = {p.stem: {s for listed in load(p).seeds.values() for s in listed} for p in protocols()}
    study = used.pop("protocol")
    assert used and all(not study & explored for explored in used.values())


def test_headline_arms_have_eight_seeds_and_the_others_four():
    protocol = load(HERE / "protocol.yaml")
    count = {name: len(protocol.seeds[arm.seeds]) for name, arm in protocol.arms.items()}
    assert {count[name] for name in protocol.headline if name in count} == {8}
    assert set(count.values()) == {4, 8}
    assert 0 < len(protocol.cells(quick=True)) < 12


# ---- a cell ------------------------------------------------------------------------------------


def test_cells_train_once_and_again_where_their_recipe_has_changed(tmp_path, capsys):
    protocol, out = small("no_kl", "gardo"), tmp_path / "out"
    cells = protocol.cells()
    train(cells, tmp_path / "runs", out / "cells", jobs=2)
    assert "2 of 2 cells to train" in capsys.readouterr().out
    found = {cell.arm: raw.known(out / "cells", cell) for cell in cells}
    for one in found.values():
        assert [r["step"] for r in one.steps] == [1, 2] and one.evaluated == [0, 1, 2]
        assert one.about["seconds"] > 0 and one.about["machine"]
        assert one.evaluations[0]["drift"] == 0 and one.evaluations[-1]["drift"] > 0
        assert {"layout", "size", "hue", "features"} == set(one.evaluations[0]["diversity"])
        assert len(one.evaluations[0]["by_prompt"][HELD_OUT]) == 3
    both_signs = {f"{s}_gated_{r}" for s in ("paper", "official_code") for r in (PROXY, HELD_OUT)}
    assert both_signs <= set(found["no_kl"].steps[0]["metrics"])
    assert found["gardo"].steps[0]["metrics"]["gate_share"] > 0
    assert found["no_kl"].evaluations[0] == found["gardo"].evaluations[0]  # a seed has one start

    train(cells, tmp_path / "runs", out / "cells", jobs=2)
    assert "0 of 2 cells to train" in capsys.readouterr().out
    changed = Cell(protocol.model_copy(update={"iterations": 3}), "no_kl", 1)
    assert raw.known(out / "cells", changed) is None

    text = draw(protocol, cells, out)
    assert "no KL, stopped early" in text and "2 cells" in text
    written = {path.name for path in out.iterdir() if path.is_file()}
    assert written == {"tables.md", "measures.csv", "curves.png", "gate.png", "samples.png"}


def test_being_watched_changes_nothing(tmp_path):
    """Neither what is learnt nor when; the drift is of the LoRA alone and leaves it as it was."""
    cell = small("gardo").cells()[0]
    path = cell.write_recipe(tmp_path)
    weights = []
    for sets in ([], [f"algorithm={json.dumps(cell.recipe['algorithm']['base'])}"]):
        recipe = load_recipe(path, ["run.steps=1", *sets])
        with open_session(recipe, quiet=True) as session:
            train_run(session)
            trained = session.policy.trainable()
            weights.append({n: p.detach().clone() for n, p in trained.items()})
            moved = drift(session)
            assert moved > 0
            assert all(torch.equal(p, weights[-1][n]) for n, p in trained.items())
            assert all(p.requires_grad for p in trained.values())
            with torch.no_grad():
                for name, p in trained.items():
                    if "lora_B" in name:
                        p.mul_(0.1)
            assert drift(session) == pytest.approx(moved / 100, rel=0.1)  # a KL is of second order
    watched, alone = weights
    assert all(torch.equal(watched[n], alone[n]) for n in alone)


# ---- measures ----------------------------------------------------------------------------------


def made(proxy: list[float], held_out: list[float], auxiliary: list[float] | None = None) -> Curve:
    steps = [10 * k for k in range(len(proxy))]
    change = {PROXY: proxy, HELD_OUT: held_out, "tiny_patches": [0.0] * len(proxy)}
    change |= {n: auxiliary or [0.0] * len(proxy) for n in ("tiny_shape", "tiny_purity")}
    return Curve(
        steps, dict.fromkeys(change, 50.0), change,
        {n: [4.0] * len(proxy) for n in ("layout", "size", "hue", "features")},
        [float(s) for s in steps],
        10.0,
    )  # fmt: skip


def test_a_curve_is_the_change_of_the_prompts_that_are_asked_for():
    def evaluation(step, values):
        return {
            "kind": "evaluation", "step": step, "by_prompt": {PROXY: values},
            "diversity": {"layout": 1.0}, "drift": 0.5 * step,
        }  # fmt: skip

    of = raw.Raw({}, [], [evaluation(0, [0.5, 0.1]), evaluation(10, [0.7, 0.2])])
    assert curve(of).change[PROXY] == pytest.approx([0, 15])
    assert curve(of, [1]).change[PROXY] == pytest.approx([0, 10])
    assert curve(of, [1]).start[PROXY] == pytest.approx(10)
    assert curve(of).drift == [0, 5]


def test_area_is_the_mean_height():
    assert area([0, 10, 20], [0, 10, 10]) == pytest.approx(7.5)
    assert area([0, 5, 20], [3, 3, 3]) == pytest.approx(3)
    assert both(made([0, 5, 9], [0, 7, -2])) == [0, 5, -2]


def test_early_stopping_keeps_the_evaluation_before_an_auxiliary_falls():
    fall = RULES.auxiliary_fall
    of = made([0, 4, 8, 12], [0, 1, 2, -9], [0, 3, 3 - 1.01 * fall, 5])
    kept = stopped_early(of, RULES)
    assert kept.change[PROXY] == [0, 4, 4, 4] and kept.change[HELD_OUT] == [0, 1, 1, 1]
    assert kept.drift == [0, 10, 10, 10]
    assert stopped_early(made([0, 4], [0, -9]), RULES).change[HELD_OUT] == [0, -9]


def test_images_to_a_level_count_only_where_the_held_out_has_not_fallen():
    up, level = RULES.level + 0.1, RULES.tolerance
    assert images_to_level(made([0, up], [0, 0]), 96, RULES) == 960
    assert images_to_level(made([0, up, up], [0, -1.1 * level, 0]), 96, RULES) == 1920
    assert images_to_level(made([0, up], [0, -1.1 * level]), 96, RULES) == NEVER


def test_wins_are_counted_by_seed():
    arms = {
        "one": {1: made([0, 5], [0, 0]), 2: made([0, 1], [0, 0]), 3: made([0, 9], [0, 0])},
        "other": {1: made([0, 4], [0, 0]), 2: made([0, 1], [0, 0])},
    }
    assert wins(arms, "one", "other", "proxy") == (1.5, 2)


def test_a_signal_is_raised_when_it_leaves_its_calm():
    calm = ([0.1, 0.12] * RULES.calm)[: RULES.calm]
    assert raised(calm * 3, RULES) is None
    assert raised([*calm, *[0.5] * 10], RULES) == RULES.calm + 1
    assert raised([*calm, *[0.12] * 5, *[0.15] * 10], RULES) > RULES.calm + 5


def test_the_lead_is_from_the_signal_to_the_fall():
    """One is raised at once when the disagreement jumps, the other never; the judge falls later."""
    fall = RULES.hacked / 100
    steps = [
        {
            "metrics": {"disagreement": 0.1 + 0.01 * (k % 2) + (k >= 14), "paper_share": 0.1},
            "rewards": {HELD_OUT: 0.7 - (1.01 * fall if k >= 20 else 0)},
        }
        for k in range(30)
    ]
    found = seen(raw.Raw({}, steps, []), RULES)
    assert found.fell == 20 + RULES.window and found.raised["disagreement"] == 15
    assert found.lead("disagreement") == found.fell - 15
    assert found.raised["paper_share"] is None and found.lead("paper_share") is None
    never = seen(raw.Raw({}, steps[:20], []), RULES)
    assert never.fell is None and never.lead("disagreement") is None


# ---- what is committed -------------------------------------------------------------------------


@pytest.mark.parametrize("path", protocols(), ids=lambda path: path.stem)
def test_the_page_says_what_the_raw_metrics_say(path):
    """Every table between the page's marks is made of the committed cells."""
    protocol = load(path)
    raws = collected(protocol.cells(), RESULTS / protocol.results / "cells")
    assert set(raws) == set(protocol.arms)
    page = (ROOT / "docs" / protocol.page).read_text(encoding="utf-8")
    for mark, table in sections(protocol, raws).items():
        assert f"<!-- {mark}: begin -->\n{table}\n<!-- {mark}: end -->" in page, mark
