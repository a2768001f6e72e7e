"""From a case to its recipe: a table a part, put together in `recipe`.

The proxy is continuous: a counted one could flip on a pixel's last bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import ROOT
from tests.integration.cases import Case

Sections = dict[str, dict[str, Any]]

BASES: Sections = {
    "flow_grpo": {"name": "flow_grpo", "clip_range": 1.0e-3, "beta": 1.0, "kl": "gaussian"},
    "diffusion_nft": {"name": "diffusion_nft", "beta": 0.04, "decay": {"slope": 0.1}},
    "awm": {"name": "awm", "times": [0, 3], "beta": 0.1, "ema_decay": {"slope": 0.1}},
    "kl_in_reward": {"name": "flow_grpo", "clip_range": 1.0e-3, "kl_in_reward": 0.1},
    "refl": {"name": "refl", "weight": 1.0, "margin": 0.0, "late": 0.5},
    "fast": {"name": "flow_grpo_fast", "clip_range": 1.0e-3, "beta": 0.1},
    "mix": {"name": "mix_grpo", "clip_range": 1.0e-3, "beta": 1.0, "kl": "gaussian",
            "window": {"kind": "random"}},
    "flash": {"name": "mix_grpo", "clip_range": 1.0e-3, "beta": 1.0, "kl": "gaussian",
              "window": {"kind": "progressive", "iterations": 1}, "flash": 0.5},
    "dance": {"name": "dance_grpo", "clip_range": 1.0e-3, "beta": 0.1, "kl": "velocity"},
    "guard": {"name": "grpo_guard", "clip_range": 1.0e-3, "beta": 1.0, "kl": "gaussian"},
    "ddpo": {"name": "ddpo", "beta": 1.0, "kl": "gaussian"},
}  # fmt: skip
MECHANISMS: Sections = {
    "gate": {"fraction": 0.25, "limits": [0.1, 0.5], "warmup": 2},
    "diversity": {"features": "dinov3"},
    "reference": {"reset_updates": 4},
}


def around(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """GARDO around a base."""
    return {"name": "gardo", "base": base, **MECHANISMS, **changes}


def released(base: str, reset_kl: float) -> dict[str, Any]:
    """GARDO with the KL reduced and the reference reset as in the released scripts."""
    reduced = {**BASES[base], "kl_reduction": "released", "kl_micro_batch": 3}
    return around(reduced, reference={"reset_kl": reset_kl, "statistic": "loss"})


ALGORITHMS: Sections = {
    **BASES,
    "gardo": around(BASES["flow_grpo"]),
    "gardo_awm": around(BASES["awm"]),
    "gardo_nft": around(BASES["diffusion_nft"]),
    "gardo_flash": around(BASES["flash"]),
    "gardo_released": released("flow_grpo", 5e-5),
    "gardo_nft_released": released("diffusion_nft", 2e-4),
}
SAMPLERS: Sections = {  # by base, where it is not the usual one
    "fast": {"steps": 6, "sde": "cps", "noise_level": 0.8},
    "mix": {"steps": 6},
    "flash": {"steps": 8, "schedule": "shifted_linear"},
    "dance": {"sde": "dance", "noise_level": 0.3, "schedule": "shifted_linear",
              "model_time": "integer", "same_initial_noise": True},
}  # fmt: skip
WEIGHTS: Sections = {
    "lora": {"weights": {"kind": "lora", "rank": 4, "alpha": 8}, "optimizer": {"lr": 2e-3}},
    "full": {"weights": {"kind": "full"}, "optimizer": {"lr": 1e-4}},
}
ENGINES: Sections = {
    "local": {"engine": "local"},
    **{f"stage{n}": {"engine": "zero", "stage": n} for n in range(4)},
}
# Options that change what is trained: one process has them too.
TRAINING: dict[str, Sections] = {
    "large": {  # the golden curve's size
        "model": {"size": [32, 32]},
        "data": {"prompts_per_step": 4},
        "train": {"micro_batch": 4},
    },
    "clip": {"train": {"max_grad_norm": 0.01}},
    "uneven": {  # some groups have no advantage; their rows are left out, or kept
        "rewards": {
            "tiny_shape": {"role": "held_out"},
            "uneven": {"kind": "tests.integration.uneven_proxy:Uneven", "role": "proxy"},
        },
    },
    "all_rows": {"train": {"keep_all_rows": True}},
    "ema": {"train": {"ema": {"decay": 0.5, "every": 2}}},
    "start": {},  # from the LoRA in FOLDER/start
    "near": {},  # four rewards with models, one of them of FOLDER/clip
    "far": {},  # the same, two in a worker and two of the server whose URL is in FOLDER/server
    "recompute": {"algorithm": {"old_velocity": "recompute"}},
    "wide": {"model": {"size": [16, 32]}},
    "tall": {"model": {"size": [48, 24]}},
    "sd3": {"model": {"family": "sd3", "path": "builtin:sd3"}},
    "nf4": {  # whose blocks are 64 weights: the built-in Flux has rows of 96
        "model": {"family": "sd3", "path": "builtin:sd3", "base": "nf4"},
    },
    "int8": {"model": {"base": "int8"}},
    "pref": {  # one group over all ranks, judged in pairs
        "data": {"prompts_per_step": 1, "images_per_prompt": 8},
        "rewards": {
            "tiny_shape": {
                "kind": "preference",
                "role": "proxy",
                "judge": {"kind": "tests.integration.pair_judge:Brighter"},
                "opponents": 4,
                "method": "bradley_terry",
            },
        },
    },
}
# Options that must not change a number in fp32. Tiny models fit under DeepSpeed's limits, and then
# nothing is ever released: `tight` releases all.
LAYOUT: dict[str, Sections] = {
    "tight": {"distributed": {"live_parameters": 1000, "reuse_distance": 0, "prefetch_bucket": 0}},
    "once": {"rollout": {"gather": "iteration"}},
    "each": {"rollout": {"gather": "step"}},
    "full": {"train": {"activation_checkpointing": "full"}},
    "selective": {"train": {"activation_checkpointing": "selective"}},
    "matmuls": {"train": {"activation_checkpointing": "matmuls"}},
    "compiled": {"train": {"compile": "blocks"}},  # traced, then run by torch's own operators
    "inductor": {"train": {"compile": "blocks"}},
    "folded": {"train": {"weights": {**WEIGHTS["lora"]["weights"], "folded": True}}},
    "block_kernels": {"model": {"block_kernels": True}},
    "math": {"model": {"attention": "_native_math"}},
    "buckets": {"distributed": {"reduce_bucket": 30_000, "sub_group": 50_000}},
    "host": {"distributed": {"slots": "host"}},
    "offload": {"distributed": {"offload": "optimizer"}},
    "offload_all": {"distributed": {"offload": "parameters"}},
    "persistent": {"distributed": {"persistence_threshold": 1000}},
    "hpz": {"distributed": {"hpz": 2}},
    "bf16": {"distributed": {"precision": "bfloat16"}},
    "bf16_masters": {"distributed": {"precision": "bfloat16", "masters": "bfloat16"}},
    "eight_bit": {"train": {"optimizer": {"name": "adamw_8bit", "lr": 2e-3}}},
    **{
        name: {"train": {"optimizer": {"name": name, "lr": 2e-3}}}
        for name in ("adamw_paged", "adamw_8bit_paged", "deepspeed_fused", "deepspeed_cpu")
    },
    "deterministic": {"run": {"deterministic": True}},
    "saving": {"checkpoint": {"every": 1, "keep": 1, "background": False}},
    "behind": {"checkpoint": {"background": True}},
}


def four_models(folder: Path, *, far: bool) -> Sections:
    """Rewards that have models, here or elsewhere."""
    exact = {"dtype": "float32"}  # of the engine's own precision
    rewards = {
        "tiny_shape": {"role": "proxy"},
        "clip": {"kind": "clipscore", "role": "auxiliary", "path": str(folder / "clip"), **exact},
        "tiny_fidelity": {"role": "held_out"},
        "dinov3": {"role": "features", "path": "builtin:dinov3", "size": 32, **exact},
    }
    if far:
        url = (folder / "server").read_text()
        places = {"tiny_shape": url, "clip": url, "tiny_fidelity": "worker", "dinov3": "worker"}
        rewards = {name: {**reward, "where": places[name]} for name, reward in rewards.items()}
    calls = {"deadline": 60.0, "retries": 100, "longest_pause": 0.5}
    return {
        "rewards": rewards,
        "scoring": {"calls": calls, "workers": {"worker": {"threads": 1}} if far else {}},
        "rollout": {"batch": 2, "overlap": True},
    }


def recipe(case: Case, folder: Path) -> dict[str, Any]:
    """The case's recipe; its run lies in `folder`."""
    sections: dict[str, Any] = {
        "model": {
            "family": "flux", "path": "builtin:flux", "size": [16, 16], "text_tokens": 8,
        },
        "train": {"updates_per_step": 2, "micro_batch": 2, **WEIGHTS[case.weights]},
        "data": {
            "prompts": str(ROOT / "recipes/tiny_prompts.txt"),
            "prompts_per_step": 2,
            "images_per_prompt": 4,
        },
        "sampler": {
            "steps": 4, "train_steps": 2, "noise_level": 0.7,
            **SAMPLERS.get(case.algorithm.removeprefix("gardo_"), {}),
        },
        "algorithm": ALGORITHMS[case.algorithm],
        "rewards": {
            "tiny_shape": {"role": "proxy"},
            "tiny_purity": {"role": "auxiliary"},
            "dinov3": {"role": "features", "path": "builtin:dinov3", "size": 32},
        },
        "rollout": {"batch": 4},
        "evaluate": {
            "every": 100, "prompt_count": 4, "images_per_prompt": 1, "steps": 2, "batch": 2,
        },
        "checkpoint": {"every": 100},
        "distributed": {"threads": 1, **ENGINES[case.engine]},
        "run": {"name": case.run, "steps": case.steps, "seed": 7, "folder": str(folder)},
        "kernels": case.kernels,
    }  # fmt: skip
    for option in case.options:
        for section, values in {**TRAINING, **LAYOUT}[option].items():
            sections[section] = {**sections[section], **values}
    if case.has("start"):
        sections["train"]["weights"] = {**WEIGHTS["lora"]["weights"], "path": str(folder / "start")}
    if case.has("near") or case.has("far"):
        sections |= four_models(folder, far=case.has("far"))
        sections["model"]["size"] = [32, 32]  # tiny_fidelity's
    if case.algorithm == "refl":  # half as many rows: one a sample
        sections["train"]["micro_batch"] //= 2
    return sections
