"""Attention backends: which can be named, what says no, and that the model does what it is told."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_dispatch as dispatcher
from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

from gardo.config import load
from gardo.machine import check_machine
from gardo.policies.attention import BACKENDS, check_name, check_settings, missing, use_attention
from gardo.recipe_errors import RecipeError
from tests import ROOT
from tests.engine.policies.built_in import CPU, Calls, built_in, sampled, trained

FUSED = "_scaled_dot_product_flash_attention_for_cpu"
TRAINS = [name for name, backend in BACKENDS.items() if backend.backward]
HERE = [name for name in TRAINS if BACKENDS[name].gpu is None]
MODES = ("none", "selective", "matmuls", "full")


# ---- the table -----------------------------------------------------------------------------------


def test_the_dispatcher_has_every_backend():
    names = {member.value for member in dispatcher._AttentionBackendRegistry.list_backends()}
    assert {backend.dispatched for backend in BACKENDS.values()} <= names


def test_flash_3_of_diffusers_has_no_gradient():
    """If it gets one, its row can say so."""
    assert dispatcher._wrapped_flash_attn_3._backward_fn is None


@pytest.mark.parametrize("name", ["sage", "_flash_3"])
def test_what_cannot_train_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"no backward pass.*use one of native, .*flash_4"):
        check_name(name)


def test_no_such_attention():
    with pytest.raises(ValueError, match=r"no such attention; use one of native"):
        check_name("flash_5")


@pytest.mark.parametrize("name", TRAINS)
def test_what_a_backend_asks_of_the_recipe(name):
    backend = BACKENDS[name]
    for precision in ("float32", "bfloat16"):
        for deterministic in (False, True):
            given = {"precision": precision, "deterministic": deterministic}
            if backend.half and precision == "float32":
                with pytest.raises(ValueError, match=rf"{name} takes no float32; use .*bfloat16"):
                    check_settings(name, **given)
            elif deterministic and not backend.deterministic:
                with pytest.raises(ValueError, match=rf"{name} has no deterministic backward"):
                    check_settings(name, **given)
            else:
                check_settings(name, **given)


# ---- this machine --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINS)
def test_without_a_gpu(name):
    lacks = missing(name, CPU)
    assert (lacks == "") == (name in HERE)
    assert (
        not lacks
        or "GPU" in lacks
        or f"not installed; pip install -e '.[{BACKENDS[name].extra}]'" in lacks
    )


def test_a_session_refuses_before_anything_loads():
    recipe = load(ROOT / "recipes/tiny_flux_gardo.yaml", ["model.attention=flex"])
    with pytest.raises(RecipeError) as refused:
        check_machine(recipe, 1, CPU, "my.yaml")
    assert str(refused.value) == (
        "my.yaml: model.attention: flex: needs an NVIDIA GPU, this run is on the cpu; "
        "`gardo doctor` says which attention runs here"
    )


# ---- the model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["flux-lora", "flux-full", "sd3-lora"])
def policy(request):
    return built_in(*request.param.split("-"))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("mode", MODES)
def test_training_sees_the_velocities_of_sampling(policy, name, mode):
    """The ratio of policies is exactly 1 before the first step, whatever is kept."""
    use_attention(policy.transformer, name)
    out, _ = trained(policy, mode)
    assert torch.equal(out, sampled(policy))


def test_native_is_what_diffusers_does_by_itself(policy):
    fresh = built_in(policy.settings.family, "full" if policy.lora is None else "lora")
    use_attention(policy.transformer, "native")
    (out, gradients), (expected, theirs) = trained(policy), trained(fresh)
    assert torch.equal(out, expected) and gradients.keys() == theirs.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in theirs.items())


@pytest.mark.parametrize("name", HERE[1:])
def test_backends_agree(policy, name):
    use_attention(policy.transformer, "native")
    expected, theirs = trained(policy)
    use_attention(policy.transformer, name)
    out, gradients = trained(policy)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)  # fp32, 4 blocks
    for one, two in zip(gradients.values(), theirs.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * float(two.abs().max()))


def test_no_attention_goes_past_the_dispatcher(policy):
    """SD3's own calls torch whatever it is told; the second attention of its blocks too."""
    counts = {}
    for name in HERE:
        use_attention(policy.transformer, name)
        with Calls() as seen:
            sampled(policy)
        counts[name] = seen.of.get(FUSED, 0)
    assert counts["native"] >= len(policy.blocks())
    assert counts["_native_math"] == 0


def test_an_attention_that_cannot_be_chosen():
    transformer = built_in("sd3").transformer
    transformer.set_attn_processor(PAGJointAttnProcessor2_0())
    with pytest.raises(ValueError, match="PAGJointAttnProcessor2_0 does not let its attention be"):
        use_attention(transformer, "native")


def test_a_mask_is_not_dropped():
    transformer = built_in("sd3").transformer
    use_attention(transformer, "native")
    attn = transformer.transformer_blocks[0].attn2
    x_BLD = torch.randn(2, 6, attn.query_dim, generator=torch.Generator().manual_seed(0))
    mask_BL = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    whole, masked = attn(x_BLD), attn(x_BLD, attention_mask=mask_BL)
    torch.testing.assert_close(whole[0], masked[0], rtol=0, atol=1e-6)
    assert (whole[1] - masked[1]).abs().max() > 1e-4


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["flux", "sd3"])
def on_gpu(request):
    """In fp32 for the expected numbers, and in bf16."""
    gpu = torch.device("cuda")
    return {
        dtype: built_in(request.param, device=gpu, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRAINS)
def test_on_a_gpu(on_gpu, name):
    """Near native fp32, forward and backward, and the same bits in sampling and training."""
    if lacks := missing(name, torch.device("cuda")):
        pytest.skip(lacks)
    exact, policy = on_gpu.values()
    use_attention(exact.transformer, "native")
    use_attention(policy.transformer, name)
    (expected, theirs), (out, gradients) = trained(exact), trained(policy)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1)  # as the CPU's bf16 test
    for key, gradient in gradients.items():
        error = (gradient.float() - theirs[key]).norm()
        assert error <= 0.1 * theirs[key].norm() + 1e-6, key
    for mode in MODES:
        out, _ = trained(policy, mode)
        assert torch.equal(out, sampled(policy)), mode


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in TRAINS if BACKENDS[name].deterministic])
def test_deterministic_gradients_on_a_gpu(on_gpu, name, monkeypatch):
    """The same bits twice, where torch is told as a session tells it."""
    if lacks := missing(name, torch.device("cuda")):
        pytest.skip(lacks)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    policy = on_gpu[torch.bfloat16]
    use_attention(policy.transformer, name, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (trained(policy)[1] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[key], gradient) for key, gradient in second.items())
