"""A reward that is computed elsewhere: the same protocol, the same values.

A call is cut into questions of the reward's `batch` images, as it would be computed here, and they
are in flight side by side. What gets no answer within the limits is NaN, which the panel masks and
counts; nothing here raises while a run trains, because other ranks would wait for this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import torch
from torch import Tensor

from gardo.rewards.base import Pending, Reward, RewardSettings
from gardo.rewards.serving.calls import Breaker, Caller, CallFailed, CallSettings, Transient
from gardo.rewards.serving.wire import (
    CONTENT_TYPE,
    BadBody,
    Pixels,
    Request,
    pack_request,
    unpack_answer,
)
from gardo.types import Prompt

TRANSIENT = {408, 429, 502, 503, 504}


@dataclass(frozen=True)
class Address:
    """Where a server listens; the token is never shown."""

    url: str
    token: str | None = None

    def __repr__(self) -> str:
        return self.url

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


class Server:
    """The connection to one server, for all rewards that ask it."""

    def __init__(self, address: Address, settings: CallSettings, *, parallel: int = 4) -> None:
        self.address, self.settings = address, settings
        self.caller = Caller(settings, Breaker(settings.breaker, settings.cooldown))
        self._threads = ThreadPoolExecutor(parallel, "gardo-reward")
        self._http = httpx.Client(
            base_url=address.url, headers=address.headers, trust_env=False, follow_redirects=False
        )

    def post(self, path: str, body: bytes, count: int) -> Tensor:
        """The answer of `count` values. CallFailed."""

        def attempt(seconds: float) -> Tensor:
            said = self._sent("POST", path, seconds, body)
            try:
                return unpack_answer(said.content, count)
            except BadBody as error:
                raise Transient(f"{self.address}: {error}") from None

        return self.caller(attempt)

    def served(self) -> dict[str, Any]:
        """What the server says of its rewards. CallFailed."""

        def attempt(seconds: float) -> dict[str, Any]:
            try:
                return dict(self._sent("GET", "/rewards", seconds).json()["rewards"])
            except (ValueError, KeyError, TypeError):
                raise CallFailed(f"{self.address} is no reward server") from None

        return self.caller(attempt)

    def begin(self, job: Callable[[], Tensor]) -> Pending:
        return self._threads.submit(job).result

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _sent(self, method: str, path: str, seconds: float, body: bytes = b"") -> Any:
        try:
            said = self._http.request(
                method, path, content=body, headers={"Content-Type": CONTENT_TYPE}, timeout=seconds
            )
        except httpx.TransportError as error:
            raise Transient(f"{self.address}: {type(error).__name__} {error}".rstrip()) from None
        if said.status_code == 200:
            return said
        why = f"{self.address}: {said.status_code} {_detail(said)}"
        if said.status_code in TRANSIENT:
            after = said.headers.get("retry-after", "")
            raise Transient(why, after=float(after) if after.isdecimal() else None)
        raise CallFailed(why)


def _detail(said: Any) -> str:
    try:
        return str(said.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return str(said.text)[:200]


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
        self.width = 0  # of features, once the server has said
        self._trouble = ""

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
            compares = served[self.name]["methods"] == ["compare"]
            value = (
                self._answer("compare", [grey, grey], [prompt])
                if compares
                else self._answer("score", [grey], [prompt])
            )
        except CallFailed as error:
            raise ValueError(f"where: {error}") from None
        self.width = value.shape[1] if value.dim() == 2 else 0

    @property
    def trouble(self) -> str:
        return self._trouble

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
        """The values; NaN where there is no answer."""
        try:
            return self._answer(method, pictures, prompts)
        except CallFailed as error:
            self._trouble = str(error)
            shape = (len(prompts), self.width) if self.gives_features else (len(prompts),)
            return torch.full(shape, torch.nan)

    def _answer(self, method: str, pictures: Sequence[Tensor], prompts: Sequence[Prompt]) -> Tensor:
        body = pack_request(Request(tuple(pictures), tuple(prompts), self.exact), self.pixels)
        return self.server.post(f"/{method}/{self.name}", body, len(prompts))

    def _same(self, theirs: dict[str, Any]) -> None:
        """ValueError where the recipe says something of the reward that is not so there."""
        said = self.settings.model_dump(mode="json", exclude_unset=True)
        for field in sorted(said.keys() & theirs.keys()):
            if said[field] != theirs[field]:
                raise ValueError(
                    f"{field}: {said[field]!r}, but {self.server.address} serves {self.name} with "
                    f"{theirs[field]!r}; say the same, or leave it out here"
                )
