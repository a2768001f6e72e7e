"""A LoRA's targets are layers of the transformer, every one of them."""

import pytest
import torch

from gardo.policies.base import Policy
from gardo.policies.flux import FluxPolicy, FluxSettings
from gardo.settings import FieldError


@pytest.fixture(scope="module")
def policy() -> Policy:
    settings = FluxSettings(path="builtin:flux", size=(16, 16), text_tokens=8)
    return FluxPolicy(settings, dtype=torch.float32, device=torch.device("cpu"), defer=True)


@pytest.mark.parametrize(
    ("target", "mend"),
    [
        ("attn.to_qq", "did you mean attn.to_q or "),
        ("single_transformer_blocks.7.proj_out", "did you mean "),  # there are two
        ("attn", "did you mean "),  # not a layer itself
        ("up_blocks", "leave targets out for the usual"),
    ],
)
def test_what_is_no_layer_is_refused_beside_one_that_is(
    policy: Policy, target: str, mend: str
) -> None:
    with pytest.raises(FieldError) as raised:
        policy.train_lora(rank=2, alpha=2, targets=("attn.to_k", target), seed=0)
    said = f"train.weights.targets: {target!r} is no layer of the transformer; {mend}"
    assert str(raised.value).startswith(said)
    assert not policy.trainable()


def test_a_name_from_the_root_and_an_end_of_names_are_layers(policy: Policy) -> None:
    targets = ("single_transformer_blocks.1.proj_out", "attn.to_q")
    policy.train_lora(rank=2, alpha=2, targets=targets, seed=0)
    hit = {name.rpartition(".lora_")[0] for name in policy.trainable()}
    assert hit == {
        "single_transformer_blocks.1.proj_out",
        *(f"{blocks}.{number}.attn.to_q" for number in (0, 1)
          for blocks in ("transformer_blocks", "single_transformer_blocks")),
    }  # fmt: skip
