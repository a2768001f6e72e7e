"""A recipe's rewards, each where the recipe wants it: here, in a worker, behind a URL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field

from gardo import plugins
from gardo.rewards._loading import one_copy_each
from gardo.rewards.base import Reward, RewardSettings
from gardo.rewards.judging.questions import Unanswered
from gardo.rewards.panel import Panel
from gardo.rewards.serving.calls import CallSettings
from gardo.rewards.serving.chat import OPENAI, reach
from gardo.rewards.serving.client import Remote, Server
from gardo.rewards.serving.line import Address, checked_url
from gardo.rewards.serving.wire import Pixels
from gardo.rewards.serving.workers import Worker, WorkerSettings
from gardo.settings import Strict
from gardo.types import Prompt

HERE, WORKER = "here", "worker"


class ScoringSettings(Strict):
    """Rewards that are not scored in the training process."""

    calls: CallSettings = Field(
        CallSettings(),
        description="how long a server is waited for, and how often it is asked again",
    )
    parallel: int = Field(4, ge=1, le=64, description="questions in flight to one server")
    pixels: Pixels = Field(
        "float32",
        description="how pictures travel; uint8: rounded to 8 bits, a quarter of the bytes",
    )
    together: bool = Field(
        False,
        description="lets a server compute the questions of several clients at once: faster, but "
        "the last bits then depend on who else asks",
    )
    max_failed: float = Field(
        0.25, ge=0, le=1, description="share of an iteration's images without a value of a reward "
        "that trains, above which its updates are left out (see train.bad_updates)",
    )  # fmt: skip
    workers: dict[str, WorkerSettings] = Field(
        {}, description="by name; `worker` is there without being named, on the CPU"
    )


Elsewhere = dict[str, RewardSettings]  # by the name that a server has for it


def elsewhere(rewards: Mapping[str, RewardSettings]) -> Elsewhere:
    """The rewards and judges that a worker or server scores; a judge is called REWARD.judge.

    Those of an OpenAI-compatible endpoint ask it themselves.
    """
    every = with_judges(rewards)
    own = {name for name, its in every.items() if its.where == HERE or its.where.startswith(OPENAI)}
    return {name: settings for name, settings in every.items() if name not in own}


def with_judges(rewards: Mapping[str, RewardSettings]) -> dict[str, RewardSettings]:
    """The rewards, and the judges inside them as REWARD.judge."""
    judges = {name: getattr(settings, "judge", None) for name, settings in rewards.items()}
    return {**rewards, **{f"{name}.judge": judge for name, judge in judges.items() if judge}}


def at_endpoints(rewards: Mapping[str, RewardSettings]) -> dict[str, RewardSettings]:
    """The rewards and judges that ask an OpenAI-compatible endpoint."""
    every = with_judges(rewards)
    return {name: its for name, its in every.items() if its.where.startswith(OPENAI)}


def reach_endpoints(rewards: Mapping[str, RewardSettings], where: str = "rewards.") -> None:
    """ValueError, opening with its field, for the first endpoint where nobody answers."""
    for name, settings in at_endpoints(rewards).items():
        its: Any = settings
        try:
            reach(its.url, its.model, its.calls)
        except Unanswered as error:
            raise ValueError(f"{where}{name}.where: {error}") from None


def meet_endpoints(
    rewards: Mapping[str, RewardSettings], *, prompt: Prompt, size: tuple[int, int]
) -> None:
    """Asks each endpoint what `assemble` asks it when all is loaded; nothing loads for it.

    ValueError, opening with its field.
    """
    for name, settings in at_endpoints(rewards).items():
        (judge,) = load_rewards({name: settings}, torch.device("cpu")).values()
        try:
            judge.meet(prompt, size)
        except ValueError as error:
            raise settings.error_at(f"rewards.{name}", error) from None
        finally:
            judge.close()


def worker_name(settings: RewardSettings) -> str | None:
    """Which of the run's workers scores it, if one does."""
    kind, _, name = settings.where.partition(":")
    return (name or WORKER) if kind == WORKER else None


def check_places(rewards: Mapping[str, RewardSettings], scoring: ScoringSettings) -> None:
    """ValueError, opening with the field, for a worker that is not there or has nothing to do."""
    used = set()
    for name, settings in elsewhere(rewards).items():
        worker = worker_name(settings)
        if not worker:
            try:
                checked_url(settings.where)
            except ValueError as error:
                raise ValueError(f"rewards.{name}.where: {error}") from None
        used.add(worker)
        if worker and worker not in {WORKER, *scoring.workers}:
            there = ", ".join({WORKER: None, **scoring.workers})
            raise ValueError(
                f"rewards.{name}.where: {settings.where}: there is no such worker; there are "
                f"{there}; add scoring.workers.{worker}: {{device: cpu}}"
            )
    for name in scoring.workers:
        if name not in used:
            raise ValueError(
                f"scoring.workers.{name}: no reward is scored there; give one "
                f"where: worker:{name}, or leave it out"
            )


@dataclass
class Workers:
    """The workers of this machine that this process has started."""

    running: dict[str, Worker] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        rewards: Mapping[str, RewardSettings],
        scoring: ScoringSettings,
        say: Callable[[str], object] = print,
        *,
        bf16_reductions: bool = False,
    ) -> Workers:
        asked: dict[str, dict[str, Any]] = {}
        for name, settings in elsewhere(rewards).items():
            if worker := worker_name(settings):
                asked.setdefault(worker, {})[name] = served_settings(settings)
        every = {WORKER: WorkerSettings(), **scoring.workers}
        return cls(
            {
                name: Worker(name, every[name], its, say, bf16_reductions=bf16_reductions)
                for name, its in asked.items()
            }
        )

    def addresses(self) -> dict[str, Address]:
        """By worker, once all have loaded. ValueError."""
        return {name: worker.address() for name, worker in self.running.items()}

    def close(self) -> None:
        for worker in self.running.values():
            worker.close()


def served_settings(settings: RewardSettings) -> dict[str, Any]:
    """What a server is told of a reward: as JSON, without what is the client's."""
    said = settings.model_dump(mode="json", exclude=settings.of_the_client)
    judge = getattr(settings, "judge", None)
    return said if judge is None else {**said, "judge": served_settings(judge)}


def load_rewards(
    rewards: Mapping[str, RewardSettings],
    device: torch.device,
    *,
    judges: Mapping[str, Reward] | None = None,
    where: str = "rewards.",
) -> dict[str, Reward]:
    """The rewards, in this process; what two of them run is there once.

    ValueError, opening with its field, where one does not load.
    `judges` are those of rewards that hold one which is elsewhere, by the reward's name.
    """
    found: dict[str, Reward] = {}
    with one_copy_each():
        for name, settings in rewards.items():
            plugin = plugins.resolve("gardo.rewards", settings.kind)
            options = {"judge": judges[name]} if judges and name in judges else {}
            try:
                found[name] = plugin(settings, device, **options)
            except (OSError, ValueError) as error:
                raise settings.error_at(f"{where}{name}", error) from error
    return found


def assemble(
    rewards: Mapping[str, RewardSettings],
    scoring: ScoringSettings,
    device: torch.device,
    workers: Mapping[str, Address],
    *,
    prompt: Prompt,
    size: tuple[int, int],
    token: str | None = None,
) -> Panel:
    """All rewards of a recipe. `workers` says where its workers listen, `token` is for URLs.

    ValueError, opening with its field, for one that does not load, or a server that does not answer
    a question about a picture of this size (height, width) and the `prompt`.
    """
    servers: dict[Address, Server] = {}
    remote: dict[str, Reward] = {}
    for name, settings in elsewhere(rewards).items():
        worker = worker_name(settings)
        address = workers[worker] if worker else Address(settings.where.rstrip("/"), token)
        if address not in servers:
            servers[address] = Server(address, scoring.calls, parallel=scoring.parallel)
        remote[name] = Remote(
            settings,
            device,
            plugin=plugins.resolve("gardo.rewards", settings.kind),
            name=name,
            server=servers[address],
            pixels=scoring.pixels,
            exact=not scoring.together,
        )
    here = {name: settings for name, settings in rewards.items() if name not in remote}
    judges = {n.removesuffix(".judge"): r for n, r in remote.items() if n.endswith(".judge")}
    loaded = load_rewards(here, device, judges=judges)
    for name, reward in {**remote, **loaded}.items():
        try:
            reward.meet(prompt, size)
        except ValueError as error:
            raise reward.settings.error_at(f"rewards.{name}", error) from None
    return Panel({name: loaded.get(name) or remote[name] for name in rewards})
