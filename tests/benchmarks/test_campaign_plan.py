"""Measured memory beside planned, on tables that the test writes, of the tiny Flux."""

from __future__ import annotations

import csv

import pytest

from campaign import flux_bases, flux_full, flux_plan, table
from campaign.flux_model import FULL
from gardo.config import load
from tests import ROOT

RECIPE, TINY = flux_plan.RECIPE, ROOT / "recipes" / "tiny_flux_gardo.yaml"
GIB = 2**30
PLAIN = {"text_tokens": "8", "lora": "True", "checkpointing": "none", "status": "done"}


def case(work, micro_batch=0, gib="", **more):
    measured = {"peak_gib": gib, "held_gib": gib, "gpu_gib": "2" if gib else ""}
    return {**PLAIN, "work": work, "micro_batch": str(micro_batch), **measured, **more}


def write(folder, name, columns, rows):
    folder.mkdir(exist_ok=True)
    names = (*columns, "status", "note", *table.FACTS)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def run(folder):
    assert flux_plan.main([str(folder)]) == 0
    with (folder / "flux_plan.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", autouse=True)
def tiny():
    flux_plan.counted.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_plan, "RECIPE", TINY)
        yield
    flux_plan.counted.cache_clear()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A campaign's folder with both tables, its rows compared, and the plan's model."""
    folder = tmp_path_factory.mktemp("campaign")
    eager = {"path": "eager", "attention": "native"}
    write(folder / "flux", "flux_full", flux_full.COLUMNS, [
        case("weights", 0, "0.5", lora="False", **eager),
        case("train", 3, "0.5", checkpointing="full", **eager),
        case("train", 12, "1.5", checkpointing="full", **eager),
        case("train", 24, checkpointing="full", **eager, status="out of memory"),
        case("train", 48, checkpointing="full", **eager, status="out of memory"),
        case("train", 96, "0.1", checkpointing="full", **eager, device="another"),
        case("profile", 3, **eager, ms="2"),
    ])  # fmt: skip
    step = {"lora": "False", "checkpointing": "full", "base": "bf16"}
    write(folder / "flux-bases", "flux_bases", flux_bases.COLUMNS, [
        case("sample", 12, "0.5", base="nf4"),
        case("ratio", 3, base="nf4", step="all"),
        case("step", 1, "0.3", **step, optimizer="adamw_8bit", part="forward"),
        case("step", 1, "0.5", **step, optimizer="adamw_8bit", part="all"),
        case("step", 1, "0.5", **step, optimizer="adamw_8bit_paged", part="all"),
    ])  # fmt: skip
    return run(folder), flux_plan.counted(8, True), flux_plan.counted(8, False)


def of(rows, **fields):
    return [r for r in rows if fields.items() <= r.items()]


def test_each_row_of_memory_is_beside_its_plan(compared):
    rows, lora, _ = compared
    assert list(rows[0]) == list(flux_plan.COLUMNS)
    assert [r["work"] for r in rows] == ["weights", *["train"] * 5, "sample", "step", "step"]
    weights, few, many, *_ = rows
    shadow = lora.shadow
    only = 2 * (shadow.parameters - shadow.trainable) / GIB
    assert float(weights["plan_gib"]) == pytest.approx(only, rel=1e-3)
    added = (float(many["plan_gib"]) - float(few["plan_gib"])) * GIB
    expected = lora.cost("training", 12, "full") - lora.cost("training", 3, "full")
    assert added == pytest.approx(expected, rel=1e-2) and added > 0
    for row in rows:
        if row["measured_gib"]:
            ratio = float(row["measured_gib"]) / float(row["plan_gib"])
            assert float(row["ratio"]) == pytest.approx(ratio, rel=1e-3)
        else:
            assert row["ratio"] == "" and row["status"] == "out of memory"


def test_a_step_holds_gradients_and_moments_of_all_weights(compared):
    rows, _, everything = compared
    usual, paged = of(rows, work="step")
    weights = 2 * everything.shadow.parameters / GIB
    assert float(usual["plan_weights_gib"]) == pytest.approx(weights, rel=1e-3)
    assert float(usual["plan_gradients_gib"]) == pytest.approx(weights, rel=1e-3)
    assert float(usual["plan_moments_gib"]) == pytest.approx(weights, rel=0.02)  # and their scales
    assert float(paged["plan_moments_gib"]) == 0, "pages are not the GPU's"


def test_a_base_in_few_bits_is_planned_as_such(compared):
    rows, lora, _ = compared
    (row,) = of(rows, base="nf4")
    weights = lora.shadow.weight_bytes("nf4", 2)
    assert float(row["plan_weights_gib"]) == pytest.approx(weights / GIB, rel=1e-3)
    assert weights < 2 * lora.shadow.parameters


def test_the_largest_micro_batch_measured_and_planned(compared):
    """Of the same case on the same GPU; the plan's is the last that its memory holds."""
    rows, *_ = compared
    here = of(rows, work="train", device="")
    assert {(r["fitted"], r["failed_at"]) for r in here} == {("12", "24")}
    assert of(rows, device="another")[0]["fitted"] == "96"
    (largest,) = {int(r["plan_fits"]) for r in here}

    def total(micro_batch):
        found = flux_plan.needs(here[0], micro_batch)
        return 1e9 + sum(found.values()) + 0.05 * found["activations"]

    assert largest > 0 and total(largest) <= 2 * GIB < total(largest + 1)
    assert of(rows, work="weights")[0]["plan_fits"] == ""


def test_one_table_alone_and_none(tmp_path):
    with pytest.raises(SystemExit, match=r"no memory measured in flux_full.csv nor flux_bases.csv"):
        flux_plan.main([str(tmp_path)])
    rehearsed = case("sample", 1, base="bf16")  # on a CPU, where no memory is measured
    write(tmp_path, "flux_bases", flux_bases.COLUMNS, [rehearsed])
    with pytest.raises(SystemExit, match="give a campaign's --out"):
        flux_plan.main([str(tmp_path)])
    write(tmp_path, "flux_bases", flux_bases.COLUMNS, [case("weights", 0, "1", base="int8")])
    (row,) = run(tmp_path)
    assert row["table"] == "flux_bases" and row["path"] == "eager"


def test_the_recipe_is_the_campaigns_model():
    recipe = load(RECIPE, prompts=False)
    weights = recipe.train.weights
    assert (weights.kind, weights.rank, weights.alpha) == ("lora", FULL.rank, 2 * FULL.rank)
    assert recipe.model.text_tokens in FULL.text_tokens
    height, width = recipe.model.size
    assert height * width // 16**2 == 1024  # image tokens
    assert recipe.distributed.precision == "bfloat16"
