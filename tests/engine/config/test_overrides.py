"""--set FIELD=VALUE: its types, and that an error names the --set that it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.config import load
from tests.engine.config.recipe import listed, refusal, values, written


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return written(tmp_path)


def test_overrides_have_yaml_types(good: Path) -> None:
    recipe = load(
        good,
        [
            "train.optimizer.lr=1e-4",
            "run.steps=3",
            "run.name=again",
            "sampler.same_initial_noise=true",
            "train.weights.targets=[attn.to_q, attn.to_k]",
            "algorithm.diversity=null",
            "algorithm.reference.reset_kl=5E-1",
            "train.optimizer.betas=[0.9, 0.95]",
            "rewards.tiny_count.weight=2",
        ],
    )
    assert recipe.train.optimizer.lr == 1e-4 and isinstance(recipe.train.optimizer.lr, float)
    assert recipe.run.steps == 3 and recipe.run.name == "again"
    assert recipe.sampler.same_initial_noise is True
    assert recipe.train.weights.targets == ["attn.to_q", "attn.to_k"]
    assert recipe.algorithm.diversity is None
    assert recipe.algorithm.reference.reset_kl == 0.5
    assert recipe.algorithm.reference.reset_updates == load(good).algorithm.reference.reset_updates
    assert recipe.train.optimizer.betas == (0.9, 0.95)
    assert recipe.rewards["tiny_count"].weight == 2


def test_the_last_override_wins(good: Path) -> None:
    assert load(good, ["run.steps=3", "run.steps=5"]).run.steps == 5


def test_overrides_leave_the_rest_alone(good: Path) -> None:
    expected = values(load(good))
    expected["run"]["steps"] = 3
    assert values(load(good, ["run.steps=3"])) == expected


def test_a_null_takes_a_section_out(tmp_path: Path) -> None:
    path = written(
        tmp_path, "rewards: {tiny_shape: {role: held_out}, tiny_purity: {role: held_out}}"
    )
    assert load(path, ["algorithm.gate=null"]).algorithm.gate is None


def test_a_null_takes_a_reward_out(good: Path, tmp_path: Path) -> None:
    without = load(good, ["rewards.tiny_fidelity=null"])
    assert set(values(without)["rewards"]) == set(values(load(good))["rewards"]) - {"tiny_fidelity"}
    text = good.read_text()
    good.write_text(text.replace("{role: held_out}", "null"))
    assert values(load(good)) == values(without)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.tiny_count=null", "rewards: none has role proxy; give the reward that is"),
        ("rewards.dinov3=null", "algorithm.diversity.features: 'dinov3' is no reward with role"),
        ("rewards={}", "rewards: missing; name at least one with role proxy"),
    ],
)
def test_what_needs_a_reward_says_so(override: str, message: str, good: Path) -> None:
    assert message in refusal(good, [override])


def test_both_auxiliaries_out_are_missed_by_the_gate(good: Path) -> None:
    out = ["rewards.tiny_shape=null", "rewards.tiny_purity=null"]
    assert "algorithm.gate: needs rewards with role auxiliary" in refusal(good, out)


def test_an_optional_field_is_taken_back(good: Path) -> None:
    there = load(good, ["evaluate.prompts=prompts.txt"])
    assert there.evaluate.prompts
    assert (
        load(good, ["evaluate.prompts=prompts.txt", "evaluate.prompts=null"]).evaluate.prompts
        is None
    )


ALGORITHM_NAMES = listed("algorithms")
ROWS = (  # an override; its message behind "--set "
    (
        "algorithm.gate.fractoin=0.2",
        "algorithm.gate.fractoin: unknown field. Did you mean algorithm.gate.fraction?",
    ),
    ("run.steps=many", "run.steps: 'many': input should be a valid integer"),
    ("run.steps=-1", "run.steps: -1: input should be greater than or equal to 1"),
    ("train.optimizer.lr=.nan", "train.optimizer.lr: nan: input should be a finite number"),
    ("model.size=[32, x]", "model.size: model.size.1: 'x': input should be a valid integer"),
    (
        "run={}",
        "run: run.name: missing, and it has no default\n"
        "--set run: run.steps: missing, and it has no default",
    ),
    (
        "run.steps",
        "run.steps: expected FIELD=VALUE, such as --set train.optimizer.lr=1e-4",
    ),
    ("=3", "=3: expected FIELD=VALUE, such as --set train.optimizer.lr=1e-4"),
    (
        "rewards.tiny_shap=null",
        "rewards.tiny_shap: there is no such reward to take out; there are tiny_count, "
        "tiny_shape, tiny_purity, dinov3, tiny_fidelity",
    ),
    ("run.steps.more=1", "run.steps.more: 'steps' is a value, not a section"),
    (
        "model.size=[32",
        'model.size: not valid YAML: while parsing a flow sequence in "<unicode string>", line 1, '
        "column 1: [32 ^ expected ',' or ']', but got '<stream end>' in \"<unicode string>\", "
        "line 1, column 4: [32 ^",
    ),
    (
        "algorithm.name=grado",
        f"algorithm.name: 'grado' is none of {ALGORITHM_NAMES}, nor a dotted path module:Name",
    ),
    (
        "sampler.train_steps=8",
        "sampler.train_steps: 8 of 8 steps; the last step of an SDE sampler is not trained: "
        "at most 7",
    ),
    (
        "data.prompts=nowhere.txt",
        "data.prompts: no such file: 'HERE/nowhere.txt'; give a text file with one prompt a line",
    ),
    (
        "model.path=builtin:none",
        "model.path: no such folder: 'builtin:none'; "
        "give a diffusers folder or a hub id owner/name",
    ),
)


@pytest.mark.parametrize(("override", "message"), ROWS, ids=[row[0] for row in ROWS])
def test_errors_name_the_override(
    override: str, message: str, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good.parent)
    assert refusal(good, [override]).replace(str(good.parent), "HERE") == f"--set {message}"


BASES = (  # a base, what does not fit it, and the message: it blames the latter
    (
        ("algorithm.base.name=grpo_guard", "sampler.sde=cps"),
        "--set sampler.sde: cps has no ratio that grpo_guard could normalise; use flow or dance",
    ),
    (
        ("algorithm.base.name=mix_grpo", "algorithm.base.window={kind: frozen, start: 4}"),
        "--set algorithm.base.window: algorithm.base.window.start: unknown field. "
        "Known here: at, kind.",
    ),
    (
        ("algorithm.base.name=mix_grpo", "algorithm.base.window={at: 4}"),
        "--set algorithm.base.window: kind is missing; one of progressive, random, decay, "
        "exp_decay, frozen",
    ),
    (
        ("algorithm.base.name=mix_grpo", "algorithm.base.window={kind: decay, most: 0}"),
        "--set algorithm.base.window: algorithm.base.window.most: 0: input should be greater than "
        "or equal to 1",
    ),
)


@pytest.mark.parametrize(("overrides", "message"), BASES, ids=[row[0][1] for row in BASES])
def test_errors_name_the_override_that_does_not_fit(
    overrides: tuple[str, ...], message: str, good: Path
) -> None:
    assert refusal(good, overrides).replace(str(good.parent), "HERE") == message
