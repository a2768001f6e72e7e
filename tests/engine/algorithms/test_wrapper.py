"""A wrapper forwards everything; GARDO wraps once; a user's own wrapper works in a recipe."""

import inspect
import json
import sys
from types import FunctionType

import pytest
import torch

from gardo.algorithms import SamplerSettings, World, build
from gardo.algorithms.base import Algorithm, Needs, plugin_of
from gardo.algorithms.diffusion_nft import DiffusionNFTSettings
from gardo.algorithms.gardo import Gardo, GardoSettings, GateSettings
from gardo.algorithms.refl import ReFLSettings
from gardo.algorithms.wrapper import Wrapper
from gardo.config import load
from gardo.flow import sd3_sigmas
from gardo.planner import geometry
from gardo.recipe_errors import RecipeError
from tests import ROOT
from tests.engine.algorithms.linear_policy import LinearPolicy, context, roll, scores_of, whole

SAMPLER = SamplerSettings(steps=5, train_steps=3)
WORLD = World(sampler=SAMPLER, sigmas=sd3_sigmas(5), seed=1)
OWN = '''
from typing import Literal

from gardo.algorithms.wrapper import Wrapper, WrapperSettings


class HalvedSettings(WrapperSettings):
    factor: float = 0.5


class Halved(Wrapper):
    """Scales the base's loss; all else is the base's."""

    Settings = HalvedSettings

    def loss(self, ctx, batch):
        loss, metrics = super().loss(ctx, batch)
        return self.settings.factor * loss, metrics
'''


def public(kind):
    """The names of a class's own methods and properties."""
    kinds = (FunctionType, classmethod, property)
    return {n for n, v in vars(kind).items() if isinstance(v, kinds) and not n.startswith("_")}


PROTOCOL = sorted(public(Algorithm))
CLASS_METHODS = [n for n in PROTOCOL if isinstance(vars(Algorithm)[n], classmethod)]
PROPERTIES = [n for n in PROTOCOL if isinstance(vars(Algorithm)[n], property)]
METHODS = [n for n in PROTOCOL if n not in (*CLASS_METHODS, *PROPERTIES)]


class Said:
    """Stands where the base is, and tells who was called with what."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, method):
        return lambda *given: (method, given)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_the_bases(name):
    wrapper = build({"name": "gardo", "base": {"name": "flow_grpo", "beta": 0.1}}, WORLD)
    wrapper.base = Said(name)
    count = len(inspect.signature(getattr(Algorithm, name)).parameters) - 1
    given = tuple(object() for _ in range(count))
    if name == "state_dict":
        assert Wrapper.state_dict(wrapper) == {"base": ("state_dict", ())}
    elif name == "load_state_dict":
        seen = []
        wrapper.base.load_state_dict = seen.append
        Wrapper.load_state_dict(wrapper, {"base": "its state"})
        assert seen == ["its state"]
    else:
        said = getattr(Wrapper, name)(wrapper, *given)
        assert said in ((name, given), None)
        assert (said is None) == (name in ("after_update", "reference_reset"))


def test_every_public_name_is_forwarded():
    assert public(Wrapper) == set(PROTOCOL)
    assert set(CLASS_METHODS) == {"needs", "rows_per_sample", "slots_of", "check"}
    assert PROPERTIES == ["has_kl"]


def test_calls_without_an_answer_reach_the_base():
    wrapper = build({"name": "gardo", "base": {"name": "flow_grpo", "beta": 0.1}}, WORLD)
    called = []
    wrapper.base.after_update = lambda slots: called.append(slots)
    wrapper.base.reference_reset = lambda: called.append("reset")
    wrapper.after_update("slots")
    wrapper.reference_reset()
    assert called == ["slots", "reset"]


@pytest.mark.parametrize(
    ("base", "rows", "slots", "needs"),
    [
        (ReFLSettings(), 1, (), Needs(differentiable=True)),
        (DiffusionNFTSettings(), 3, ("old", "reference"),
         Needs(images_per_prompt=2, teachers={"old": 1.0, "reference": 1.0})),
        (DiffusionNFTSettings(beta=0), 3, ("old",),
         Needs(images_per_prompt=2, teachers={"old": 1.0})),
    ],
)  # fmt: skip
def test_class_methods_answer_for_the_base(base, rows, slots, needs):
    for settings in (base, GardoSettings(base=base), GardoSettings(base=base).model_copy()):
        plugin = plugin_of(settings)
        assert plugin.rows_per_sample(settings, SAMPLER) == rows
        assert plugin.slots_of(settings) == slots
        assert plugin.needs(settings) == needs
        algorithm = build(settings, WORLD)
        assert algorithm.slots == slots and algorithm.has_kl == ("reference" in slots)
    with pytest.raises(ValueError, match="train_steps: 6 times of 5 steps"):
        plugin = plugin_of(GardoSettings(base=DiffusionNFTSettings()))
        plugin.check(
            GardoSettings(base=DiffusionNFTSettings()), SamplerSettings(steps=5, train_steps=6)
        )


def test_a_wrappers_needs_are_added_to_the_bases():
    settings = GardoSettings(base=DiffusionNFTSettings(), gate=GateSettings())
    outer = plugin_of(settings).needs(settings).inside("base")
    assert [(need.role, need.field) for need in outer.rewards] == [("auxiliary", "base.gate")]
    assert outer.images_per_prompt == 2
    assert outer.teachers == {"old": 1.0, "reference": 0.1}  # asked at the gated rows alone


def test_gardo_around_gardo_is_refused():
    inner = {"name": "gardo", "base": {"name": "flow_grpo", "beta": 0.1}}
    with pytest.raises(ValueError, match="one KL would have two gates"):
        build({"name": "gardo", "base": inner}, WORLD)


# ---- a wrapper of one's own ---------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "halved.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "halved:Halved"
    sys.modules.pop("halved", None)


def loss_of(algorithm, policy):
    rollout = roll(policy, algorithm)
    credit = algorithm.credit(scores_of(rollout))
    points = algorithm.points(rollout, credit)
    batch = whole(points, credit, rollout)
    return algorithm.loss(context(policy), batch)[0]


@pytest.mark.parametrize("around", [False, True])
def test_it_is_built_inside_and_outside_of_gardo(own, around):
    """`loss` is its own, everything else the base's, in either order."""
    base, gate = {"name": "ddpo", "beta": 0.5}, {"limits": [0.0, 1.0], "fraction": 0.3}
    gardo = {"name": "gardo", "gate": gate}
    section = (
        {"name": own, "base": {**gardo, "base": base}}
        if around
        else {**gardo, "base": {"name": own, "base": base}}
    )
    algorithm, plain = build(section, WORLD), build({**gardo, "base": base}, WORLD)
    assert algorithm.slots == plain.slots == ("reference",) and algorithm.has_kl
    policy = LinearPolicy()
    for one in (algorithm, plain):
        rollout = roll(policy, one)
        scores = scores_of(rollout)
        judged = {"judge": scores.proxy_B.flip(0)}
        scores = type(scores)(**{**vars(scores), "rewards": judged, "auxiliaries": ("judge",)})
        one.seen = one.credit(scores)
    assert torch.equal(algorithm.seen.gate_B, plain.seen.gate_B) and algorithm.seen.gate_B.any()
    state = json.loads(json.dumps(algorithm.state_dict()))
    build(section, WORLD).load_state_dict(state)
    points = algorithm.points(rollout, algorithm.seen)
    batch = whole(points, algorithm.seen, rollout)
    ours, theirs = (one.loss(context(policy), batch)[0] for one in (algorithm, plain))
    assert ours == 0.5 * theirs != 0


def test_a_recipe_names_it(own):
    recipe = ROOT / "recipes/tiny_flux_gardo.yaml"
    plain = load(recipe)
    around = [f"algorithm={{name: '{own}', factor: 0.25, base: {{name: refl}}}}"]
    rewards = ["rewards={tiny_shape: {role: proxy}}"]
    checked = load(recipe, [*around, *rewards, "train.micro_batch=48"])
    assert checked.algorithm.factor == 0.25 and checked.algorithm.base.name == "refl"
    assert checked.rows_per_sample == 1  # ReFL's
    rows = geometry(checked, rank=0, world=1).rows
    assert rows == geometry(plain, rank=0, world=1).rows // plain.rows_per_sample
    with pytest.raises(RecipeError, match=r"rewards\.tiny_count: tiny_count has no gradient"):
        load(recipe, [*around, "rewards={tiny_count: {role: proxy}}"])
    with pytest.raises(RecipeError, match=r"algorithm\.base\.gate: needs rewards with role"):
        inside = "base: {name: gardo, gate: {}, base: {name: flow_grpo, beta: 1.0}}"
        load(recipe, [f"algorithm={{name: '{own}', {inside}}}", rewards[0]])
    with pytest.raises(RecipeError, match=r"Did you mean algorithm\.factor"):
        load(recipe, [f"algorithm={{name: '{own}', facter: 1, base: {{name: refl}}}}", rewards[0]])


def test_gardo_is_a_wrapper_that_mentions_its_mechanisms_alone():
    assert public(Gardo) == {
        "check", "needs", "measured", "credit", "after_update", "after_step", "state_dict",
        "load_state_dict",
    }  # fmt: skip
