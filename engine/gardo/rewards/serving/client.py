"""A reward that is computed elsewhere: the same protocol, the same values.

A call is cut into questions of the reward's `batch` images, as it would be computed here, and they
are in flight side by side. A picture that is not finite is not sent. What gets no answer within the
limits is NaN, which the panel masks and counts; nothing here raises while a run trains, because
other ranks would wait for this one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel

from gardo.rewards.base import Pending, Reward, RewardSettings, provides
from gardo.rewards.judging.base import COSTS, added_up
from gardo.rewards.serving.calls import (
    Breaker,
    Caller,
    CallFailed,
    CallSettings,
    Transient,
    first_line,
)
from gardo.rewards.serving.line import Address, Line
from gardo.rewards.serving.wire import (
    TOKEN,
    BadBody,
    Pixels,
    Request,
    Scored,
    pack_request,
    secret,
    unpack_answer,
)
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor


def finite(pictures_B3HW: Tensor) -> Tensor:
    """Which pictures are finite, bool [B]."""
    return pictures_B3HW.isfinite().flatten(1).all(1)


class Server:
    """The connection to one server, for all rewards that ask it."""

    def __init__(self, address: Address, settings: CallSettings, *, parallel: int = 4) -> None:
        """ValueError for a URL or a token that cannot be used."""
        self.address = address
        self.caller = Caller(settings, Breaker(settings.breaker, settings.cooldown))
        self.most_bytes: int | None = None  # of a question, once the server has said
        self._threads = ThreadPoolExecutor(parallel, "gardo-reward")
        self._line = Line(address.url, secret(TOKEN, address.token))

    def post(self, path: str, body: bytes, count: int) -> Scored:
        """The answer, of `count` values. CallFailed."""

        def attempt(seconds: float) -> Scored:
            said = self._line.ask("POST", path, seconds, body)
            try:
                return unpack_answer(said, count)
            except BadBody as error:
                raise Transient(f"{self.address}: {error}") from None

        return self.caller(attempt)

    def served(self) -> dict[str, dict[str, Any]]:
        """What the server says of its rewards. CallFailed."""
        content = self.caller(lambda seconds: self._line.ask("GET", "/rewards", seconds))
        try:
            said = json.loads(content)
            rewards = {name: dict(about) for name, about in said["rewards"].items()}
            self.most_bytes = int(said["body_bytes"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            why = "is no reward server of this release"
            raise CallFailed(f"{self.address} {why}", answered=True) from None
        return rewards

    def begin(self, job: Callable[[], Tensor]) -> Pending:
        return self._threads.submit(job).result

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._line.close()


class Remote(Reward):
    """A reward of this recipe that a server computes."""

    def __init__(
        self,
        settings: RewardSettings,
        device: torch.device,
        *,
        plugin: type[Reward],
        name: str,
        server: Server,
        pixels: Pixels = "float32",
        exact: bool = True,
    ) -> None:
        """`plugin` is the reward's own class; `name` is what the server calls it."""
        super().__init__(settings, device)
        self.name, self.server, self.pixels, self.exact = name, server, pixels, exact
        self.gives_features = plugin.gives_features
        self.limits = plugin.limits
        self._width: int | None = None  # of features, once the server has said
        self._trouble = ""
        self._judges = provides(plugin, "costs")
        self._costs = dict.fromkeys(COSTS, 0.0)
        self._counting = threading.Lock()  # answers come in several threads

    def meet(self, prompt: Prompt, size: tuple[int, int]) -> None:
        """ValueError unless the server has this reward, with the settings that the recipe says, and
        scores a grey picture of the prompt: what does not work is known before training."""
        try:
            served = self.server.served()
            if self.name not in served:
                names = ", ".join(served) or "nothing"
                address = self.server.address
                raise ValueError(f"where: {address} has no {self.name!r}; it has {names}")
            self._same(served[self.name].get("settings", {}))
            grey = torch.full((1, 3, *size), 0.5)
            compares = served[self.name].get("methods") == ["compare"]
            value = (
                self._answer("compare", [grey, grey], [prompt])
                if compares
                else self._answer("score", [grey], [prompt])
            )
        except CallFailed as error:
            raise ValueError(f"where: {error}") from None
        self._width = value.shape[1] if self.gives_features else None
        self.costs()  # of this question nothing is said

    @property
    def trouble(self) -> str:
        return self._trouble

    def costs(self) -> dict[str, float] | None:
        with self._counting:
            said, self._costs = self._costs, dict.fromkeys(COSTS, 0.0)
        return said if self._judges else None

    def close(self) -> None:
        self.server.close()

    def begin(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Pending:
        """Begins to ask; what is returned waits for the values, [B] on this reward's device."""
        return self._begun("score", [images_B3HW], prompts)

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.begin(images_B3HW, prompts)()

    def compare(self, first_N3HW: Tensor, second_N3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self._begun("compare", [first_N3HW, second_N3HW], prompts)()

    def _begun(self, method: str, pictures: Sequence[Tensor], prompts: Sequence[Prompt]) -> Pending:
        if not prompts:
            width = (self._width or 0,) if self.gives_features else ()
            return lambda: torch.empty(0, *width, device=self.device)
        size = getattr(self.settings, "batch", len(prompts))
        pictures = [p.detach().cpu() for p in pictures]  # the copy waits for what made them

        def question(start: int) -> Pending:
            rows = slice(start, start + size)
            return self.server.begin(
                lambda: self._asked(method, [p[rows] for p in pictures], prompts[rows])
            )

        waiting = [question(start) for start in range(0, len(prompts), size)]
        return lambda: torch.cat([wait() for wait in waiting]).to(self.device)

    def _asked(self, method: str, pictures: Sequence[Tensor], prompts: Sequence[Prompt]) -> Tensor:
        """The values; NaN where a picture is not finite, and everywhere if there is no answer."""
        good = torch.stack([finite(p) for p in pictures]).all(0)
        width = (self._width or 0,) if self.gives_features else ()
        try:
            if not good.all():
                self._trouble = f"pictures that are not finite: {len(good) - int(good.sum())}"
            if not good.any():
                return torch.full((len(prompts), *width), torch.nan)
            sent = [p for p, g in zip(prompts, good.tolist(), strict=True) if g]
            answer = self._answer(method, [p[good] for p in pictures], sent)
            value = answer.new_full((len(prompts), *answer.shape[1:]), torch.nan)
            value[good] = answer
            return value
        except Exception as error:  # whatever it is: other ranks would wait for this one
            self._trouble = first_line(error)
            return torch.full((len(prompts), *width), torch.nan)

    def _answer(self, method: str, pictures: Sequence[Tensor], prompts: Sequence[Prompt]) -> Tensor:
        """The answer to one question, which is sent in parts where it is too large for the server.

        CallFailed, also for an answer of another shape than `meet` saw.
        """
        body = pack_request(Request(tuple(pictures), tuple(prompts), self.exact), self.pixels)
        most, middle = self.server.most_bytes, len(prompts) // 2
        if most and len(body) > most and middle:
            halves = [slice(None, middle), slice(middle, None)]
            return torch.cat(
                [self._answer(method, [p[half] for p in pictures], prompts[half])
                 for half in halves]
            )  # fmt: skip
        said = self.server.post(f"/{method}/{self.name}", body, len(prompts))
        self._count(said)
        value = said.values
        if value.dim() != 1 + self.gives_features or self._width not in (None, value.shape[-1]):
            wanted = f"[B, {self._width or 'D'}]" if self.gives_features else "[B]"
            raise CallFailed(
                f"{self.server.address}: {self.name} gave {list(value.shape)}; {wanted} is expected"
            )
        return value

    def _count(self, said: Scored) -> None:
        self._trouble = said.trouble or self._trouble
        if said.costs is not None:
            with self._counting:
                self._costs = added_up([self._costs, said.costs])

    def _same(self, theirs: dict[str, Any]) -> None:
        """ValueError where the recipe says something of the reward that is not so there."""
        its = self.settings
        said = its.model_dump(mode="json", exclude_unset=True, exclude=its.of_the_client)
        for field in sorted(said.keys() & theirs.keys()):
            whole = not isinstance(getattr(its, field), BaseModel)
            if not _as_said(said[field], theirs[field], whole):
                raise ValueError(
                    f"{field}: {said[field]!r}, but {self.server.address} serves {self.name} with "
                    f"{theirs[field]!r}; say the same, or leave it out here"
                )


def _as_said(said: Any, theirs: Any, whole: bool) -> bool:
    """Whether theirs is what is said; of settings inside, unless `whole`, as far as it goes."""
    if whole or not (isinstance(said, dict) and isinstance(theirs, dict)):
        return bool(said == theirs)
    return all(_as_said(value, theirs.get(name), False) for name, value in said.items())
