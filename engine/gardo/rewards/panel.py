"""All rewards of a recipe, scored together: values, masks, and what trains.

Shapes: B images of this rank, float32 [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gardo.lazily import no_grad
from gardo.rewards.base import Gathering, Pending, Reward, Role, provides, within
from gardo.types import Phase, Prompt, Scores, no_phase

if TYPE_CHECKING:
    from torch import Tensor


class Panel:
    """All rewards of a recipe, scored together."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = dict(rewards)
        self.phase: Phase = no_phase  # what measures them

    def close(self) -> None:
        for reward in self.rewards.values():
            reward.close()

    def costs(self) -> dict[str, dict[str, float]]:
        """Of the judges: what their questions have taken since this was asked last."""
        found = {name: reward.costs() for name, reward in self.rewards.items()}
        return {name: costs for name, costs in found.items() if costs is not None}

    def names(self, role: Role) -> tuple[str, ...]:
        return tuple(n for n, r in self.rewards.items() if r.settings.role == role)

    @no_grad
    def __call__(
        self,
        images_B3HW: Tensor,
        prompts: Sequence[Prompt],
        *,
        sample_B: Tensor,
        group_B: Tensor,
        seed: int = 0,
        step: int = 0,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        said: Mapping[str, Tensor | Pending] | None = None,
    ) -> Scores:
        """Scores of this rank's images; non-finite values are masked. All ranks call it.

        Held-out rewards are scored in the steps that their `every` divides. What `alone` has
        `said` of these images is not asked again; what it has begun is waited for.
        """
        place = Gathering(sample_B, group_B, seed, step, gather)
        said = {**self._begun(images_B3HW, prompts, step, but=said or ()), **(said or {})}
        answers = {}
        for name, reward in self._due(step).items():
            ask = partial(reward.score_together, images_B3HW, prompts, place)
            answers[name] = said[name] if name in said else self._asked(name, ask, len(prompts))
        values: dict[str, Tensor] = {}
        features = None
        features_valid_B = torch.ones(len(prompts), dtype=torch.bool, device=images_B3HW.device)
        for name, answer in answers.items():
            if isinstance(answer, torch.Tensor):
                value = answer
            else:
                value = self._asked(name, answer, len(prompts), waits=True)
            if self.rewards[name].gives_features:
                features_valid_B = value.isfinite().all(-1)
                features = torch.where(features_valid_B[:, None], value.float(), 0.0)
            else:
                values[name] = value.float()
        masks = {name: value.isfinite() for name, value in values.items()}
        proxies = self.names("proxy")
        proxy_B = torch.stack([self.rewards[n].settings.weight * values[n] for n in proxies]).sum(0)
        needed = [masks[n] for n in (*proxies, *self.names("auxiliary"))]
        valid_B = torch.stack([*needed, features_valid_B]).all(0)
        return Scores(
            sample_B=sample_B,
            group_B=group_B,
            proxy_B=torch.where(valid_B, proxy_B, torch.zeros_like(proxy_B)),
            valid_B=valid_B,
            rewards=values,
            masks=masks,
            proxies={n: self.rewards[n].settings.weight for n in proxies},
            auxiliaries=self.names("auxiliary"),
            features_BD=features,
        )

    @no_grad
    def alone(
        self, images_B3HW: Tensor, prompts: Sequence[Prompt], step: int = 0
    ) -> dict[str, Tensor | Pending]:
        """What the rewards say that need no other image: some of a rank's images, no collective.

        Those elsewhere begin first and are not waited for.
        """
        said: dict[str, Tensor | Pending] = {**self._begun(images_B3HW, prompts, step)}
        for name, reward in self._due(step).items():
            if name not in said and not provides(type(reward), "score_together"):
                ask = partial(reward.score, images_B3HW, prompts)
                said[name] = self._asked(name, ask, len(prompts))
        return said

    def _begun(
        self,
        images_B3HW: Tensor,
        prompts: Sequence[Prompt],
        step: int,
        but: Collection[str] = (),
    ) -> dict[str, Pending]:
        """The rewards elsewhere, asked for these images."""
        asked = {n: r for n, r in self._due(step).items() if n not in but}
        begun = {n: r.begin(images_B3HW, prompts) for n, r in asked.items()}
        return {name: pending for name, pending in begun.items() if pending}

    def _due(self, step: int) -> dict[str, Reward]:
        return {n: r for n, r in self.rewards.items() if step % r.settings.every == 0}

    def _asked(
        self, name: str, ask: Callable[[], Tensor], count: int, *, waits: bool = False
    ) -> Tensor:
        """What a reward says of so many images, measured and in the reward's precision."""
        reward = self.rewards[name]
        kind = "features" if reward.gives_features else "reward"
        with self.phase("remote" if waits else kind, rows=count):
            return self._checked(name, ask, count)

    def score(self, name: str, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """What one reward says of images, [B], features [B, D]; with gradients, if it has any."""
        ask = partial(self.rewards[name].score, images_B3HW, prompts)
        return self._checked(name, ask, len(prompts))

    def _checked(self, name: str, ask: Callable[[], Tensor], count: int) -> Tensor:
        """The value of so many images. Whatever goes wrong in a reward names it."""
        reward = self.rewards[name]
        try:
            with reward.precision():
                value = ask()
        except Exception as error:
            error.add_note(f"rewards.{name}: {type(reward).__name__} failed")
            raise
        _check_shape(value, count, name, reward)
        return within(value, reward.limits)

    def differentiable_score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The weighted sum of the proxies with gradients to the images, fp32 [B]."""
        total = images_B3HW.new_zeros(len(images_B3HW))
        for name in self.names("proxy"):
            weight = self.rewards[name].settings.weight
            total = total + weight * self.score(name, images_B3HW, prompts)
        return total


def _check_shape(value: Any, count: int, name: str, reward: Reward) -> None:
    """A value [B, 1], for one, would make [B, B] of the proxies' sum."""
    dimensions = 1 + reward.gives_features
    if isinstance(value, torch.Tensor) and value.dim() == dimensions and len(value) == count:
        return
    given = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    wanted = f"[{count}, D]" if reward.gives_features else f"[{count}]"
    raise ValueError(
        f"rewards.{name}: {type(reward).__name__}.score gave {given}; it must give a tensor "
        f"{wanted}, NaN where an image has no value"
    )
