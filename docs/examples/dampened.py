"""A policy: Flux whose text conditioning is dampened."""

from pydantic import Field

from gardo.policies.flux import FluxPolicy, FluxSettings


class DampenedSettings(FluxSettings):
    damping: float = Field(0.9, gt=0, le=1, description="what text embeddings are multiplied by")


class Dampened(FluxPolicy):
    Settings = DampenedSettings

    def encode_text(self, prompts):
        """What the text encoders say of P prompts: tensors [P, ...] of the model's dtype."""
        found = super().encode_text(prompts)
        return {name: embedding * self.settings.damping for name, embedding in found.items()}
