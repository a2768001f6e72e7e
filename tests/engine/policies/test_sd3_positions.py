"""SD3's table of positions: sizes it has are sampled, larger ones refused before anything loads."""

import pytest
import torch
from pydantic import ValidationError

from gardo.policies.sd3 import SD3Policy, SD3Settings


def test_the_largest_size_is_sampled_and_a_larger_one_refused() -> None:
    """24 patches of 2 latents of 2 pixels."""
    largest = SD3Settings(path="builtin:sd3", size=(96, 16), text_tokens=8)
    policy = SD3Policy(largest, dtype=torch.float32, device=torch.device("cpu"))
    x_RX = torch.randn(1, *policy.latent_shape)
    with torch.no_grad():
        velocity = policy.velocity(x_RX, torch.tensor([0.5]), policy.encode(["a circle"]))
    assert velocity.shape == x_RX.shape
    said = r"size: \[100, 16\]: the model has positions for 96 pixels a side at most"
    with pytest.raises(ValidationError, match=said):
        SD3Settings(path="builtin:sd3", size=(100, 16), text_tokens=8)


def test_a_published_model_says_it_without_a_download() -> None:
    path = "stabilityai/stable-diffusion-3.5-medium"
    SD3Settings(path=path, size=(1440, 1440))
    with pytest.raises(ValidationError, match="positions for 6144 pixels a side at most"):
        SD3Settings(path=path, size=(6160, 1024))
