"""How the released scripts encode, sample, decode and call Flux and SD3.5.

Written again from what their `pipeline_with_logprob` and `compute_log_prob` do. The scheduler's row
is searched for every row of a batch (Flux) or for every step (SD3), at which the host waits;
all latents and log-probabilities of the trajectory are kept; Flux rounds the latents that it keeps
to the type of the embeddings.

Shapes: B samples of a batch, T steps, X one latent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor

from core_ops.released import Schedule, sde_step
from gardo.recipe import Recipe

Generators = list[torch.Generator] | None
Samples = dict[str, Any]  # what is kept of a trajectory, every tensor with B rows


class Family:
    """A diffusers pipeline, whose transformer is called by the name that it has in there."""

    def __init__(self, pipeline: Any, recipe: Recipe, device: torch.device) -> None:
        self.pipeline, self.device = pipeline, device
        self.guidance, self.tokens = recipe.model.guidance, recipe.model.text_tokens
        self.height, self.width = recipe.model.size
        self.steps, self.noise_level = recipe.sampler.steps, recipe.sampler.noise_level

    def prepare(self) -> None:
        """What is computed once, before the first iteration."""

    def encode(self, prompts: list[str]) -> Samples:
        raise NotImplementedError  # pragma: no cover

    def initial(self, text: Samples, generators: Generators) -> tuple[Tensor, Samples]:
        """The noise that sampling starts from [B, X], and what the model is told beside it."""
        raise NotImplementedError  # pragma: no cover

    def set_timesteps(self, x: Tensor) -> None:
        raise NotImplementedError  # pragma: no cover

    def conditioned(self, told: Samples) -> Samples:
        """What the model is told, put together once a trajectory and once a micro-batch."""
        return told

    def sampling_velocity(self, x: Tensor, t: Tensor, told: Samples) -> Tensor:
        raise NotImplementedError  # pragma: no cover

    def training_velocity(self, model: Callable[..., Any], told: Samples, j: int) -> Tensor:
        """The velocity at step `j` of a micro-batch, in the model's dtype."""
        raise NotImplementedError  # pragma: no cover

    def looked_up(self, t: Tensor, count: int) -> Tensor:
        """The time of a step, as often as its row of the schedule is looked up."""
        raise NotImplementedError  # pragma: no cover

    def to_vae(self, x: Tensor) -> Tensor:
        return x

    @property
    def schedule(self) -> Schedule:
        scheduler = self.pipeline.scheduler
        return Schedule(scheduler.timesteps, scheduler.sigmas, self.noise_level)

    @torch.no_grad()
    def sample(self, text: Samples, generators: Generators) -> Samples:
        """latents [B, T + 1, X], log_probs [B, T], timesteps [B, T] and what the model was told."""
        x, beside = self.initial(text, generators)
        kept = {**text, **beside}
        told = self.conditioned(kept)
        self.set_timesteps(x)
        latents, log_probs, dtype = [x], [], x.dtype
        for t in self.pipeline.scheduler.timesteps:
            v = self.sampling_velocity(x, t, told)
            x, log_prob, _, _ = sde_step(
                self.schedule, v.float(), self.looked_up(t, len(x)), x.float()
            )
            x = x.to(dtype)
            latents.append(x)
            log_probs.append(log_prob)
        return {
            **kept,
            "latents": torch.stack(latents, 1),
            "log_probs": torch.stack(log_probs, 1),
            "timesteps": self.pipeline.scheduler.timesteps.repeat(len(x), 1),
        }

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], the whole batch at once."""
        vae = self.pipeline.vae
        z = self.to_vae(x) / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(z.to(vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(image, output_type="pt")


class Flux(Family):
    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Samples:
        text, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, max_sequence_length=self.tokens, device=self.device
        )
        return {"text": text, "pooled": pooled}

    def initial(self, text: Samples, generators: Generators) -> tuple[Tensor, Samples]:
        B, dtype = len(text["text"]), text["text"].dtype
        channels = self.pipeline.transformer.config.in_channels // 4
        x, ids = self.pipeline.prepare_latents(
            B, channels, self.height, self.width, dtype, self.device, generators, None
        )
        return x, {"image_ids": ids.unsqueeze(0).repeat(B, 1, 1)}

    def set_timesteps(self, x: Tensor) -> None:
        config = self.pipeline.scheduler.config
        mu = calculate_shift(
            x.shape[1],
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        sigmas = np.linspace(1.0, 1 / self.steps, self.steps)
        retrieve_timesteps(self.pipeline.scheduler, self.steps, self.device, sigmas=sigmas, mu=mu)

    def looked_up(self, t: Tensor, count: int) -> Tensor:
        return t.unsqueeze(0).repeat(count)

    def conditioned(self, told: Samples) -> Samples:
        x_like = {"device": self.device, "dtype": told["text"].dtype}
        text_ids = torch.zeros(told["text"].shape[1], 3).to(**x_like)
        return {**told, "text_ids": text_ids, "guidance": self._guidance(len(told["text"]))}

    def sampling_velocity(self, x: Tensor, t: Tensor, told: Samples) -> Tensor:
        timestep = t.expand(len(x)).to(x.dtype)
        return self._velocity(self.pipeline.transformer, x, timestep / 1000, told)

    def training_velocity(self, model: Callable[..., Any], told: Samples, j: int) -> Tensor:
        """Its constants are made anew at every call."""
        x, time = told["latents"][:, j], told["timesteps"][:, j] / 1000
        return self._velocity(model, x, time, self.conditioned(told))

    def _guidance(self, count: int) -> Tensor | None:
        if not self.pipeline.transformer.config.guidance_embeds:
            return None
        return torch.tensor([self.guidance], device=self.device).expand(count)

    def _velocity(
        self, model: Callable[..., Any], x: Tensor, time: Tensor, told: Samples
    ) -> Tensor:
        return model(
            hidden_states=x,
            timestep=time,
            guidance=told["guidance"],
            pooled_projections=told["pooled"],
            encoder_hidden_states=told["text"],
            txt_ids=told["text_ids"],
            img_ids=told["image_ids"][0],
            return_dict=False,
        )[0]

    def to_vae(self, x: Tensor) -> Tensor:
        return self.pipeline._unpack_latents(
            x, self.height, self.width, self.pipeline.vae_scale_factor
        )


class SD3(Family):
    """With guidance above 1 the empty prompt's rows go before the prompts' in every call."""

    def prepare(self) -> None:
        self._negative = self.encode([""]) if self.guidance > 1 else None

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Samples:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        return {"text": text, "pooled": pooled}

    def initial(self, text: Samples, generators: Generators) -> tuple[Tensor, Samples]:
        B, channels = len(text["text"]), self.pipeline.transformer.config.in_channels
        dtype = text["text"].dtype
        x = self.pipeline.prepare_latents(
            B, channels, self.height, self.width, dtype, self.device, generators, None
        )
        return x.float(), {}

    def set_timesteps(self, x: Tensor) -> None:
        retrieve_timesteps(self.pipeline.scheduler, self.steps, self.device)

    def looked_up(self, t: Tensor, count: int) -> Tensor:
        return t.unsqueeze(0)

    def sampling_velocity(self, x: Tensor, t: Tensor, told: Samples) -> Tensor:
        return self._velocity(self.pipeline.transformer, x, t.expand(len(x)), told)

    def training_velocity(self, model: Callable[..., Any], told: Samples, j: int) -> Tensor:
        return self._velocity(model, told["latents"][:, j], told["timesteps"][:, j], told)

    def conditioned(self, told: Samples) -> Samples:
        if not self._negative:
            return told
        both = {name: torch.cat([negative.expand_as(told[name]), told[name]])
                for name, negative in self._negative.items()}  # fmt: skip
        return {**told, **both}

    def _velocity(self, model: Callable[..., Any], x: Tensor, t: Tensor, told: Samples) -> Tensor:
        if self._negative:
            x, t = torch.cat([x] * 2), torch.cat([t] * 2)
        v = model(
            hidden_states=x.to(told["text"].dtype),
            timestep=t,
            encoder_hidden_states=told["text"],
            pooled_projections=told["pooled"],
            return_dict=False,
        )[0]
        if not self._negative:
            return v
        unprompted, prompted = v.chunk(2)
        return unprompted + self.guidance * (prompted - unprompted)


FAMILIES: Mapping[str, type[Family]] = {"flux": Flux, "sd3": SD3}


def same_noise(prompts: Sequence[str], base_seed: int) -> list[torch.Generator]:
    """A generator a sample, which starts alike for the samples of one prompt."""
    seeds = [int.from_bytes(hashlib.sha256(p.encode()).digest()[:4], "big") for p in prompts]
    return [torch.Generator().manual_seed((base_seed + seed) % 2**31) for seed in seeds]
