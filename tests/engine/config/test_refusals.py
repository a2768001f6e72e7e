"""What a bad recipe is told, a table for each section: file, field, value, mend, on one line.

A row is a fragment merged into the good recipe (a null takes a field out), and the message.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gardo.algorithms.ddpo import DDPO
from tests.engine.config.recipe import REQUIRED, listed, refusal, written

ALGORITHM_NAMES, REWARD_NAMES = listed("algorithms"), listed("rewards")
Refused = Callable[[str], str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """What the good recipe is told with a fragment in it, from where it lies."""
    monkeypatch.chdir(tmp_path)

    def say(fragment: str) -> str:
        written(tmp_path, fragment)
        return refusal(Path("recipe.yaml")).replace(str(tmp_path), "HERE")

    return say


# ---- a table a section -----------------------------------------------------------------------

SECTIONS = (
    ("evaluates: {every: 20}", "evaluates: unknown field. Did you mean evaluate?"),
    *((f"{name}: null", f"{name}: missing, and it has no default")
      for name in REQUIRED if name not in ("model", "algorithm", "rewards")),
    ("model: null", "model.family: missing; one of flux, sd3"),
    ("algorithm: null", f"algorithm.name: missing; one of {ALGORITHM_NAMES}"),
    ("rewards: null", "rewards: missing; name at least one with role proxy"),
    ("sampler: 5", "sampler: 5: input should be a valid dictionary or instance of SamplerSettings"),
)  # fmt: skip
MODEL = (
    ("model: {family: null}", "model.family: missing; one of flux, sd3"),
    (
        "model: {family: fluks}",
        "model.family: 'fluks' is none of flux, sd3, nor a dotted path module:Name",
    ),
    ("model: {guidence: 3.5}", "model.guidence: unknown field. Did you mean model.guidance?"),
    ("model: {size: 32}", "model.size: 32: input should be a valid tuple; write a list"),
    (
        "model: {size: [32, 32, 3]}",
        "model.size: (32, 32, 3): tuple should have at most 2 items after validation, not 3",
    ),
    ("model: {size: [32, -32]}", "model.size.1: -32: input should be greater than 0"),
    (
        "model: {path: ./no/such/model}",
        "model.path: no such folder: './no/such/model'; "
        "give a diffusers folder or a hub id owner/name",
    ),
    (
        "model: {path: 'builtin:nothing'}",
        "model.path: no such folder: 'builtin:nothing'; "
        "give a diffusers folder or a hub id owner/name",
    ),
    (
        "model: {path: .}",
        "model.path: '.' has no model_index.json: not a folder in diffusers format",
    ),
    (
        "model: {revision: main}",
        "model.revision: 'main': a folder, model.path: 'builtin:flux', has no revisions; leave it "
        "out",
    ),
    ("model: {base: fp8}", "model.base: 'fp8': input should be 'nf4', 'int8' or 'bf16'"),
    (
        "model: {base: bf16}",
        "model.base: bf16, but distributed.precision is float32; use bfloat16, or leave base out",
    ),
    (
        "{model: {base: nf4}, train: {weights: {kind: full, rank: null, alpha: null}}}",
        "model.base: nf4 is frozen, and train.weights.kind full trains it; use kind lora, or leave "
        "base out",
    ),
    (
        "model: {base: int8}",
        "model.base: int8 is whole on every rank, distributed.stage: 3 would take it apart; "
        "use stage: 2 or less",
    ),
    (
        "{model: {base: nf4}, distributed: {offload: parameters}}",
        "model.base: nf4 stays on the device, distributed.offload: parameters would move it; use "
        "offload: optimizer with stage: 2",
    ),
)
TRAIN = (
    ("train: {weights: {kind: null}}", "train.weights: kind is missing; one of lora, full"),
    (
        "train: {weights: {kind: lorra}}",
        "train.weights: input tag 'lorra' found using 'kind' does not match any of the expected "
        "tags: 'lora', 'full'",
    ),
    (
        "train: {weights: {kind: full, alpha: null}}",
        "train.weights.rank: unknown field. Known here: kind.",
    ),
    (
        "train: {weights: {rank: 0}}",
        "train.weights.rank: 0: input should be greater than or equal to 1",
    ),
    (
        "train: {optimizer: {name: sgd}}",
        "train.optimizer.name: 'sgd': input should be 'adamw', 'adamw_8bit', 'adamw_paged', "
        "'adamw_8bit_paged', 'deepspeed_fused' or 'deepspeed_cpu'",
    ),
    (
        "{train: {optimizer: {name: deepspeed_fused}}, distributed: {engine: local}}",
        "train.optimizer.name: deepspeed_fused is DeepSpeed's, engine local has none; use adamw",
    ),
    (
        "train: {optimizer: {name: deepspeed_cpu}}",
        "train.optimizer.name: deepspeed_cpu updates weights in host memory; use "
        "distributed.offload: optimizer, or adamw",
    ),
    *(
        (
            f"{{train: {{optimizer: {{name: {name}}}}}, distributed: {{offload: optimizer}}}}",
            f"train.optimizer.name: {name} updates weights on a GPU, distributed.offload: optimizer"
            " keeps them in host memory; use adamw or deepspeed_cpu, or offload: none",
        )
        for name in ("deepspeed_fused", "adamw_paged", "adamw_8bit_paged")
    ),
    *(
        (
            f"{{train: {{optimizer: {{name: {name}}}}}, distributed: {{offload: optimizer, "
            "precision: bfloat16, masters: bfloat16}}",
            f"train.optimizer.name: {name} does not update bf16 masters in host memory; use "
            "deepspeed_cpu, or distributed.masters: float32",
        )
        for name in ("adamw", "adamw_8bit")
    ),
    (
        "train: {optimizer: {lr: .nan}}",
        "train.optimizer.lr: nan: input should be a finite number",
    ),
)
DATA = (
    (
        "data: {images_per_prompt: 1}",
        "data.images_per_prompt: 1 image has no group to compare with, every advantage is 0; "
        "use at least 2",
    ),
    (
        "data: {prompts: nowhere.txt}",
        "data.prompts: no such file: 'HERE/nowhere.txt'; give a text file with one prompt a line",
    ),
)
SAMPLER = (
    (
        "sampler: {noise_levle: 0.7}",
        "sampler.noise_levle: unknown field. Did you mean sampler.noise_level?",
    ),
    ("sampler: {noise_level: .inf}", "sampler.noise_level: inf: input should be a finite number"),
    ("sampler: {noise_level: 0}", "sampler.noise_level: input should be greater than 0"),
    (
        "sampler: {sde: cps, noise_level: 1.5}",
        "sampler.noise_level: 1.5; sde cps takes a level up to 1",
    ),
    ("sampler: {sde: fast}", "sampler.sde: 'fast': input should be 'flow', 'dance' or 'cps'"),
    # an ODE has no log-probabilities
    ("sampler: {sde: ode}", "sampler.sde: 'ode': input should be 'flow', 'dance' or 'cps'"),
    (
        "sampler: {shift: 3}",
        "sampler.shift: 3.0 has no effect on schedule model; give schedule: shifted_linear, "
        "or leave shift out",
    ),
    *(
        (
            f"sampler: {{train_steps: {steps}}}",
            f"sampler.train_steps: {steps} of 8 steps; the last step of an SDE sampler is not "
            "trained: at most 7",
        )
        for steps in (8, 9)
    ),
)
ALGORITHM = (
    (
        "algorithm: {name: grado}",
        f"algorithm.name: 'grado' is none of {ALGORITHM_NAMES}, nor a dotted path module:Name",
    ),
    (
        "algorithm: {name: 'no_such_module:Name'}",
        "algorithm.name: 'no_such_module:Name' cannot be imported "
        "(No module named 'no_such_module')",
    ),
    (
        "algorithm: {name: 'os:getcwd'}",
        "algorithm.name: 'os:getcwd' is no plug-in: it has no Settings",
    ),
    ("algorithm: {base: null}", f"algorithm.base.name: missing; one of {ALGORITHM_NAMES}"),
    (
        "algorithm: {base: {name: grpo}}",
        f"algorithm.base.name: 'grpo' is none of {ALGORITHM_NAMES}, nor a dotted path module:Name",
    ),
    (
        "algorithm: {base: {clip_rage: 1e-3}}",
        "algorithm.base.clip_rage: unknown field. Did you mean algorithm.base.clip_range?",
    ),
    (
        "algorithm: {base: {beta: 0.0}}",
        "algorithm.base.beta: flow_grpo has no KL to gate or to reset; give it a beta above 0, "
        "or leave algorithm.gate and algorithm.reference out",
    ),
    (
        "algorithm: {gate: {fractoin: 0.1}}",
        "algorithm.gate.fractoin: unknown field. Did you mean algorithm.gate.fraction?",
    ),
    (
        "algorithm: {gate: {limits: [.nan, 0.2]}}",
        "algorithm.gate.limits.0: nan: input should be a finite number",
    ),
    (
        "algorithm: {gate: {limits: [0.2, 0.02]}}",
        "algorithm.gate.limits: [0.2, 0.02] must satisfy 0 <= low <= high <= 1",
    ),
    (
        "algorithm: {diversity: {features: dino}}",
        "algorithm.diversity.features: 'dino' is no reward with role features; "
        "add `dino: {role: features}` to rewards",
    ),
)
BASES = (
    (
        "{algorithm: {base: {name: grpo_guard}}, sampler: {sde: cps}}",
        "sampler.sde: cps has no ratio that grpo_guard could normalise; use flow or dance",
    ),
    (
        "algorithm: {base: {name: flow_grpo_fast}}",
        "sampler.train_steps: a window of 6 does not fit into the first half of 8 steps; "
        "at most 4, or more sampler.steps",
    ),
    (
        "algorithm: {base: {name: mix_grpo, window: {kind: frozen, at: 4}}}",
        "sampler.train_steps: a frozen window of 6 has no place before the last of 8 steps; "
        "at most 3",
    ),
    (
        "algorithm: {base: {name: mix_grpo, window: {kind: frozen, start: 4}}}",
        "algorithm.base.window.start: unknown field. Known here: at, kind.",
    ),
    (
        "algorithm: {base: {name: mix_grpo, window: {at: 4}}}",
        "algorithm.base.window: kind is missing; one of progressive, random, decay, exp_decay, "
        "frozen",
    ),
    (
        "algorithm: {base: {name: mix_grpo, window: {kind: decay, most: 0}}}",
        "algorithm.base.window.most: 0: input should be greater than or equal to 1",
    ),
    (
        "algorithm: {base: {name: ddpo}}",
        "algorithm.base.clip_range: unknown field. Known here: "
        f"{', '.join(sorted(DDPO.Settings.model_fields))}.",
    ),
    (
        "{algorithm: {base: {name: dance_grpo}}, sampler: {train_steps: 8}}",
        "sampler.train_steps: 8 of 8 steps; the last step of an SDE sampler is not trained: "
        "at most 7",
    ),
)
REWARDS = (
    (
        "rewards: {tiny_cuont: {role: proxy}}",
        f"rewards.tiny_cuont.kind: 'tiny_cuont' is none of {REWARD_NAMES}, "
        "nor a dotted path module:Name",
    ),
    (
        "rewards: {_count: {role: proxy}}",
        "rewards._count: a name is a letter, then letters, digits, - or _",
    ),
    (
        "rewards: {tiny_count: {wieght: 3}}",
        "rewards.tiny_count.wieght: unknown field. Did you mean rewards.tiny_count.weight?",
    ),
    (
        "rewards: {dinov3: {path: ./no/dinov3}}",
        "rewards.dinov3.path: no folder with config.json: './no/dinov3'; give one, "
        "or a hub id owner/name",
    ),
    (
        "rewards: {tiny_count: {role: held_out}}",
        "rewards: none has role proxy; give the reward that is optimised `role: proxy`",
    ),
    (
        "rewards: {dinov3: null}",
        "algorithm.diversity.features: 'dinov3' is no reward with role features; "
        "add `dinov3: {role: features}` to rewards",
    ),
    (
        "rewards: {two: {kind: dinov3, role: features, path: 'builtin:dinov3', size: 32}}",
        "rewards: dinov3, two all have role features; keep one",
    ),
    (
        "rewards: {tiny_shape: {role: held_out}, tiny_purity: {role: held_out}}",
        "algorithm.gate: needs rewards with role auxiliary to compare the proxy with; add one, "
        "or leave the gate out",
    ),
    (
        "{rewards: {dinov3: null}, algorithm: {diversity: null}, evaluate: {diversity: features}}",
        "evaluate.diversity: features needs a reward with role features",
    ),
)
EVALUATE = (
    (
        "evaluate: {prompts: nowhere.txt}",
        "evaluate.prompts: no such file: 'HERE/nowhere.txt'; "
        "give a text file with one prompt a line",
    ),
)
DISTRIBUTED = (
    ("distributed: {stage: 4}", "distributed.stage: 4: input should be 0, 1, 2 or 3"),
    (
        "distributed: {stage: 0, precision: bfloat16}",
        "distributed.precision: bfloat16 at stage 0 would sum gradients in bfloat16; "
        "use stage 1, 2 or 3",
    ),
    (
        "distributed: {engine: local, stage: null, precision: bfloat16}",
        "distributed.precision: bfloat16 needs fp32 masters, which engine local has not; "
        "use engine zero",
    ),
    (
        "distributed: {masters: bfloat16}",
        "distributed.masters: bfloat16 needs precision: bfloat16",
    ),
    (
        "distributed: {stage: 0, offload: optimizer}",
        "distributed.offload: stage 0 partitions nothing; use stage 1, 2 or 3",
    ),
    (
        "distributed: {stage: 2, offload: parameters}",
        "distributed.offload: parameters: only stage 3 partitions the weights; use stage: 3",
    ),
    (
        "distributed: {persistence_threshold: 1000}",
        "distributed.persistence_threshold: 1000 keeps copies of weights that do not see the "
        "exchange with slot 'reference'; use 0",
    ),
    (
        "distributed: {hpz: 2}",
        "distributed.hpz: 2 keeps copies of weights that do not see the exchange with slot "
        "'reference'; use 1",
    ),
)
ATTENTION = (
    (
        "model: {attention: sage}",
        "model.attention: 'sage': has no backward pass, so it cannot train; use one of native, "
        "_native_cudnn, _native_flash, _native_efficient, _native_math, flex, flash, flash_4",
    ),
    (
        "model: {attention: flash_5}",
        "model.attention: 'flash_5': no such attention; use one of native, _native_cudnn, "
        "_native_flash, _native_efficient, _native_math, flex, flash, flash_4",
    ),
    (
        "model: {attention: flash_4}",
        "model.attention: flash_4 takes no float32; use distributed.precision: bfloat16, or one of "
        "native, _native_efficient, _native_math, flex",
    ),
    (
        "{model: {attention: flash}, distributed: {precision: bfloat16}, "
        "run: {deterministic: true}}",
        "model.attention: flash has no deterministic backward pass, and run.deterministic is true; "
        "use one of native, _native_flash, _native_efficient, _native_math, flash_4",
    ),
)
RUN = (
    (
        "run: {colour: 42}",
        "run.colour: unknown field. Known here: bf16_reduced_precision_reduction, deterministic, "
        "folder, keep_samples, name, seed, steps, track, watchdog.",
    ),
    ("run: {steps: eighty}", "run.steps: 'eighty': input should be a valid integer"),
    ("run: {steps: 80.5}", "run.steps: 80.5: input should be a valid integer"),
    ("run: {steps: {a: 1}}", "run.steps: input should be a valid integer"),
    ("run: {seed: true}", "run.seed: True: input should be a valid integer"),
    ("run: {seed: 'yes'}", "run.seed: 'yes': input should be a valid integer"),
    ("run: {name: 5}", "run.name: 5: input should be a valid string"),
    (
        "run: {name: ../elsewhere}",
        "run.name: '../elsewhere': string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'",
    ),
)
TABLES = (
    *(*SECTIONS, *MODEL, *TRAIN, *DATA, *SAMPLER, *ALGORITHM, *BASES),
    *(*REWARDS, *EVALUATE, *DISTRIBUTED, *ATTENTION, *RUN),
)


@pytest.mark.parametrize(("fragment", "message"), TABLES, ids=[row[0] for row in TABLES])
def test_refused(fragment: str, message: str, refused: Refused) -> None:
    assert refused(fragment) == f"recipe.yaml: {message}"


def test_all_bad_fields_are_told_at_once(refused: Refused) -> None:
    assert refused("{run: {steps: -1}, train: {weights: {rank: many}}}").split("\n") == [
        "recipe.yaml: train.weights.rank: 'many': input should be a valid integer",
        "recipe.yaml: run.steps: -1: input should be greater than or equal to 1",
    ]
