"""Recipes with one thing wrong each: every one is refused at once, its field named first.

What the messages say in full is in test_refusals.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.config.recipe import refusal, written

# a field, and what is merged into the good recipe so that this field is wrong
ROWS = """
run.name                         run: {name: ''}
run.name                         run: {name: a/b}
run.name                         run: {name: .hidden}
run.name                         run: {name: ~}
run.name                         run: {name: 1e5}
run.folder                       run: {folder: ''}
run.folder                       run: {folder: prompts.txt}
run.folder                       run: {folder: prompts.txt/x}
run.folder                       run: {folder: loop}
run.folder                       run: {folder: ~nobodyhere/x}
run.seed                         run: {seed: -1}
run.seed                         run: {seed: 1:30}
run.seed                         run: {seed: 1_000}
run.seed                         run: {seed: 2020-01-01}
run.seed                         run: {seed: 1.0}
run.seed                         run: {seed: on}
run.steps                        run: {steps: 1e12}
run.steps                        run: {steps: 1000000000000}
run.steps                        run: {steps: 0}
run.steps                        run: {steps: .inf}
run.deterministic                run: {deterministic: yes}
run.deterministic                run: {deterministic: 1}
run                              run: []
run                              run: 5
model                            model: []
model.size.0                     model: {size: [0, 32]}
model                            model: {size: [7, 32]}
model.size.0                     model: {size: [1000000000, 32]}
model.size.1                     model: {size: [32]}
model.size.0                     model: {size: []}
model.size                       model: {size: 32x32}
model.size.0                     model: {size: [32.0, 32]}
model.size.0                     model: {size: [.nan, 32]}
model.guidance                   model: {guidance: -1}
model.guidance                   model: {guidance: .nan}
model.guidance                   model: {guidance: [1]}
model.text_tokens                model: {text_tokens: 0}
model.text_tokens                model: {text_tokens: 513}
model.encoders                   model: {encoders: nowhere}
model.path                       model: {path: 5}
model.path                       model: {path: ''}
model.path                       model: {path: '/'}
model.path                       model: {path: '~nobodyhere/model'}
model.path                       model: {path: prompts.txt}
model.path                       model: {path: loop}
model.path                       model: {path: sd3}
model.path                       model: {family: sd3}
model.family                     model: {family: flux2}
model.family                     model: {family: base}
model.family                     model: {family: 'os:path'}
model.family                     model: {family: ':x'}
model.family                     model: {family: '..x:y'}
model.family                     model: {family: 'a b:c'}
model.family                     model: {family: 'gardo.rewards.tiny_count:PLUGIN'}
model.family                     model: {family: 'gardo.policies.flux:FluxSettings'}
model.family                     model: {family: attention}
model.family                     model: {family: [flux]}
train.weights                    train: {weights: lora}
train.weights.targets            train: {weights: {kind: lora, targets: []}}
train.weights.targets.0          train: {weights: {targets: ['']}}
train.weights.targets            train: {weights: {targets: attn}}
train.weights.targets.0          train: {weights: {targets: [1]}}
train.weights.rank               train: {weights: {rank: 1000000000}}
train.weights.rank               train: {weights: {rank: 16.0}}
train.weights.alpha              train: {weights: {alpha: 0}}
train.weights.alpha              train: {weights: {alpha: .inf}}
train.weights.alpha              train: {weights: {alpha: -1}}
train.weights.path               train: {weights: {path: nowhere}}
train.weights.path               train: {weights: {path: prompts.txt}}
train.weights.path               train: {weights: {path: '.'}}
train.weights.folded             train: {weights: {folded: no}}
train.optimizer.lr               train: {optimizer: {lr: 0}}
train.optimizer.lr               train: {optimizer: {lr: -1e-4}}
train.optimizer.lr               train: {optimizer: {lr: 1e400}}
train.optimizer.lr               train: {optimizer: {lr: '1e-4'}}
train.optimizer.betas.1          train: {optimizer: {betas: [0.9]}}
train.optimizer.betas.1          train: {optimizer: {betas: [0.9, 1.0]}}
train.optimizer.betas.0          train: {optimizer: {betas: [-0.1, 0.9]}}
train.optimizer.betas.0          train: {optimizer: {betas: [.nan, 0.9]}}
train.optimizer.betas            train: {optimizer: {betas: 0.9}}
train.optimizer.eps              train: {optimizer: {eps: 0}}
train.optimizer.eps              train: {optimizer: {eps: -1}}
train.optimizer.weight_decay     train: {optimizer: {weight_decay: -0.1}}
train.optimizer.weight_decay     train: {optimizer: {weight_decay: .inf}}
train.optimizer                  train: {optimizer: []}
train.ema.decay                  train: {ema: {decay: 1}}
train.ema.decay                  train: {ema: {decay: -0.1}}
train.ema.every                  train: {ema: {every: 0}}
train.ema                        train: {ema: 0.9}
train.updates_per_step           train: {updates_per_step: 0}
train.updates_per_step           train: {updates_per_step: 1000000000}
train.micro_batch                train: {micro_batch: 0}
train.micro_batch                train: {micro_batch: -4}
train.max_grad_norm              train: {max_grad_norm: 0}
train.max_grad_norm              train: {max_grad_norm: .nan}
train.activation_checkpointing   train: {activation_checkpointing: all_of_it}
train.compile                    train: {compile: yes}
data.prompts                     data: {prompts: 5}
data.prompts                     data: {prompts: ''}
data.prompts                     data: {prompts: '.'}
data.prompts                     data: {prompts: loop}
data.prompts                     data: {prompts: /etc}
data.prompts                     data: {prompts: binary.txt}
data.prompts                     data: {prompts: nul.txt}
data.prompts_per_step            data: {prompts_per_step: 0}
data.prompts_per_step            data: {prompts_per_step: 10000000}
data.prompts_per_step            data: {prompts_per_step: 8.0}
data.images_per_prompt           data: {images_per_prompt: 0}
data.images_per_prompt           data: {images_per_prompt: 1000000000}
sampler.steps                    sampler: {steps: 0}
sampler.steps                    sampler: {steps: 1}
sampler.steps                    sampler: {steps: 1000000000}
sampler.train_steps              sampler: {train_steps: 0}
sampler.noise_level              sampler: {noise_level: -1}
sampler.noise_level              sampler: {noise_level: [0.7]}
sampler.same_initial_noise       sampler: {same_initial_noise: off}
sampler.schedule                 sampler: {schedule: cosine}
sampler.shift                    sampler: {schedule: shifted_linear, shift: 0}
algorithm                        algorithm: []
algorithm.name                   algorithm: {name: 5}
algorithm.name                   algorithm: {name: base}
algorithm.name                   algorithm: {name: wrapper}
algorithm.name                   algorithm: {name: ''}
algorithm.name                   algorithm: {name: ':'}
algorithm.name                   algorithm: {name: 'json:loads'}
algorithm.name                   algorithm: {name: 'gardo.rewards.tiny_count:PLUGIN'}
algorithm.base                   algorithm: {base: 3}
algorithm.base.clip_range        algorithm: {base: {clip_range: 0}}
algorithm.base.clip_range        algorithm: {base: {clip_range: 1}}
algorithm.base.clip_range        algorithm: {base: {clip_range: .nan}}
algorithm.base.beta              algorithm: {base: {beta: -1}}
algorithm.base.beta              algorithm: {base: {beta: .inf}}
algorithm.base.advantage.std     algorithm: {base: {advantage: {std: some}}}
algorithm.base.advantage.scale   algorithm: {base: {advantage: {scale: 0}}}
algorithm.base.advantage         algorithm: {base: {advantage: 5}}
algorithm.gate.fraction          algorithm: {gate: {fraction: 2}}
algorithm.gate.limits.1          algorithm: {gate: {limits: [0.1]}}
algorithm.gate.limits            algorithm: {gate: {limits: 0.1}}
algorithm.reference.reset_updates algorithm: {reference: {reset_updates: 0}}
algorithm.preset                 algorithm: {preset: nothing}
rewards                          rewards: []
rewards.tiny_count               rewards: {tiny_count: 3}
rewards.tiny_count               rewards: {tiny_count: proxy}
rewards.tiny_count.role          rewards: {tiny_count: {role: prox}}
rewards.tiny_count.role          rewards: {tiny_count: {role: null}}
rewards.tiny_count.weight        rewards: {tiny_count: {weight: .nan}}
rewards.tiny_count.weight        rewards: {tiny_count: {weight: '1'}}
rewards.tiny_count.every         rewards: {tiny_count: {every: 0}}
rewards.tiny_count               rewards: {tiny_count: {every: 3}}
rewards.tiny_count.batch         rewards: {tiny_count: {batch: 0}}
rewards.tiny_count.kind          rewards: {tiny_count: {kind: 5}}
rewards.tiny_count.kind          rewards: {tiny_count: {kind: [a]}}
rewards.a                        rewards: {'a b': {kind: tiny_count, role: proxy}}
rewards                          rewards: {'': {kind: tiny_count, role: proxy}}
rewards.a.b                      rewards: {a.b: {kind: tiny_count, role: proxy}}
rewards.json.kind                rewards: {json: {kind: tiny_nothing, role: proxy}}
rewards.model_config.kind        rewards: {model_config: {role: held_out}}
rewards.pref.judge.kind          rewards: {pref: {kind: preference, role: held_out}}
rewards.dinov3.size              rewards: {dinov3: {size: 0}}
rewards.dinov3.size              rewards: {dinov3: {size: 1000000000}}
rewards.dinov3.batch             rewards: {dinov3: {batch: -1}}
rewards.dinov3.dtype             rewards: {dinov3: {dtype: int8}}
rewards.dinov3.path              rewards: {dinov3: {path: prompts.txt}}
rollout.batch                    rollout: {batch: 0}
rollout.batch                    rollout: {batch: all}
rollout.decode_batch             rollout: {decode_batch: 0}
rollout.gather                   rollout: {gather: never}
evaluate.every                   evaluate: {every: 0}
evaluate.prompt_count            evaluate: {prompt_count: 0}
evaluate.images_per_prompt       evaluate: {images_per_prompt: 1000000000}
evaluate.steps                   evaluate: {steps: 0}
evaluate.steps                   evaluate: {steps: 1000000000}
evaluate.batch                   evaluate: {batch: 0}
evaluate.diversity               evaluate: {diversity: some}
evaluate.shown                   evaluate: {shown: 0}
evaluate.prompts                 evaluate: {prompts: 5}
checkpoint.every                 checkpoint: {every: 0}
checkpoint.keep                  checkpoint: {keep: 0}
checkpoint.keep                  checkpoint: {keep: -1}
checkpoint.background            checkpoint: {background: 'false'}
distributed.engine               distributed: {engine: fsdp}
distributed.stage                distributed: {stage: '3'}
distributed.threads              distributed: {threads: 0}
distributed.threads              distributed: {threads: 1000000000}
distributed.timeout              distributed: {timeout: 0}
distributed.timeout              distributed: {timeout: .inf}
distributed.timeout              distributed: {timeout: 1e12}
distributed.sub_group            distributed: {sub_group: 0}
distributed.hpz                  distributed: {hpz: 0}
distributed.reduce_bucket        distributed: {reduce_bucket: -1}
kernels                          kernels: cuda
kernels                          kernels: [torch]
kernels                          kernels: no
"""
TABLE = [line.split(maxsplit=1) for line in ROWS.strip().splitlines()]
LIMIT = 1.0  # seconds of this process; it takes a hundredth of that


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the recipes are, and files that are no prompts; nothing is written here."""
    here = tmp_path_factory.mktemp("malformed")
    (here / "binary.txt").write_bytes(bytes(range(256)))
    (here / "nul.txt").write_bytes(b"one red circle\0\n")
    (here / "loop").symlink_to("loop")
    written(here)
    before = sorted(here.rglob("*"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(here)
        yield here
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(("field", "fragment"), TABLE, ids=[row[1] for row in TABLE])
def test_refused(field: str, fragment: str, folder: Path) -> None:
    written(folder, fragment)
    started = time.process_time()
    message = refusal(Path("recipe.yaml"))
    assert time.process_time() - started < LIMIT
    assert message.startswith(f"recipe.yaml: {field}")
    lines = message.split("\n")
    assert len(set(lines)) == len(lines) <= 2
    assert all(line.isprintable() and len(line) < 500 for line in lines)


def test_there_are_enough_of_them() -> None:
    assert len(TABLE) >= 150


def test_as_many_fields_are_named_as_are_wrong_up_to_twenty(folder: Path) -> None:
    fields = ", ".join(f"field_{n}: 1" for n in range(30))
    written(folder, f"run: {{{fields}}}")
    lines = refusal(Path("recipe.yaml")).split("\n")
    assert len(lines) == 21 and lines[-1] == "and 10 more"
