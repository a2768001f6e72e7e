"""Flux.1: packed latents of 2 x 2 patches, CLIP pooled + T5 text, distilled guidance as input."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from gardo.flow import flux_sigmas
from gardo.lazily import no_grad
from gardo.policies import kohya
from gardo.policies.base import Policy
from gardo.policies.settings import PolicySettings

if TYPE_CHECKING:
    from torch import Tensor


class FluxSettings(PolicySettings):
    pipeline_name: ClassVar[str] = "FluxPipeline"
    family: Literal["flux"] = "flux"


class FluxPolicy(Policy):
    Settings = FluxSettings
    transformer_name = "FluxTransformer2DModel"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    kohya_layout = kohya.FLUX
    lora_targets = (  # Flow-GRPO's list
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    def __init__(self, settings: FluxSettings, **options: Any) -> None:
        super().__init__(settings, **options)
        from gardo.policies.positions import RememberedPositions

        self.transformer.pos_embed = RememberedPositions(self.transformer.pos_embed)

    @cached_property
    def _image_ids(self) -> Tensor:
        rows, columns = self._packed_size
        return self.pipeline._prepare_latent_image_ids(1, rows, columns, self.device, self.dtype)

    @cached_property
    def _text_ids(self) -> Tensor:
        return torch.zeros(self.settings.text_tokens, 3, device=self.device, dtype=self.dtype)

    @property
    def _packed_size(self) -> tuple[int, int]:
        multiple = 2 * self.pipeline.vae_scale_factor
        return self.height // multiple, self.width // multiple

    @property
    def latent_shape(self) -> tuple[int, ...]:
        rows, columns = self._packed_size
        return rows * columns, self.transformer.config.in_channels

    @no_grad
    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        text, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, max_sequence_length=self.settings.text_tokens, device=self.device
        )
        return {"text": text, "pooled": pooled}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.transformer.config
        return {
            "text": (self.settings.text_tokens, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }

    def branches(
        self, x_RX: Tensor, sigma_R: Tensor, conditioning: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        guidance_R = None
        if self.transformer.config.guidance_embeds:
            guidance_R = torch.full_like(sigma_R, self.settings.guidance, dtype=torch.float32)
        velocity_RX = self.transformer(
            hidden_states=x_RX.to(self.dtype),
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["pooled"],
            timestep=(1000 * sigma_R).to(self.dtype) / 1000,  # rounded where the pipeline rounds
            guidance=guidance_R,
            img_ids=self._image_ids,
            txt_ids=self._text_ids,
            return_dict=False,
        )[0]
        return velocity_RX, None

    def sigmas(self, steps: int) -> Tensor:
        config = self.pipeline.scheduler.config
        rows, columns = self._packed_size
        return flux_sigmas(
            steps,
            rows * columns,
            base_shift=config.base_shift,
            max_shift=config.max_shift,
            base_tokens=config.base_image_seq_len,
            max_tokens=config.max_image_seq_len,
        )

    def _to_vae(self, latents_BX: Tensor) -> Tensor:
        return self.pipeline._unpack_latents(
            latents_BX, self.height, self.width, self.pipeline.vae_scale_factor
        )


PLUGIN = FluxPolicy
