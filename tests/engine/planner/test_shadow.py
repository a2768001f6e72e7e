"""The model on fake tensors costs what the real one does, whatever is left out of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gardo.config import load
from gardo.loading import build_policy
from gardo.planner import shadow as module
from gardo.planner.live import CPU_ATTENTION, LiveBytes
from gardo.planner.scorers import scorer
from gardo.planner.shadow import Shadow, model_folder
from gardo.recipe import reward_plugin, reward_settings
from tests import ROOT

RECIPES = {"flux": "tiny_flux_gardo", "sd3": "tiny_sd3_gardo"}
ROWS = 3
FULL = "train.weights={kind: full}"


@pytest.fixture(scope="module", params=[("flux", "lora"), ("flux", "full"), ("sd3", "lora")],
                ids="-".join)  # fmt: skip
def pair(request):
    """The shadow of a tiny recipe, and the real policy."""
    family, weights = request.param
    more = [FULL] if weights == "full" else []
    recipe = load(ROOT / "recipes" / f"{RECIPES[family]}.yaml", more)
    policy = build_policy(recipe, torch.device("cpu"))
    policy.load_transformer()
    return Shadow(recipe), policy


def inputs(policy, rows):
    shapes = policy.conditioning_shapes()
    text = {name: torch.zeros(rows, *shape) for name, shape in shapes.items()}
    return torch.zeros(rows, *policy.latent_shape), torch.full((rows,), 0.5), text


def peak_of(policy, call):
    known = [*policy.transformer.parameters(), *policy.transformer.buffers(),
             *policy.pipeline.vae.parameters()]  # fmt: skip
    with LiveBytes(known) as live:
        call()
    return live.peak


def test_sizes(pair):
    shadow, policy = pair
    assert shadow.parameters == sum(p.numel() for p in policy.transformer.parameters())
    assert shadow.buffer_bytes == sum(b.nbytes for b in policy.transformer.buffers())
    assert shadow.trainable == sum(p.numel() for p in policy.trainable().values())
    parts = policy.pipeline.components
    assert shadow.vae_parameters == sum(p.numel() for p in parts["vae"].parameters())
    assert {name: count for name, (count, _) in shadow.encoders.items()} == {
        name: sum(p.numel() for p in part.parameters())
        for name, part in parts.items()
        if name.startswith("text_encoder")
    }


def test_conditioning_has_the_shapes_that_encode_gives(pair):
    shadow, policy = pair
    given = policy.encode(["one red circle", "two blue squares"])
    assert {n: tuple(t.shape[1:]) for n, t in given.items()} == shadow.policy.conditioning_shapes()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "matmuls", "full"])
def test_training_takes_what_it_takes_for_real(pair, checkpointing):
    shadow, policy = pair
    policy.transformer.disable_gradient_checkpointing()
    policy.checkpoint_activations(checkpointing)
    trained = policy.trainable().values()
    handles = [p.register_post_accumulate_grad_hook(module._drop_gradient) for p in trained]

    def step():
        policy.velocity(*inputs(policy, ROWS)).float().square().mean().backward()

    real = peak_of(policy, step)
    for handle in handles:
        handle.remove()
    policy.transformer.disable_gradient_checkpointing()
    assert shadow.training_bytes(ROWS, checkpointing) == pytest.approx(real, rel=0.02)


def test_forward_passes_take_what_they_take_for_real(pair):
    shadow, policy = pair
    with torch.no_grad():
        sampled = peak_of(policy, lambda: policy.branches(*inputs(policy, ROWS)))
        decoded = peak_of(policy, lambda: policy.decode(inputs(policy, ROWS)[0]))
    assert shadow.sampling_bytes(ROWS) == pytest.approx(sampled, rel=0.02)
    assert shadow.decoding_bytes(ROWS) == pytest.approx(decoded, rel=0.02)


def test_flops_are_the_counters(pair):
    shadow, policy = pair
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as forward, torch.no_grad():
        policy.velocity(*inputs(policy, 1))
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as both:
        policy.velocity(*inputs(policy, 1)).float().sum().backward()
    policy.transformer.zero_grad()
    assert shadow.flops(backward=False) == forward.get_total_flops()
    assert shadow.flops(backward=True) == both.get_total_flops()
    ops = [op for counted in both.get_flop_counts().values() for op in counted]
    assert any("attention" in str(op) and "backward" in str(op) for op in ops)


def costs(shadow):
    return shadow.training_bytes(1, "full"), shadow.sampling_bytes(1), shadow.flops(backward=True)


def test_deeper_models_cost_more_of_the_same(monkeypatch):
    """FLUX.1-dev from one more block of a kind: the same."""
    shadow = Shadow(load(ROOT / "recipes/flux_gardo_hpsv2.yaml", prompts=False))
    few = costs(shadow)
    monkeypatch.setattr(module, "KEPT", module.KEPT + 1)
    monkeypatch.setattr(module, "COUNTED", module.COUNTED + 1)
    assert costs(shadow) == pytest.approx(few, rel=1e-3)
    assert shadow.parameters - shadow.trainable == 11_901_408_320  # as published


@pytest.mark.parametrize(
    ("path", "family", "parameters"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", "sd3", 2_243_171_520),
        ("stabilityai/stable-diffusion-3.5-large", "sd3", 8_056_627_520),
    ],
)
def test_what_ships_of_a_hub_id_needs_no_download(path, family, parameters):
    recipe = load(ROOT / "recipes/sd3_gardo_geneval.yaml", [f"model.path={path}", FULL],
                  prompts=False)  # fmt: skip
    assert model_folder(path).is_dir()
    assert Shadow(recipe).parameters == parameters


def test_an_unknown_hub_id_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"model\.path: .*'nobody/nothing'"):
        model_folder("nobody/nothing")


def test_nothing_fake_stays_behind():
    """transformers remembers DINOv3's coordinates from call to call."""
    recipe = load(ROOT / "recipes/tiny_flux_gardo.yaml")
    settings = reward_settings(recipe)["dinov3"]
    pictures = torch.rand(2, 3, 32, 32)
    assert scorer(settings).activations > 0
    real = reward_plugin(settings)(settings, torch.device("cpu"))
    assert real.score(pictures, []).isfinite().all()
