"""`--set algorithm.name=NAME` alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.config import dump, load
from gardo.recipe_errors import RecipeError
from tests.engine.config.recipe import refusal, written


def plain(folder: Path, more: str = "") -> Path:
    """The good recipe with Flow-GRPO alone."""
    path = written(folder)
    lines = path.read_text().splitlines()
    start = lines.index("algorithm:")
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(" "))
    lines[start:end] = [f"algorithm: {{name: flow_grpo{more}}}"]
    path.write_text("\n".join(lines))
    return path


def test_what_only_says_the_other_algorithms_defaults_is_dropped(tmp_path: Path) -> None:
    path = plain(tmp_path, ", clip_range: 1.0e-4, old_velocity: auto, beta: 0.02")
    found = load(path, ["algorithm.name=diffusion_nft"]).algorithm
    assert (found.name, found.beta) == ("diffusion_nft", 0.02)


def test_a_recipe_that_says_everything_switches(tmp_path: Path) -> None:
    """As a run's own recipe.yaml does."""
    whole = tmp_path / "whole.yaml"
    whole.write_text(dump(load(plain(tmp_path))))
    assert load(whole, ["algorithm.name=ddpo"]).algorithm.name == "ddpo"


def test_what_was_chosen_is_named_with_the_mend(tmp_path: Path) -> None:
    path = plain(tmp_path, ", clip_range: 1.0e-3")
    assert refusal(path, ["algorithm.name=diffusion_nft"]) == (
        "--set algorithm.name=diffusion_nft: clip_range is a field of flow_grpo in the recipe, "
        "which diffusion_nft does not have; set the whole section: "
        "--set 'algorithm={name: diffusion_nft}'"
    )
    asked = ["algorithm={name: diffusion_nft}", "algorithm.beta=0.1"]
    assert load(path, asked).algorithm.beta == 0.1


def test_a_base_inside_switches(tmp_path: Path) -> None:
    path = written(tmp_path)  # GARDO around Flow-GRPO with a clip_range of its own
    assert "--set 'algorithm.base={name: diffusion_nft}'" in refusal(
        path, ["algorithm.base.name=diffusion_nft"]
    )
    path.write_text(path.read_text().replace("    clip_range: 1e-3\n", ""))
    found = load(path, ["algorithm.base.name=diffusion_nft"]).algorithm
    assert (found.name, found.base.name, found.base.beta) == ("gardo", "diffusion_nft", 3.0)


def test_around_another_and_alone_are_two_sections(tmp_path: Path) -> None:
    path = written(tmp_path)
    said = refusal(path, ["algorithm.name=flow_grpo"])
    assert said.startswith("--set algorithm.name=flow_grpo: base, gate, diversity, reference are")
    assert "--set 'algorithm={name: gardo, base: {name: flow_grpo}}'" in refusal(
        plain(tmp_path, ", clip_range: 1.0e-3"), ["algorithm.name=gardo"]
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.name=nft"], "--set algorithm.name: 'nft' is none of"),
        (["algorithm.name=diffusion_nft", "algorithm.clip_range=0.1"],
         "--set algorithm.clip_range: unknown field"),
    ],
)  # fmt: skip
def test_what_is_wrong_otherwise_is_said_as_ever(
    overrides: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        load(plain(tmp_path), overrides)
