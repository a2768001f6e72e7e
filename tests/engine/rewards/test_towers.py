"""Rewards of a panel that run the same weights have one copy of them, and say the same."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gardo import plugins
from gardo.planner.scorers import own_weights, scorer
from gardo.rewards.assembly import load_rewards
from gardo.rewards.base import RewardSettings
from gardo.rewards.panel import Panel
from tests.engine.rewards.clip_models import CPU, PROMPTS, pictures


def settings_of(kind: str, role: str = "auxiliary", **fields: Any) -> RewardSettings:
    made: RewardSettings = plugins.resolve("gardo.rewards", kind).Settings(
        kind=kind, role=role, **fields
    )
    return made


def panel_of(clip_folder: Path, geneval_folder: Path) -> dict[str, RewardSettings]:
    """Five that run one CLIP folder, GenEval's colours among them."""
    clip = str(clip_folder)
    pick: dict[str, Any] = {"path": clip, "tokenizer": clip}
    return {
        "aesthetic": settings_of("aesthetic", path=clip, head=clip, head_file="head.pth"),
        "clipscore": settings_of("clipscore", role="proxy", path=clip),
        "geneval": settings_of(
            "geneval", path=str(geneval_folder / "detector"), clip=clip, size=64
        ),
        "pickscore": settings_of("pickscore", **pick),
        "preference": settings_of(
            "preference", judge=settings_of("pickscore", role="held_out", **pick)
        ),
    }


def models_of(reward: Any) -> list[nn.Module]:
    of = {
        "aesthetic": lambda: [reward.model],
        "geneval": lambda: [reward.colours.model],
        "preference": lambda: [reward.reward.clip.model],
    }
    return of.get(reward.settings.kind, lambda: [reward.clip.model])()


def storages(modules: Iterable[nn.Module]) -> set[int]:
    return {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}


ORDERS = [("aesthetic", "clipscore"), ("clipscore", "aesthetic"),
          ("preference", "geneval", "aesthetic", "pickscore", "clipscore"),
          ("geneval", "clipscore", "pickscore", "aesthetic", "preference")]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_a_tower_is_there_once_in_any_order(
    clip_folder: Path, geneval_folder: Path, order: tuple[str, ...]
) -> None:
    every = panel_of(clip_folder, geneval_folder)
    loaded = load_rewards({name: every[name] for name in order}, CPU)
    models = {name: models_of(reward)[0] for name, reward in loaded.items()}
    for one, other in itertools.combinations(models.values(), 2):
        for part in ("vision_model", "visual_projection"):
            assert getattr(one, part) is getattr(other, part)
    whole = [m for name, m in models.items() if name != "aesthetic"]
    assert len({id(model.text_model) for model in whole}) == 1
    towers = [part for model in models.values() for part in model.children()]
    assert storages(towers) == storages(whole[0].children())
    assert not any(p.requires_grad for model in models.values() for p in model.parameters())
    assert not any(module.training for model in models.values() for module in model.modules())


def test_scores_are_the_same_bits(clip_folder: Path, geneval_folder: Path) -> None:
    every = panel_of(clip_folder, geneval_folder)
    del every["geneval"]  # it scores its own prompts; its CLIP is looked at below
    images = pictures(3)
    shared = load_rewards(every, CPU)
    for name, settings in every.items():
        (alone,) = load_rewards({name: settings}, CPU).values()
        assert not storages(models_of(alone)) & storages(models_of(shared[name]))
        assert torch.equal(shared[name].score(images, PROMPTS), alone.score(images, PROMPTS)), name


def test_colours_are_the_same_bits(clip_folder: Path, geneval_folder: Path) -> None:
    every = panel_of(clip_folder, geneval_folder)
    shared = load_rewards({n: every[n] for n in ("aesthetic", "clipscore", "geneval")}, CPU)
    (alone,) = load_rewards({"geneval": every["geneval"]}, CPU).values()
    for judges in (shared["geneval"], alone):
        assert isinstance(judges, plugins.resolve("gardo.rewards", "geneval"))
    with torch.no_grad():
        one, other = (r.colours.texts("dog") for r in (shared["geneval"], alone))  # type: ignore[attr-defined]
    assert torch.equal(one, other)


def test_a_proxy_with_gradients_leaves_the_shared_tower_frozen(
    clip_folder: Path, geneval_folder: Path
) -> None:
    every = panel_of(clip_folder, geneval_folder)
    panel = Panel(load_rewards({n: every[n] for n in ("aesthetic", "clipscore")}, CPU))
    before = [p.clone() for p in models_of(panel.rewards["aesthetic"])[0].parameters()]
    images = pictures(2).requires_grad_()
    panel.differentiable_score(images, PROMPTS[:2]).sum().backward()  # type: ignore[arg-type]
    assert images.grad is not None and float(images.grad.abs().sum()) > 0
    for reward in panel.rewards.values():
        assert all(
            p.grad is None and not p.requires_grad for p in models_of(reward)[0].parameters()
        )
    after = models_of(panel.rewards["aesthetic"])[0].parameters()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    "other",
    [{"dtype": "bfloat16"}, {"revision": "other"}, {"path": "copy"}],
)
def test_other_weights_are_not_shared(
    clip_folder: Path, tmp_path: Path, other: dict[str, str]
) -> None:
    if "path" in other:
        other = {"path": str(tmp_path)}
        for file in clip_folder.iterdir():
            (tmp_path / file.name).symlink_to(file)
    one = settings_of("clipscore", path=str(clip_folder))
    two = settings_of("clipscore", **{"path": str(clip_folder), **other})
    loaded = load_rewards({"one": one, "two": two}, CPU)
    assert not storages(models_of(loaded["one"])) & storages(models_of(loaded["two"]))


def test_the_precision_of_products_alone_is_no_other_copy(clip_folder: Path) -> None:
    """tf32 and float32 are the same weights."""
    settings = {
        dtype: settings_of("clipscore", path=str(clip_folder), dtype=dtype)
        for dtype in ("tf32", "float32")
    }
    one, two = (models_of(r)[0] for r in load_rewards(settings, CPU).values())
    assert one.vision_model is two.vision_model


def test_two_panels_share_nothing_and_leave_nothing(clip_folder: Path) -> None:
    settings = {"one": settings_of("clipscore", path=str(clip_folder))}
    first, second = (load_rewards(settings, CPU) for _ in range(2))
    assert not storages(models_of(first["one"])) & storages(models_of(second["one"]))
    tower = weakref.ref(models_of(first["one"])[0].vision_model)
    del first
    gc.collect()
    assert tower() is None


def test_hpsv2_shares_with_itself_alone(clip_folder: Path) -> None:
    """Its `base` gives no weights, so a reward that runs those has others."""
    clip = str(clip_folder)
    settings = {
        "hps": settings_of("hpsv2", path=clip, base=clip),
        "judge": settings_of("hpsv2", path=clip, base=clip),
        "old": settings_of("hpsv2", path=clip, base=clip, version="v2"),
        "clip": settings_of("clipscore", path=clip),
    }
    models = {name: models_of(reward)[0] for name, reward in load_rewards(settings, CPU).items()}
    assert models["hps"].text_model is models["judge"].text_model
    assert len({id(model.text_model) for model in models.values()}) == 3


def test_the_plan_counts_a_shared_tower_once(clip_folder: Path, geneval_folder: Path) -> None:
    """As many bytes as the loaded panel has, in either order."""
    every = panel_of(clip_folder, geneval_folder)
    del every["geneval"]  # its detector's class is another than the planner's
    for names in (list(every), list(every)[::-1]):
        settings = {name: every[name] for name in names}
        counted = own_weights({name: scorer(s) for name, s in settings.items()})
        loaded = load_rewards(settings, CPU)
        towers = {id(p): p for r in loaded.values() for m in models_of(r) for p in m.parameters()}
        scales = 2 * 4  # of PickScore and its judge: each has its own, the plan one
        assert abs(sum(counted.values()) - 4 * sum(p.numel() for p in towers.values())) <= scales
    alone = {name: scorer(s) for name, s in every.items()}
    assert sum(s.weights for s in alone.values() if s) > 2 * sum(counted.values())


def test_the_plan_knows_what_hpsv2_does_not_share(clip_folder: Path) -> None:
    clip = str(clip_folder)
    both = {
        "hps": scorer(settings_of("hpsv2", path=clip, base=clip)),
        "clip": scorer(settings_of("clipscore", path=clip)),
    }
    counted = own_weights(both)
    assert counted["hps"] == counted["clip"] > 0
