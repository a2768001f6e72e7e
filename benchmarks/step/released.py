"""GARDO around Flow-GRPO as its released scripts run it, as a process of its own.

    PYTHONPATH=benchmarks:engine:kernels \\
        python -m step.released RECIPE [--set FIELD=VALUE ...] --iterations N --out FILE.json

A baseline: the procedure of train_flux_grpo_gardo.py and train_sd3_grpo_gardo.py (GARDO, arXiv
2512.24138), written again from what they do, on the model, LoRA, rewards and prompts of a recipe.
What it does that costs time, it does on purpose: prompts are encoded for every batch again; one
time step of a micro-batch goes through the model at a time; the reference goes through it for every
row, gated or not; Flux trains samples without an advantage; rewards, features and metrics go to the
host where theirs do.

Left out, for the baseline's good: evaluations, checkpoints and logged pictures; 8-bit PIL images
for their scorers; the graph that their DINOv3 call builds and drops; the data loader's worker.
Groups are dealt over all batches of an iteration, so a batch need not hold whole ones.

FILE has the iterations: seconds, seconds by phase, transformer calls and rows by phase, and enough
numbers to see that it trains. The first iteration warms up.

Shapes: B samples of this rank, N of all ranks, T steps (trained ones first), R samples of a
micro-batch, X one latent.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core_ops.released import policy_loss
from gardo.config import load
from gardo.data import step_prompts
from gardo.distributed.base import leave_process_group
from gardo.machine import ranks, use_threads
from gardo.planner import geometry
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from gardo.report.phase_clock import PhaseClock, fields
from gardo.rewards.base import Gathering
from gardo.rewards.panel import Panel
from gardo.types import Prompt
from step.executed import Executed
from step.released_credit import Controller, gated, group_advantages, rows_kept, zero_std_ratio
from step.released_families import Samples, same_noise
from step.released_setup import Average, Loaded, check, copy_weights, prepare

PROMPT_TOKENS = 256
INFO = ("approx_kl", "clipfrac", "clipfrac_gt_one", "clipfrac_lt_one", "policy_loss", "kl_loss")
Host = dict[str, np.ndarray[Any, Any]]


def multi_score(
    panel: Panel, images: Tensor, prompts: Sequence[Prompt], place: Gathering
) -> dict[str, Any]:
    """Every reward of the images, one after the other, on the host; `avg` is their weighted sum."""
    details: dict[str, Any] = {}
    total: list[float] = []
    for name in (*panel.names("proxy"), *panel.names("auxiliary")):
        reward = panel.rewards[name]
        with torch.no_grad():
            details[name] = reward.score_together(images, prompts, place).cpu().numpy()
        weighted = [reward.settings.weight * score for score in details[name]]
        total = [a + b for a, b in zip(total, weighted, strict=True)] if total else weighted
    return {**details, "avg": total}


@dataclass(frozen=True)
class Drawn:
    """A sampling batch of this rank."""

    prompts: list[Prompt]
    group_B: Tensor  # int64, prompt index within the iteration
    sample_B: Tensor  # int64, index within the iteration


class Released:
    """The procedure with its state between iterations."""

    def __init__(self, recipe: Recipe, loaded: Loaded, batch: int) -> None:
        self.recipe, self.loaded, self.batch = recipe, loaded, batch
        self.accelerator, self.family = loaded.accelerator, loaded.family
        self.device = loaded.accelerator.device
        self.panel, self.pipeline = loaded.panel, loaded.family.pipeline
        (self.proxy,), self.auxiliaries = self.panel.names("proxy"), self.panel.names("auxiliary")
        (self.features,) = self.panel.names("features")
        gate, self.reference = recipe.algorithm.gate, recipe.algorithm.reference
        self.controller = Controller(gate.fraction, gate.limits)
        ema = recipe.train.ema
        self.average = Average(loaded.trained, ema.decay, ema.every) if ema else None
        self.prompts = recipe.prompts()
        images = recipe.data.prompts_per_step * recipe.data.images_per_prompt
        self.batches = images // (batch * self.accelerator.num_processes)
        self.executor = ThreadPoolExecutor(max_workers=8)
        self.clock = PhaseClock(self.device)
        self.clock.watch(self.pipeline.transformer)
        self.skips = recipe.model.family == "sd3"
        self.reset, self.reset_at, self.updates = recipe.model.family == "flux", 0, 0

    def iterate(self, epoch: int) -> dict[str, Any]:
        """One iteration and what it took."""
        self.clock.take()
        self.pipeline.transformer.eval()
        samples = self.sampled(epoch)
        reset = self.reset_if_due(epoch)
        prompts, rewards, features = self.gathered(samples)
        samples |= self.credited(prompts, rewards, features)
        if self.skips:
            kept = rows_kept(samples["advantages"], self.batches)
            samples = {name: value[kept] for name, value in samples.items()}
        with self.clock.phase("train"):
            trained = self.trained(samples)
        steps, advantages = self.recipe.sampler.train_steps, samples["advantages"]
        return {
            "iteration": epoch,
            **fields(self.clock.take()),
            "samples": self.batches * self.batch,
            "trained_rows": advantages.numel(),
            "gated_rows": int(samples["gate"].sum()) * steps,
            "zero_advantage_rows": int((advantages == 0).sum()),
            "zero_std_ratio": zero_std_ratio(prompts, rewards[self.proxy]),
            "reset": reset,
            **trained,
        }

    # ---- sampling --------------------------------------------------------------------------------

    def drawn(self, epoch: int) -> Iterator[Drawn]:
        """This rank's batches: all samples of the iteration, shuffled and dealt out."""
        data, world = self.recipe.data, self.accelerator.num_processes
        prompts = step_prompts(self.prompts, epoch, data.prompts_per_step, self.recipe.run.seed)
        generator = torch.Generator().manual_seed(self.recipe.run.seed + epoch)
        order = torch.randperm(len(prompts) * data.images_per_prompt, generator=generator)
        for part in order.view(self.batches, world, self.batch)[:, self.accelerator.process_index]:
            group_B = part // data.images_per_prompt
            drawn = [prompts[group] for group in group_B.tolist()]
            yield Drawn(drawn, group_B.to(self.device), part.to(self.device))

    def sampled(self, epoch: int) -> Samples:
        """Trajectories, rewards and features of all batches."""
        parts, waiting = [], []
        phase = self.clock.phase
        for drawn in self.drawn(epoch):
            with phase("encode"):
                text = self.family.encode(list(drawn.prompts))
                prompt_ids = self.pipeline.tokenizer(
                    drawn.prompts,
                    padding="max_length",
                    max_length=PROMPT_TOKENS,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids.to(self.device)
            with phase("sample"):
                same = self.recipe.sampler.same_initial_noise
                generators = same_noise(drawn.prompts, 10_000 * epoch) if same else None
                part = self.family.sample(text, generators)
            with phase("decode", rows=len(drawn.prompts)):
                images = self.family.decode(part["latents"][:, -1])
            with phase("reward"):
                place = Gathering(
                    drawn.sample_B,
                    drawn.group_B,
                    self.recipe.run.seed,
                    epoch,
                    lambda tensor: tensor,
                )
                waiting.append(
                    self.executor.submit(multi_score, self.panel, images, drawn.prompts, place)
                )
                time.sleep(0)
                features = self.panel.rewards[self.features].score(images, drawn.prompts).detach()
            part["next_latents"] = part["latents"][:, 1:]
            part["latents"] = part["latents"][:, :-1]
            parts.append({**part, "prompt_ids": prompt_ids, "features": features})
        with phase("reward"):
            for part, scored in zip(parts, waiting, strict=True):
                for name, value in scored.result().items():
                    part[f"reward {name}"] = torch.as_tensor(value, device=self.device).float()
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # ---- credit ----------------------------------------------------------------------------------

    def reset_if_due(self, epoch: int) -> bool:
        """Whether the reference was reset, by the KL of the last iteration or by its age."""
        after = self.reference.reset_iterations
        due = self.reset or (after is not None and epoch - self.reset_at >= after)
        if due:
            copy_weights(self.loaded.trained, self.loaded.old)
            self.reset, self.reset_at = False, epoch
        return due

    def gathered(self, samples: Samples) -> tuple[list[str], Host, np.ndarray[Any, Any]]:
        """Prompts, rewards and features of all ranks on the host; `samples` keeps none of them."""
        rewards = {n: samples.pop(n) for n in list(samples) if n.startswith("reward ")}
        # the advantage is repeated along the steps, as if it could depend on them
        rewards["steps"] = rewards[f"reward {self.proxy}"].unsqueeze(1)
        rewards["steps"] = rewards["steps"].repeat(1, self.recipe.sampler.train_steps)
        everyone = {n: self.accelerator.gather(value) for n, value in rewards.items()}
        on_host = {n.removeprefix("reward "): v.cpu().numpy() for n, v in everyone.items()}
        features = self.accelerator.gather(samples.pop("features")).cpu().numpy()
        prompt_ids = self.accelerator.gather(samples.pop("prompt_ids")).cpu().numpy()
        prompts = self.pipeline.tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
        return prompts, on_host, np.nan_to_num(features)

    def credited(
        self, prompts: Sequence[str], rewards: Host, features: np.ndarray[Any, Any]
    ) -> Samples:
        """This rank's advantages [B, T] and gate [B]."""
        advantages = torch.as_tensor(group_advantages(prompts, rewards["steps"], features))
        gate = gated(rewards, self.proxy, self.auxiliaries, self.controller)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        own = advantages.reshape(world, -1, advantages.shape[-1])[rank]
        return {
            "advantages": own.to(self.device),
            "gate": gate.reshape(world, -1)[rank].to(self.device),
        }

    # ---- training --------------------------------------------------------------------------------

    def trained(self, samples: Samples) -> dict[str, Any]:
        """One pass over the samples; the losses and mean |ratio - 1| of each update."""
        total = len(samples["gate"])
        perm = torch.randperm(total, device=self.device)
        samples = {name: value[perm] for name, value in samples.items()}
        size = total // self.batches
        self.pipeline.transformer.train()
        info: dict[str, list[Tensor]] = defaultdict(list)
        updates: list[dict[str, float]] = []
        for i in range(self.batches):
            part = {n: value[i * size : (i + 1) * size] for n, value in samples.items()}
            told = self.family.conditioned(part)
            for j in range(self.recipe.sampler.train_steps):
                with self.accelerator.accumulate(self.loaded.transformer):
                    self.train_step(told, j, info)
                if self.accelerator.sync_gradients:
                    updates.append(self.logged(info))
                    info.clear()
            if self.average:
                self.average.step(self.updates)
        shown = ("loss", "kl_loss", "ratio_error")
        return {name: [update[name] for update in updates] for name in shown}

    def train_step(self, told: Samples, j: int, info: dict[str, list[Tensor]]) -> None:
        """A time step of a micro-batch: both forward passes, the backward pass, perhaps the step"""
        loaded, base = self.loaded, self.recipe.algorithm.base
        v = self.family.training_velocity(loaded.transformer, told, j)
        with self.clock.phase("teachers"), torch.no_grad():
            self.pipeline.transformer.set_adapter("old")
            v_ref = self.family.training_velocity(loaded.transformer, told, j)
            self.pipeline.transformer.set_adapter("default")
        out = policy_loss(
            self.family.schedule,
            v.float(),
            told["latents"][:, j].float(),
            told["next_latents"][:, j].float(),
            v_ref.float(),
            timestep_R=told["timesteps"][:, j],
            log_prob_old_R=told["log_probs"][:, j],
            advantage_R=told["advantages"][:, j],
            gated_R=told["gate"],
            clip=base.clip_range,
            beta=base.beta,
            adv_clip=base.advantage_clip,
        )
        metrics = [*out.metrics, torch.zeros_like(out.metrics[0])][: len(INFO)]
        for name, value in zip(INFO, metrics, strict=True):
            info[name].append(value)
        info["loss"].append(out.loss.detach())
        assert out.log_ratio_R is not None
        info["ratio_error"].append(out.log_ratio_R.expm1().abs().mean())
        self.accelerator.backward(out.loss)
        if self.accelerator.sync_gradients:
            limit = self.recipe.train.max_grad_norm
            self.accelerator.clip_grad_norm_(loaded.transformer.parameters(), limit)
        loaded.optimizer.step()
        loaded.optimizer.zero_grad()

    def logged(self, info: dict[str, list[Tensor]]) -> dict[str, float]:
        """The means of an update over its micro-batches and ranks, on the host."""
        means = {name: torch.mean(torch.stack(values)) for name, values in info.items()}
        means = self.accelerator.reduce(means, reduction="mean")
        if self.reference.reset_kl is not None and means["kl_loss"] > self.reference.reset_kl:
            self.reset = True
        self.updates += 1
        return {name: value.item() for name, value in means.items()}


def run(
    recipe: Recipe, *, engine: str, batch: int, iterations: int, count: bool, source: str
) -> dict[str, Any]:
    """The iterations of a recipe, on as many ranks as were started; `count` counts the last one."""
    _, _, world = ranks()
    check(recipe, batch, world, source)
    images = recipe.data.prompts_per_step * recipe.data.images_per_prompt
    batches = images // (batch * world)
    accumulation = batches // recipe.train.updates_per_step * recipe.sampler.train_steps
    try:
        loaded = prepare(recipe, engine=engine, batch=batch, accumulation=accumulation)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{source}: {error}") from error
    released = Released(recipe, loaded, batch)
    executed = Executed(loaded.family.pipeline.transformer)
    records = []
    for epoch in range(iterations):
        if count and epoch == iterations - 1:
            executed.start()
        records.append(released.iterate(epoch))
    executed.stop()
    return {
        "engine": engine,
        "stage": recipe.distributed.stage if engine == "zero" else None,
        "ranks": world,
        "batch": batch,
        "device": str(released.device),
        "dtype": recipe.distributed.precision,
        "peak_bytes": released.clock.memory.reserved,
        "iterations": records,
        **(executed.counts() if count else {}),
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 for a recipe that the released scripts cannot run."""
    parser = argparse.ArgumentParser("step.released", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    parser.add_argument("--iterations", type=int, default=3, help="the first one warms up")
    parser.add_argument("--engine", choices=["local", "zero"], help="the recipe's if left out")
    parser.add_argument(
        "--batch", type=int, help="images of a sampling batch and samples of a micro-batch; as "
        "many images as a sampling forward of ours has if left out"
    )  # fmt: skip
    parser.add_argument("--count", action="store_true", help="what the last iteration executes")
    parser.add_argument("--out", type=Path, required=True, help="written when all is done")
    options = parser.parse_args(arguments)
    source = str(options.recipe)
    try:
        recipe = load(options.recipe, options.sets)
        rank, _, world = ranks()
        use_threads(recipe, world)
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True
        batch = options.batch or geometry(recipe, rank=rank, world=world, source=source).sampled
        engine = options.engine or recipe.distributed.engine
        record = run(
            recipe,
            engine=engine,
            batch=batch,
            iterations=options.iterations,
            count=options.count,
            source=source,
        )
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    leave_process_group()
    if rank == 0:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
