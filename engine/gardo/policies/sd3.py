"""Stable Diffusion 3 and 3.5: latents [C, h, w], two CLIPs and T5, classifier-free guidance.

With guidance s > 1 the velocity is v_neg + s (v_pos - v_neg): the prompt against the empty prompt,
both branches in one call of the transformer, both with gradient. With s <= 1 it is v_pos alone.

Shapes: P prompts, R rows, X = [C, h, w] one latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from gardo.flow import sd3_sigmas
from gardo.lazily import no_grad
from gardo.policies import kohya
from gardo.policies.base import Policy
from gardo.policies.settings import PolicySettings
from gardo.settings import config_folder, read_value

if TYPE_CHECKING:
    from torch import Tensor


class SD3Settings(PolicySettings):
    """The pipeline's own defaults, with the guidance scale of SD3.5 Medium."""

    pipeline_name: ClassVar[str] = "StableDiffusion3Pipeline"
    family: Literal["sd3"] = "sd3"
    guidance: float = Field(4.5, ge=0, description="guidance scale; up to 1: no negative branch")
    text_tokens: int = Field(256, ge=1, le=512, description="T5 tokens of a prompt, after CLIP's")

    @model_validator(mode="after")
    def _has_positions(self) -> Self:
        """The model's table of positions is finite, unlike Flux's rotary ones."""
        folder = config_folder(self.path) or Path()
        files = [folder / part / "config.json" for part in ("transformer", "vae")]
        if not all(file.is_file() for file in files):
            return self
        table, vae = files
        levels = len(read_value(vae, "block_out_channels", list))
        patch = read_value(table, "patch_size", int) * 2 ** (levels - 1)
        if max(self.size) > (most := read_value(table, "pos_embed_max_size", int) * patch):
            raise ValueError(
                f"size: {list(self.size)}: the model has positions for {most} pixels a side at most"
            )
        return self


class SD3Policy(Policy):
    Settings = SD3Settings
    transformer_name = "SD3Transformer2DModel"
    block_lists = ("transformer_blocks",)
    kohya_layout = kohya.SD3
    lora_targets = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    @property
    def guided(self) -> bool:
        return self.settings.guidance > 1

    @property
    def cfg_scale(self) -> float:  # type: ignore[override]
        return self.settings.guidance

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, self.height // scale, self.width // scale

    @property
    def own_prompts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("",) if self.guided else ()

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """text [P, L, D] and pooled [P, E]; with guidance, the empty prompt's, once a prompt.

        L is CLIP's tokens and `text_tokens` of T5, D the width of T5, E both CLIP projections.
        """
        prompted = super().encode(prompts)
        if not self.guided:
            return prompted
        negative = super().encode(self.own_prompts)
        return prompted | {
            f"negative_{name}": negative[name].expand_as(tensor)
            for name, tensor in prompted.items()
        }

    @no_grad
    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.text_tokens,
        )
        return {"text": text, "pooled": pooled}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.transformer.config
        tokens = self.pipeline.tokenizer_max_length + self.settings.text_tokens
        text, pooled = (tokens, config.joint_attention_dim), (config.pooled_projection_dim,)
        if not self.guided:
            return {"text": text, "pooled": pooled}
        return {"text": text, "pooled": pooled, "negative_text": text, "negative_pooled": pooled}

    def branches(
        self, x_RX: Tensor, sigma_R: Tensor, conditioning: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        if not self.guided:
            text, pooled = conditioning["text"], conditioning["pooled"]
            return self._velocity(x_RX, sigma_R, text, pooled), None
        negative, positive = self._velocity(
            torch.cat([x_RX, x_RX]),
            torch.cat([sigma_R, sigma_R]),
            torch.cat([conditioning["negative_text"], conditioning["text"]]),
            torch.cat([conditioning["negative_pooled"], conditioning["pooled"]]),
        ).chunk(2)
        return positive, negative

    def _velocity(self, x_RX: Tensor, sigma_R: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """One call of the transformer, whose time is 1000 sigma, not rounded. [R, C, h, w]."""
        return self.transformer(
            hidden_states=x_RX.to(self.dtype),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=1000 * sigma_R,
            return_dict=False,
        )[0]

    def sigmas(self, steps: int) -> Tensor:
        return sd3_sigmas(steps, self.pipeline.scheduler.config.shift)

    def _pipeline_text(self, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        text = super()._pipeline_text(conditioning)
        if self.guided:
            text["negative_prompt_embeds"] = conditioning["negative_text"]
            text["negative_pooled_prompt_embeds"] = conditioning["negative_pooled"]
        return text


PLUGIN = SD3Policy
