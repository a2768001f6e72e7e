"""HTTP with a server: where it is, and tries that end in their seconds."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from gardo.rewards.serving.calls import CallFailed, Transient, first_line
from gardo.rewards.serving.wire import CONTENT_TYPE

TRANSIENT = {408, 429, 502, 503, 504}
MOST_ANSWER = 64 << 20  # bytes of an answer


def checked_url(url: str) -> str:
    """The URL, if it can be asked. ValueError, without a password, says why not."""
    shown = re.sub("//.*@", "//...@", url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        raise ValueError(f"{shown!r} is no URL; give http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"{shown!r} is no URL of a server; give http://HOST:PORT")
    if "@" in parts.netloc:
        raise ValueError(f"{shown!r} has a user or a password; leave them out")
    return url


@dataclass(frozen=True)
class Address:
    """Where a server listens; the token is never shown."""

    url: str
    token: str | None = None

    def __repr__(self) -> str:
        return self.url


class Line:
    """HTTP with one server, for many threads. A try ends in its seconds, whatever comes."""

    def __init__(self, url: str, token: str | None) -> None:
        """ValueError for a URL that cannot be asked."""
        self.url = checked_url(url.rstrip("/"))
        headers = {"Accept-Encoding": "identity"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        import httpx2 as httpx  # what neither asks nor is asked does without

        self._failed = httpx.HTTPError
        self._http = httpx.AsyncClient(
            headers=headers, trust_env=False, follow_redirects=False, timeout=None,
            limits=httpx.Limits(max_connections=None),
        )  # fmt: skip
        self._closed, self._lock = False, threading.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="gardo-http", daemon=True).start()

    def ask(self, method: str, path: str, seconds: float, body: bytes = b"",
            content_type: str = CONTENT_TYPE) -> bytes:  # fmt: skip
        """The body of an answer 200. Transient, CallFailed."""
        with self._lock:
            if self._closed:
                raise CallFailed(f"{self.url}: the run is over")
            sent = self._sent(method, path, body, {"Content-Type": content_type})
            asked = asyncio.run_coroutine_threadsafe(asyncio.wait_for(sent, seconds), self._loop)
        try:
            status, headers, content = asked.result()
        except TimeoutError:
            raise Transient(f"{self.url}: Timeout, no answer within {seconds:.3g} s") from None
        except self._failed as error:
            why = f"{self.url}: {type(error).__name__} {first_line(error)}"
            raise Transient(why) from None
        if status == 200:
            return content
        why = f"{self.url}: {status} {_detail(content)}".rstrip()
        if status in TRANSIENT:
            after = headers.get("retry-after", "")
            seconds_after = float(after) if after.isdecimal() else None
            raise Transient(why, after=seconds_after, answered=status < 500)
        raise CallFailed(why, answered=status < 500)

    def close(self) -> None:
        """Ends what is in flight."""
        with self._lock:
            if not self._closed:
                self._closed = True
                asyncio.run_coroutine_threadsafe(self._end(), self._loop)

    async def _sent(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the answer, as the body came."""
        url, content = f"{self.url}{path}", bytearray()
        async with self._http.stream(method, url, content=body, headers=headers) as said:
            async for part in said.aiter_raw():
                content += part
                if len(content) > MOST_ANSWER:
                    raise CallFailed(f"{self.url}: an answer of more than {MOST_ANSWER} bytes")
            return said.status_code, said.headers, bytes(content)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()
        self._loop.stop()


def _detail(content: bytes) -> str:
    """What a server says of an error: `detail` of a JSON object, or how the body begins."""
    text = content[: 1 << 16].decode(errors="replace")
    try:
        said = str(json.loads(text)["detail"])
    except (ValueError, LookupError, TypeError, RecursionError):
        said = text[:200]
    return said[:2000].partition("\n")[0]
