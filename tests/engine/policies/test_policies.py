"""Both model families on tiny random pipelines: sampling against diffusers', training."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from gardo.flow import transitions
from gardo.plugins import names
from gardo.policies.base import Policy
from gardo.rollout import rows_of
from tests.engine.policies.tiny import (
    FAMILIES,
    HEIGHT,
    PROMPTS,
    WIDTH,
    euler,
    images,
    latents,
    randomise,
    velocity,
)

# Sampling ----------------------------------------------------------------------------------------


def test_families_are_found_by_name():
    assert set(FAMILIES) <= set(names("gardo.policies"))


@pytest.mark.parametrize("guidance", [0.5, 1.0, 4.5])
def test_euler_steps_are_the_pipeline(make, family, guidance):
    policy = make(family, guidance=guidance)
    ours, theirs = policy.decode(euler(policy, 4)), images(policy, 4)
    assert ours.shape == (len(PROMPTS), 3, HEIGHT, WIDTH) and ours.dtype == torch.float32
    assert ours.std() > 0.05 and (ours[0] - ours[1]).abs().mean() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_schedule_is_the_pipelines(policy, steps):
    images(policy, steps)  # leaves its schedule in its scheduler
    ours, theirs = policy.sigmas(steps), policy.pipeline.scheduler.sigmas
    assert ours.dtype == torch.float64 and ours.shape == (steps + 1,)
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2e-7)


def told(policy: Policy) -> list[torch.Tensor]:
    """Every later call of the transformer adds the times that it is told, one row's."""
    seen: list[torch.Tensor] = []
    hook = lambda _module, _args, kwargs: seen.append(kwargs["timestep"][0])  # noqa: E731
    policy.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_told_the_pipelines_times(make, family, dtype):
    """In bf16 to the bit; in fp32 up to the last bits: ours is rounded from float64."""
    policy = make(family, dtype)
    conditioning, seen = policy.encode(PROMPTS), told(policy)
    images(policy, 28)
    theirs, last_bits = torch.stack(seen), 2.4e-7 if dtype == torch.float32 else 0
    seen.clear()
    for sigma in transitions(policy.sigmas(28), "ode").column("model_sigma"):
        with torch.no_grad():
            policy.velocity(latents(policy), sigma.expand(len(PROMPTS)), conditioning)
    ours = torch.stack(seen)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=last_bits, atol=0)


def test_sd3_schedule_follows_the_scheduler(make):
    policy = make("sd3")
    scheduler = policy.pipeline.scheduler
    policy.pipeline.scheduler = scheduler.from_config(scheduler.config, shift=5.0)
    test_schedule_is_the_pipelines(policy, 4)


def test_latent_shape(policy, family):
    expected = {"flux": (16 * 12 // 4, 16), "sd3": (4, 16, 12)}[family]  # the VAE halves the size
    assert policy.latent_shape == expected
    assert velocity(policy).shape == (len(PROMPTS), *expected)


def test_velocity_depends_on_every_input(policy):
    x, sigma, conditioning = latents(policy), torch.full((3,), 0.5), policy.encode(PROMPTS)
    with torch.no_grad():
        base = policy.velocity(x, sigma, conditioning)
        for changed in (
            policy.velocity(x.roll(1, 0), sigma, conditioning),
            policy.velocity(x, sigma + 0.2, conditioning),
            *(
                policy.velocity(x, sigma, {**conditioning, name: tensor.roll(1, 0) + 0.1})
                for name, tensor in conditioning.items()
            ),
        ):
            assert ((changed - base).flatten(1).abs().amax(1) > 1e-4).all()


def test_rows_do_not_see_each_other(policy):
    conditioning, sigma = policy.encode(PROMPTS), torch.tensor([0.9, 0.5, 0.1])
    together = velocity(policy)
    for row in range(3):
        with torch.no_grad():
            alone = policy.velocity(
                latents(policy)[row : row + 1],
                sigma[row : row + 1],
                rows_of(conditioning, torch.tensor([row])),
            )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_encoding_together_is_encoding_alone(policy):
    together = policy.encode(PROMPTS)
    assert all(len(tensor) == len(PROMPTS) for tensor in together.values())
    assert (together["text"][0] - together["text"][1]).abs().max() > 0.1
    assert (together["pooled"][0] - together["pooled"][1]).abs().max() > 0.1
    for row, prompt in enumerate(PROMPTS):
        for name, alone in policy.encode([prompt]).items():
            torch.testing.assert_close(together[name][row : row + 1], alone, rtol=0, atol=2e-6)


def test_encoding_is_the_pipelines(make, family):
    """Images from texts, by the pipeline's own way from a prompt to an image."""
    policy = make(family, guidance=4.5)
    expected = policy.pipeline(
        PROMPTS,
        latents=latents(policy),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=3,
        guidance_scale=4.5,
        max_sequence_length=8,
        output_type="pt",
    ).images
    torch.testing.assert_close(images(policy), expected, rtol=0, atol=5e-6)


def test_text_tokens(make, family):
    clip = {"flux": 0, "sd3": 8}[family]  # SD3 puts CLIP's tokens before T5's
    for tokens in (5, 8):
        policy = make(family, text_tokens=tokens)
        assert policy.encode(PROMPTS)["text"].shape[1] == clip + tokens
        assert velocity(policy).isfinite().all()


def test_decode_is_differentiable(policy):
    x = latents(policy).requires_grad_()
    decoded = policy.decode(x)
    assert decoded.shape == (3, 3, HEIGHT, WIDTH)
    assert decoded.min() >= 0 and decoded.max() <= 1
    decoded[0].sum().backward()
    assert x.grad is not None and x.grad[0].abs().max() > 1e-3
    assert not x.grad[1:].any()


def test_bfloat16(make, family):
    """Model, texts and velocities in bf16, images in fp32, near those of fp32."""
    policy, exact = make(family, torch.bfloat16), make(family)
    assert {t.dtype for t in policy.encode(PROMPTS).values()} == {torch.bfloat16}
    v = velocity(policy)
    assert v.dtype == torch.bfloat16
    torch.testing.assert_close(v.float(), velocity(exact), rtol=0, atol=0.1)
    decoded = policy.decode(latents(policy))
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(images(policy), images(exact), rtol=0, atol=0.1)


# SD3's guidance ----------------------------------------------------------------------------------


def test_sd3_guided_velocity(make):
    guided, plain = make("sd3", guidance=3.0), make("sd3", guidance=1.0)
    text = guided.encode(PROMPTS)
    assert set(plain.encode(PROMPTS)) == {"text", "pooled"}
    for name, tensor in plain.encode([""] * 3).items():
        torch.testing.assert_close(text[f"negative_{name}"], tensor, rtol=0, atol=2e-6)
    x, sigma = latents(plain), torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        positive = plain.velocity(x, sigma, plain.encode(PROMPTS))
        negative = plain.velocity(x, sigma, plain.encode([""] * 3))
    assert (positive - negative).abs().max() > 1e-3
    torch.testing.assert_close(
        velocity(guided), negative + 3.0 * (positive - negative), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize(("guidance", "rows"), [(0.0, 3), (1.0, 3), (1.5, 6)])
def test_sd3_calls_the_transformer_once(make, guidance, rows):
    policy, seen = make("sd3", guidance=guidance), []
    hook = lambda _module, _args, kwargs: seen.append(kwargs)  # noqa: E731
    policy.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    velocity(policy)
    assert [len(call["hidden_states"]) for call in seen] == [rows]
    expected = torch.tensor([900.0, 500.0, 100.0]).repeat(rows // 3)
    torch.testing.assert_close(seen[0]["timestep"], expected, rtol=1e-6, atol=0)


def test_sd3_gradient_flows_through_both_branches(make):
    policy = make("sd3", guidance=3.0)
    text = {n: t.clone().requires_grad_() for n, t in policy.encode(PROMPTS).items()}
    policy.velocity(latents(policy), torch.full((3,), 0.5), text).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 1e-4 for t in text.values())


# LoRA --------------------------------------------------------------------------------------------


def test_lora_starts_as_the_model_itself(make, family):
    policy = make(family)
    before = velocity(policy)
    assert not policy.trainable()
    state = torch.random.get_rng_state()
    policy.train_lora(rank=4, alpha=8, targets=None, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(velocity(policy), before)
    randomise(policy)
    assert (velocity(policy) - before).abs().max() > 1e-2


def test_lora_alone_trains(make, family):
    policy = make(family)
    policy.train_lora(rank=4, alpha=8, targets=None, seed=5)
    trainable = policy.trainable()
    parts = {part for n in trainable for part in ("lora_A", "lora_B") if f".{part}." in n}
    assert parts == {"lora_A", "lora_B"} and all(".lora_" in n for n in trainable)
    hit = {n.rpartition(".lora_")[0] for n in trainable}
    for target in policy.lora_targets:  # no entry of the list is idle
        assert any(n == target or n.endswith(f".{target}") for n in hit), target
    randomise(policy)
    v = policy.velocity(latents(policy), torch.full((3,), 0.5), policy.encode(PROMPTS))
    v.square().sum().backward()
    for part in policy.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            assert not part.training
            for name, parameter in part.named_parameters():
                trained = part is policy.transformer and name in trainable
                assert parameter.requires_grad == trained, name
                assert (parameter.grad is not None) == trained, name


def test_lora_is_a_function_of_the_seed(make, family):
    weights = []
    for seed in (5, 5, 6):
        policy = make(family)
        torch.rand(seed)  # wherever the global generator stands
        policy.train_lora(rank=4, alpha=8, targets=None, seed=seed)
        weights.append(policy.trainable())
    first, again, other = weights
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        is_a = ".lora_A." in name  # B is zero
        assert torch.equal(parameter, other[name]) != is_a
        assert bool(parameter.any()) == is_a


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [[30, 32], [32, 30]])
def test_size_must_fit_the_patches(make, family, size):
    with pytest.raises(ValueError, match=r"size.*multiple of 4 pixels"):
        make(family, size=size)


@pytest.mark.parametrize("size", [[32], [32, 32, 32], [32.0, 32], "32x32", [0, 32], [-16, 32]])
def test_size_is_two_positive_integers(make, family, size):
    with pytest.raises(ValidationError, match="size"):
        make(family, size=size)


@pytest.mark.parametrize("path", ["./missing", "missing", "builtin:missing", "a/b/c", "/missing/x"])
def test_missing_folder(make, family, path):
    with pytest.raises(ValidationError, match="no such folder"):
        make(family, path=path)


def test_folder_of_something_else(make, family, tmp_path):
    with pytest.raises(ValidationError, match=r"no model_index\.json"):
        make(family, path=str(tmp_path))


@pytest.mark.parametrize(
    "wrong", [{"guidance": -1.0}, {"text_tokens": 0}, {"text_tokens": 513}, {"family": "other"},
              {"guidnace": 3.0}]
)  # fmt: skip
def test_settings_out_of_range(make, family, wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        make(family, **wrong)
