"""Servers that answer with anything, or slowly: a value or NaN, in time, and never an error."""

from __future__ import annotations

import gzip
import time

import pytest
import torch

from gardo.config import reward_sections
from gardo.recipe_errors import RecipeError
from gardo.rewards.serving import line
from gardo.rewards.serving.calls import CallSettings
from gardo.rewards.serving.chat import KEY
from gardo.rewards.serving.line import checked_url
from gardo.rewards.serving.wire import TOKEN, Scored, pack_answer, secret
from gardo.rewards.vlm import Vlm
from gardo.types import Prompt
from tests.engine.rewards.serving.served import (
    CPU,
    SIZE,
    Told,
    http,
    pictures,
    remote,
    running,
    speaking,
    told,
)

ONCE = CallSettings(deadline=1.0, attempt=1.0, retries=0)
TWICE = CallSettings(deadline=9.0, retries=1, first_pause=0.01)
GOOD = http(pack_answer(Scored(torch.tensor([0.5, 0.25]))))
GRADE = http(b'{"choices": [{"message": {"content": "Grade: 3"}}]}')
TWO = [Prompt("a"), Prompt("b")]


class Features(Told):
    gives_features = True


def judge(url: str, settings: CallSettings, **section) -> Vlm:
    its = {"where": f"openai:{url}/v1", "model": "m", "calls": settings.model_dump(), **section}
    return Vlm(reward_sections({"vlm": its}, "a test")["vlm"], CPU)


def asker(kind: str, url: str, settings: CallSettings):
    return judge(url, settings) if kind == "vlm" else remote(url, "told", Told, settings=settings)


@pytest.mark.parametrize("kind", ["remote", "vlm"])
@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n"])
def test_an_answer_byte_by_byte_is_not_waited_for(kind, head):
    with speaking(head, slow=b"HTTP/1.1 200 OK" + b"0" * 999) as url:
        began = time.monotonic()
        asked = asker(kind, url, ONCE)
        value = asked.score(pictures(2), TWO)
        assert time.monotonic() - began < 4
    assert value.isnan().all() and "Timeout, no answer within 1 s" in asked.trouble


@pytest.mark.parametrize("kind", ["remote", "vlm"])
@pytest.mark.parametrize(
    "said",
    [
        http(b"no gzip", content_encoding="gzip"),
        http(b'{"detail": ' + b"[" * 100_000, 400),
        http(b"[" * 100_000),
        http(b"\xff\xfe", 500),
        http(gzip.compress(GOOD), content_encoding="gzip"),
        http(pack_answer(Scored(torch.zeros(2, 5)))),
        b"what is this\r\n\r\n",
        b"",
    ],
)
def test_what_is_no_answer_is_nan_with_one_line_that_says_so(kind, said):
    with speaking(said) as url:
        asked = asker(kind, url, ONCE)
        value = asked.score(pictures(2), TWO)
    assert value.isnan().tolist() == [True, True]
    assert asked.trouble and len(asked.trouble.splitlines()) == 1


def test_an_answer_may_not_be_endless(monkeypatch):
    monkeypatch.setattr(line, "MOST_ANSWER", 1000)
    with speaking(http(b"0" * 1001)) as url:
        asked = remote(url, "told", Told)
        assert asked.score(pictures(2), TWO).isnan().all()
    assert "an answer of more than 1000 bytes" in asked.trouble


def test_features_of_another_width_than_at_first_are_no_features():
    said = (
        b'{"body_bytes": 100000, "rewards": {"told": {"methods": ["score"]}}}',
        pack_answer(Scored(torch.ones(1, 4))),
        pack_answer(Scored(torch.ones(2, 5))),
        pack_answer(Scored(torch.ones(2, 4))),
    )
    with speaking(*map(http, said)) as url:
        asked = remote(url, "told", Features)
        asked.meet(TWO[0], SIZE)
        value = asked.score(pictures(2), TWO)
        assert value.shape == (2, 4) and value.isnan().all()
        assert "told gave [2, 5]; [B, 4] is expected" in asked.trouble
        assert asked.score(pictures(2), TWO).tolist() == torch.ones(2, 4).tolist()


@pytest.mark.parametrize("rewards", [b"[]", b"{}", b'{"rewards": {"told": 3}}', b"[" * 100_000])
def test_who_is_no_reward_server_is_known_before_training(rewards):
    said = pytest.raises(ValueError, match=r"where: http://.* is no reward server")
    with speaking(http(rewards)) as url, said:
        remote(url, "told", Told).meet(TWO[0], SIZE)


@pytest.mark.parametrize("kind", ["remote", "vlm"])
def test_a_server_may_say_when_to_ask_again(kind):
    good = GRADE if kind == "vlm" else http(pack_answer(Scored(torch.tensor([0.5]))))
    with speaking(http(b"busy", 429, retry_after=1), good) as url:
        began = time.monotonic()
        assert asker(kind, url, TWICE).score(pictures(1), TWO[:1]).tolist() == [0.5]
        assert time.monotonic() - began >= 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("pixels", ["float32", "uint8"])
def test_pictures_that_are_not_finite_are_not_sent_and_the_others_are_scored(pixels, bad):
    reward, images = told(), pictures(3)
    images[1, 2, 5, 5] = bad
    with running({"told": reward}) as url:
        asked = remote(url, "told", Told, pixels=pixels)
        value = asked.score(images, [*TWO, Prompt("c")])
        assert value.isfinite().tolist() == [True, False, True]
        assert asked.trouble == "pictures that are not finite: 1"
        assert asked.score(images[1:2], TWO[:1]).isnan().tolist() == [True]
    assert reward.calls == [2]


def test_metadata_that_json_cannot_hold_is_nan():
    with running({"told": told()}) as url:
        asked = remote(url, "told", Told)
        assert asked.score(pictures(1), [Prompt("a", {"x": float("nan")})]).isnan().all()
    assert "JSON" in asked.trouble


def test_a_question_that_is_too_large_for_the_server_is_sent_in_parts():
    reward, images = told(), pictures(7)
    prompts = [Prompt("a")] * 7
    with running({"told": reward}, body_bytes=30_000) as url:  # two pictures of 12 KiB
        asked = remote(url, "told", Told)
        asked.meet(prompts[0], SIZE)
        assert torch.equal(asked.score(images, prompts), images.mean((1, 2, 3)))
    assert reward.calls == [1, 1, 2, 2, 2]  # the first is the picture of `meet`


def test_a_picture_that_is_too_large_for_the_server_is_known_before_training():
    said = pytest.raises(ValueError, match="413 a request may have 10000 bytes")
    with running({"told": told()}, body_bytes=10_000) as url, said:
        remote(url, "told", Told).meet(TWO[0], SIZE)


@pytest.mark.parametrize("value", ["a token", "clé-du-juge", "a\r\nHost: x", "\n", "a\x00"])
def test_a_secret_that_no_header_holds_is_named_and_not_shown(value, monkeypatch):
    for make in (
        lambda: remote("http://127.0.0.1:1", "told", Told, token=value),
        lambda: secret(TOKEN, value),
    ):
        with pytest.raises(ValueError, match=f"^{TOKEN}: has a character") as caught:
            make()
        assert value not in str(caught.value)
    monkeypatch.setattr("os.environ", {KEY: value})
    with pytest.raises(ValueError, match=f"^{KEY}: has a character"):
        judge("http://127.0.0.1:1", ONCE)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_an_end_of_line_is_no_part_of_a_secret(ending):
    assert secret(TOKEN, f"a-token-of-the-tests{ending}") == "a-token-of-the-tests"
    assert secret(TOKEN, "") is None and secret(TOKEN, None) is None
    with running({"told": told()}) as url:
        remote(url, "told", Told, token=f"a-token-of-the-tests{ending}").meet(TWO[0], SIZE)


BAD_URLS = {
    "http://[::1": "is no URL",
    "http://a..b": "is no URL",
    "http://host:99999": "is no URL",
    "http://host:x": "is no URL",
    "http://": "is no URL of a server",
    "ftp://host": "is no URL of a server",
    "http://me:hunter2@host": "has a user or a password",
    "http://hunter2@host": "has a user or a password",
    "http://me:hunter2@[::1": "is no URL",
}


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_cannot_be_asked_is_refused_without_its_password(url):
    with pytest.raises(ValueError, match=BAD_URLS[url]) as caught:
        checked_url(url)
    with pytest.raises(ValueError, match=BAD_URLS[url]):
        remote(url, "told", Told)
    with pytest.raises(RecipeError, match=r"rewards\.vlm\.where: ") as refused:
        section = {"where": f"openai:{url}", "model": "m"}
        reward_sections({"vlm": section}, "a test")
    assert "hunter2" not in str(caught.value) + str(refused.value)


@pytest.mark.parametrize("url", ["http://gpu7:8700", "https://[::1]:1/v1", "http://é.example"])
def test_a_url_that_can_be_asked_stays_as_it_is(url):
    assert checked_url(url) == url


def test_a_reward_that_is_closed_answers_no_more():
    with speaking(b"", slow=b"0" * 99) as url:
        asked = remote(url, "told", Told)
        wait = asked.begin(pictures(1), TWO[:1])
        time.sleep(0.2)
        began = time.monotonic()
        asked.close()
        asked.close()
        assert wait().isnan().all() and time.monotonic() - began < 2
