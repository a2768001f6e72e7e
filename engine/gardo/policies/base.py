"""The policy: a diffusers pipeline seen by the trainer.

Families differ in `encode`, `velocity`, `latent_shape`, names.

Shapes: B images, P prompts, R rows, X one latent (`latent_shape`), H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pydantic import Field, PositiveInt, field_validator, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from gardo.settings import Pair, Strict, is_hub_id, model_path


class PolicySettings(Strict):
    """What every family needs to be told. A local folder is looked into before anything loads."""

    pipeline_name: ClassVar[str]  # `_class_name` in model_index.json

    family: str
    path: str = Field(description="hub id, local folder in diffusers format, or builtin:NAME")
    size: Pair[PositiveInt] = Field(description="height and width in pixels")
    guidance: float = Field(3.5, ge=0, description="guidance scale")
    text_tokens: int = Field(
        512, ge=1, le=512, description="T5 tokens a prompt is cut or padded to"
    )

    @field_validator("path")
    @classmethod
    def _exists(cls, value: str) -> str:
        path = Path(model_path(value))
        if not path.is_dir():
            if not is_hub_id(value):
                raise ValueError(
                    f"no such folder: {value!r}; give a diffusers folder or a hub id owner/name"
                )
            return value
        index = path / "model_index.json"
        if not index.is_file():
            raise ValueError(f"{value!r} has no model_index.json: not a folder in diffusers format")
        found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        if found != cls.pipeline_name:
            raise ValueError(
                f"{value!r} holds a {found}, this family needs a {cls.pipeline_name}; change "
                "model.family or model.path"
            )
        return value

    @model_validator(mode="after")
    def _size_fits(self) -> Self:
        config = Path(model_path(self.path)) / "vae" / "config.json"
        if config.is_file():
            levels = len(json.loads(config.read_text(encoding="utf-8"))["block_out_channels"])
            check_size(self.size, 2**levels)
        return self


def check_size(size: tuple[int, int], multiple: int) -> None:
    """ValueError where the pixels do not make whole latent patches; names sizes that do."""
    if any(side % multiple for side in size):
        near = [max(multiple, round(side / multiple) * multiple) for side in size]
        raise ValueError(
            f"size {list(size)} is not a multiple of {multiple} pixels; nearest: {near}"
        )


class Policy:
    """A pipeline whose transformer is trained.

    `velocity` is the only call of the training loop into the model.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    lora_targets: ClassVar[tuple[str, ...]]

    def __init__(
        self, settings: PolicySettings, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        pipeline = self.pipeline_class.from_pretrained(
            model_path(settings.path), dtype=dtype, use_safetensors=True
        )
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.settings = settings
        self.dtype = dtype
        self.device = device
        self.height, self.width = settings.size
        check_size(settings.size, 2 * pipeline.vae_scale_factor)
        self.lora: LoraConfig | None = None

    # What a family defines ------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, ...]:
        raise NotImplementedError  # pragma: no cover

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of P prompts: tensors [P, ...] of the model's dtype."""
        raise NotImplementedError  # pragma: no cover

    def velocity(self, x_RX: Tensor, sigma_R: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The model's velocity at x, fp32 [R, *latent_shape]; `conditioning` has R rows."""
        raise NotImplementedError  # pragma: no cover

    def sigmas(self, steps: int) -> Tensor:
        """The family's schedule: [steps + 1] float64 from 1 to 0."""
        raise NotImplementedError  # pragma: no cover

    def _to_vae(self, latents_BX: Tensor) -> Tensor:
        return latents_BX

    # What all share -------------------------------------------------------------------------------

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    def decode(self, latents_BX: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32; differentiable where the latents ask for it."""
        vae = self.pipeline.vae
        z = self._to_vae(latents_BX) / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def generate(
        self, conditioning: Mapping[str, Tensor], latents_BX: Tensor, *, steps: int
    ) -> Tensor:
        """Images [B, 3, H, W] of the pipeline itself (its scheduler, its defaults) from noise."""
        return self.pipeline(
            **self._pipeline_text(conditioning),
            latents=latents_BX.to(self.dtype),
            height=self.height,
            width=self.width,
            num_inference_steps=steps,
            guidance_scale=self.settings.guidance,
            max_sequence_length=self.settings.text_tokens,
            output_type="pt",
        ).images.float()

    def _pipeline_text(self, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "prompt_embeds": conditioning["text"],
            "pooled_prompt_embeds": conditioning["pooled"],
        }

    def train_lora(
        self, *, rank: int, alpha: float, targets: tuple[str, ...] | None, seed: int
    ) -> None:
        """Adds a LoRA adapter and makes it the only thing that trains.

        A Gaussian, B zero; the same on every rank.
        """
        self.lora = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=sorted(targets or self.lora_targets),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transformer.add_adapter(self.lora)

    def train_full(self) -> None:
        self.transformer.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.transformer.named_parameters() if p.requires_grad}

    def _lora_metadata(self) -> dict[str, Any]:
        """What diffusers stores beside the weights; sets sorted, so that a file is reproducible."""
        metadata = self.transformer.peft_config["default"].to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> Path:
        """Writes trained weights (`trainable()` names) for diffusers.

        A LoRA with its metadata, or a transformer folder; returns what was written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is None:
            self.transformer.save_config(folder)
            buffers = self.transformer.state_dict().keys() - dict(
                self.transformer.named_parameters()
            )
            state = {n: self.transformer.get_buffer(n) for n in buffers} | dict(weights)
            state = {n: t.to(self.dtype).contiguous() for n, t in state.items()}
            save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
            return folder
        self.pipeline_class.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(
                self.transformer, {n: t.contiguous() for n, t in weights.items()}
            ),
            transformer_lora_adapter_metadata=self._lora_metadata(),
        )
        return folder / "pytorch_lora_weights.safetensors"
