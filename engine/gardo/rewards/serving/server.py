"""The HTTP service of `gardo rewards serve` and of a run's workers.

    GET  /health            {"status": "ok"}; for who watches it, without a token
    GET  /metrics           Prometheus
    GET  /rewards           what is served: settings, methods; and the bytes that a body may have
    POST /score/NAME        wire.py's body -> its answer; so is
    POST /compare/NAME      for judges of pairs

400 for a name of the host that is not served, 401 without the token, 404 for an unknown reward, 408
for a body that does not arrive, 413 for one that is too large, 415 for another type, 422 for one
that is not understood or a prompt that the reward cannot score, 429 with Retry-After where the
queue is full or too many bytes are held, 500 where the reward failed, 503 for too many connections.
A question whose client has gone is not computed (499 in the metrics).

No pickles, no code, no paths from clients. A server listens on the machine itself unless it has a
token; it speaks plain HTTP, so between machines that others share put TLS in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ConfigDict, Field, field_validator
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from gardo.rewards.base import Reward, provides
from gardo.rewards.serving.batching import QueueFull, Scorer, WrongMethod
from gardo.rewards.serving.wire import (
    CONTENT_TYPE,
    TOKEN,
    BadBody,
    Scored,
    pack_answer,
    secret,
    unpack_request,
)
from gardo.settings import Strict
from gardo.types import Prompt

HELD_BODIES = 8  # so many of the largest bodies are held; one of 8-bit pictures becomes four
MOST_CONNECTIONS = 1024
GONE = "the client has gone"


class ServeSettings(Strict):
    """The limits of a server."""

    model_config = ConfigDict(hide_input_in_errors=True)  # the token

    host: str = Field(
        "127.0.0.1",
        description="an address of this machine; others reach it at 0.0.0.0 or its own",
    )
    port: int = Field(8700, ge=0, le=65535, description="0: one that is free")
    token: str | None = Field(
        None,
        min_length=16,
        repr=False,
        description="that clients must send; the variable GARDO_REWARD_TOKEN, never the command "
        "line",
    )
    body_bytes: int = Field(1 << 30, ge=1, description="of one request")
    body_seconds: float = Field(60, gt=0, description="until it has arrived")
    most_waiting: int = Field(1024, ge=1, description="images in a reward's queue")
    most_together: int = Field(64, ge=1, description="images of several requests, computed at once")

    @field_validator("token", mode="before")
    @classmethod
    def _a_secret(cls, token: str | None) -> str | None:
        return secret(TOKEN, token)


class Budget:
    """Bytes of all questions together, arriving, waiting and computed."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """One question's share; what is yielded takes bytes for it, which go back at its end.

        QueueFull where there are too few left.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if self.held + count > self.most:
                raise QueueFull(f"{self.held} bytes are held; {self.most} may")
            self.held += count
            taken += count

        try:
            yield take
        finally:
            self.held -= taken


def check_address(settings: ServeSettings) -> None:
    """ValueError for an address that others reach, without a token."""
    if not _loopback(settings.host) and not settings.token:
        raise ValueError(
            f"--host {settings.host}: others reach this address, and there is no token; set the "
            f"environment variable {TOKEN} (16 characters or more) here and for the runs, or "
            "leave --host out"
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def described(reward: Reward) -> dict[str, Any]:
    """What a client may know of a served reward; JSON."""
    settings = reward.settings.model_dump(mode="json", exclude=reward.settings.of_the_client)
    methods = [m for m in ("score", "compare") if provides(type(reward), m)]
    return {
        "settings": settings,
        "methods": methods,
        "features": reward.gives_features,
        "device": str(reward.device),
    }


def make_app(rewards: Mapping[str, Reward], settings: ServeSettings) -> FastAPI:
    """The FastAPI application that serves the rewards."""
    registry, budget = CollectorRegistry(), Budget(HELD_BODIES * settings.body_bytes)
    answered = Counter("gardo_reward_requests", "answers", ["reward", "status"], registry=registry)
    images = Counter("gardo_reward_images", "images scored", ["reward"], registry=registry)
    seconds = Histogram(
        "gardo_reward_seconds", "from request to answer", ["reward"], registry=registry
    )
    together = Histogram(
        "gardo_reward_batch_images", "images computed at once", ["reward"],
        buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256], registry=registry,
    )  # fmt: skip
    scorers = {
        name: Scorer(
            name,
            reward,
            most_together=settings.most_together,
            most_waiting=settings.most_waiting,
            seen=together.labels(name).observe,
        )
        for name, reward in rewards.items()
    }
    waiting = Gauge("gardo_reward_waiting_images", "in the queue", ["reward"], registry=registry)
    for name, scorer in scorers.items():
        waiting.labels(name).set_function(partial(getattr, scorer, "waiting"))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for scorer in scorers.values():
            scorer.close()

    app = FastAPI(title="gardo rewards", lifespan=lifespan, docs_url=None, redoc_url=None,
                  openapi_url=None)  # fmt: skip
    if _loopback(settings.host):
        # a page in a browser on this machine may reach the port, but not under its own name
        names = ["127.0.0.1", "localhost", "[::1]", settings.host]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=names)

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "")
        wanted = f"Bearer {settings.token}"
        if settings.token and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise HTTPException(401, "no such token", {"WWW-Authenticate": "Bearer"})

    async def body_of(request: Request, take: Callable[[int], None]) -> bytes:
        if request.headers.get("content-type") != CONTENT_TYPE:
            raise HTTPException(415, f"content-type must be {CONTENT_TYPE}")
        length = request.headers.get("content-length", "0")
        too_large = HTTPException(413, f"a request may have {settings.body_bytes} bytes")
        if not length.isdecimal() or int(length) > settings.body_bytes:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(settings.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > settings.body_bytes:
                        raise too_large
                    take(len(part))
                    parts.append(part)
        except TimeoutError:
            late = f"the body had not arrived after {settings.body_seconds:g} s"
            raise HTTPException(408, late) from None
        except ClientDisconnect:
            raise HTTPException(499, GONE) from None
        return b"".join(parts)

    async def scored_by(request: Request, method: str, scorer: Scorer) -> Scored:
        with budget.share() as take:
            body = await body_of(request, take)
            size = len(body)
            asked = await run_in_threadpool(unpack_request, body, method)
            del body  # what it has become is held instead
            take(sum(picture.nbytes for picture in asked.pictures) - size)
            for prompt in asked.prompts:
                _check(scorer.reward, prompt)
            return await _answered(request, scorer.ask(asked))

    async def answer_to(request: Request, method: str, scorer: Scorer) -> bytes:
        try:
            scored = await scored_by(request, method, scorer)
        except QueueFull as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from None
        except WrongMethod as error:
            raise HTTPException(404, str(error)) from None
        except BadBody as error:
            raise HTTPException(422, str(error)) from None
        images.labels(scorer.name).inc(len(scored.values))
        return pack_answer(scored)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", dependencies=[Depends(authorised)])
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/rewards", dependencies=[Depends(authorised)])
    async def served() -> dict[str, Any]:
        return {
            "release": release(),
            "body_bytes": settings.body_bytes,
            "rewards": {name: described(reward) for name, reward in rewards.items()},
        }

    @app.post("/{method}/{name}", dependencies=[Depends(authorised)])
    async def ask(method: str, name: str, request: Request) -> Response:
        if method not in ("score", "compare") or name not in scorers:
            raise HTTPException(404, f"no {method}/{name}; rewards: {', '.join(scorers)}")
        began, status = time.monotonic(), 500
        try:
            answer = await answer_to(request, method, scorers[name])
            status = 200
            return Response(answer, media_type=CONTENT_TYPE)
        except HTTPException as error:
            status = error.status_code
            raise
        except Exception as error:  # the reward's own
            said = f"{name}: {type(error).__name__}: {error}"
            raise HTTPException(500, said[:2000]) from error
        finally:
            answered.labels(name, status).inc()
            seconds.labels(name).observe(time.monotonic() - began)

    return app


def _check(reward: Reward, prompt: Prompt) -> None:
    try:
        type(reward).check_for(reward.settings, prompt)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


async def _answered(request: Request, asked: Future[Scored]) -> Scored:
    """The answer, which is not computed once the client has gone."""
    answer, gone = asyncio.wrap_future(asked), asyncio.ensure_future(_gone(request))
    either: set[asyncio.Future[Any]] = {answer, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HTTPException(499, GONE)
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def release() -> str:
    try:
        return version("gardo-engine")
    except PackageNotFoundError:
        return "a checkout"


def bound(settings: ServeSettings) -> socket.socket:
    """The socket to listen on; OSError where the address is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((settings.host, settings.port))
    found.listen(2048)  # who asks from now on waits in line
    return found


def web_server(app: FastAPI, *, most_connections: int = MOST_CONNECTIONS) -> uvicorn.Server:
    config = uvicorn.Config(
        app, http="h11", log_level="warning", access_log=False, server_header=False,
        limit_concurrency=most_connections, timeout_graceful_shutdown=30, timeout_keep_alive=30,
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serves until it is told to end (SIGTERM, SIGINT): what is computed is still answered."""
    web_server(app).run(sockets=[listening])
