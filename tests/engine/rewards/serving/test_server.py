"""The HTTP service itself: who is let in, what is refused, and many clients at once."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch

from gardo.rewards.serving.server import ServeSettings, check_address
from gardo.rewards.serving.wire import CONTENT_TYPE, Request, pack_request, unpack_answer
from gardo.types import Prompt
from tests.engine.rewards.serving.served import (
    CPU,
    PROMPTS,
    TOKEN,
    Pairs,
    RewardSettings,
    Told,
    pictures,
    running,
    told,
)

CLIENT = httpx2.Client(trust_env=False, limits=httpx2.Limits(max_connections=64))
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": CONTENT_TYPE}


def body(count: int = 2, *, exact: bool = True, **metadata: object) -> bytes:
    prompts = tuple(Prompt(PROMPTS[i % 3], metadata) for i in range(count))
    return pack_request(Request((pictures(count),), prompts, exact))


def post(url: str, content: bytes, path: str = "/score/told", **headers: str) -> httpx2.Response:
    return CLIENT.post(url + path, content=content, headers={**HEADERS, **headers}, timeout=30)


@pytest.fixture(scope="module")
def url():
    pairs = Pairs(RewardSettings(kind="pairs", role="held_out"), CPU)
    rewards = {"told": told(), "pairs": pairs}
    with running(rewards, body_bytes=1 << 20, body_seconds=1.0) as found:
        yield found


def test_it_answers_with_the_rewards_values(url):
    said = post(url, body(3))
    assert said.status_code == 200 and said.headers["content-type"] == CONTENT_TYPE
    assert torch.equal(unpack_answer(said.content, 3).values, pictures(3).mean((1, 2, 3)))


def test_pairs_are_compared(url):
    first, second = pictures(2), pictures(2, seed=1)
    said = post(url, pack_request(Request((first, second), PROMPTS[:2])), "/compare/pairs")
    wanted = (first.mean((1, 2, 3)) > second.mean((1, 2, 3))).float()
    assert torch.equal(unpack_answer(said.content, 2).values, wanted)


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong-token-of-tests", f"Basic {TOKEN}", f"bearer {TOKEN}"]
)
@pytest.mark.parametrize("path", ["/rewards", "/metrics", "/score/told"])
def test_nobody_is_let_in_without_the_token(url, given, path):
    method = "POST" if "score" in path else "GET"
    said = httpx2.request(method, url + path, headers={**HEADERS, "Authorization": given},
                          content=b"")  # fmt: skip
    assert said.status_code == 401 and "told" not in said.text


def test_health_needs_no_token_and_says_nothing(url):
    assert httpx2.get(url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("path", "content", "headers", "status"),
    [
        ("/score/nobody", body(), {}, 404),
        ("/score/pairs", body(), {}, 404),
        ("/compare/told", pack_request(Request((pictures(2), pictures(2)), PROMPTS[:2])), {}, 404),
        ("/delete/told", body(), {}, 404),
        ("/score/told", body(), {"Content-Type": "text/plain"}, 415),
        ("/score/told", b"what", {}, 422),
        ("/score/told", b"", {}, 422),
        ("/score/told", b"0" * ((1 << 20) + 1), {}, 413),
        ("/score/told", body(), {"Host": "evil.example"}, 400),
    ],
)
def test_what_is_no_question_is_refused(url, path, content, headers, status):
    assert post(url, content, path, **headers).status_code == status


def test_a_body_of_unsaid_length_is_cut_off_at_the_limit(url):
    def endless():
        for _ in range(64):
            yield b"0" * (1 << 16)

    said = httpx2.post(url + "/score/told", content=endless(), headers=HEADERS, timeout=30)
    assert said.status_code == 413


def test_a_slow_sender_is_not_waited_for(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        head = [f"POST /score/told HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n",
                *(f"{name}: {value}\r\n" for name, value in HEADERS.items()), "\r\n"]  # fmt: skip
        slow.sendall("".join(head).encode() + b"0")
        began = time.monotonic()
        assert b" 408 " in slow.recv(1000)
        assert time.monotonic() - began < 10


class Wide(Told):
    """Features that no buffer of a socket holds, 16 MiB of a picture."""

    gives_features = True

    def score(self, images_B3HW, prompts):
        return super().score(images_B3HW, prompts)[:, None].expand(-1, 1 << 22).clone()


def sent(url: str, content: bytes, name: str, missing: int = 0) -> socket.socket:
    """A connection on which a question has been asked, all but some bytes, and nothing been read.

    What it has not read fits 64 KiB here.
    """
    host, port = url.removeprefix("http://").split(":")
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    line.settimeout(30)
    line.connect((host, int(port)))
    said = {"Host": host, "Content-Length": len(content) + missing, **HEADERS}
    head = [f"POST /score/{name} HTTP/1.1", *(f"{k}: {v}" for k, v in said.items())]
    line.sendall("\r\n".join([*head, "", ""]).encode() + content)
    return line


def test_a_slow_reader_keeps_nobody_else_waiting():
    wide = Wide(RewardSettings(kind="told", role="features"), CPU)
    with running({"wide": wide, "told": told()}) as url:
        with sent(url, body(1), "wide") as slow:
            begun = slow.recv(100)
            assert post(url, body()).status_code == 200  # most of the other answer is not taken yet
            rest = 0
            while rest < 1 << 24 and (part := slow.recv(1 << 20)):
                rest += len(part)
        assert begun.startswith(b"HTTP/1.1 200") and rest >= 1 << 24


def test_a_question_whose_client_has_gone_is_not_computed():
    reward = told()
    with running({"told": reward}) as url, ThreadPoolExecutor(8) as threads:
        reward.gate.clear()
        held = threads.submit(post, url, body(1, hold=True))
        while not reward.calls:
            time.sleep(0.01)
        gone = sent(url, body(3), "told")
        while httpx_waiting(url) < 3:
            time.sleep(0.01)
        gone.close()
        sent(url, body(3)[:-1], "told", missing=1).close()
        while 'status="499"} 2.0' not in metrics(url):
            time.sleep(0.01)
        assert httpx_waiting(url) == 0
        reward.gate.set()
        assert held.result().status_code == post(url, body(2)).status_code == 200
    assert reward.calls == [1, 2]


def test_the_bytes_that_are_held_are_bounded():
    """The budget is 8 bodies of the most bytes; one of 8-bit pictures becomes 4 times as large."""
    reward, question = told(), body(1, hold=True)
    with (
        running({"told": reward}, body_bytes=len(question)) as url,
        ThreadPoolExecutor(9) as threads,
    ):
        reward.gate.clear()
        held = [threads.submit(post, url, question) for _ in range(8)]
        while httpx_waiting(url) < 7:
            time.sleep(0.01)
        refused = post(url, question)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert "bytes are held" in refused.json()["detail"]
        reward.gate.set()
        assert {f.result().status_code for f in held} == {200}
        assert post(url, question).status_code == 200  # all of it was given back
        eight_bits = Request((pictures(3),), PROMPTS)
        assert post(url, pack_request(eight_bits, "uint8")).status_code == 200


def test_more_connections_than_are_served_are_told_so():
    with running({"told": told()}, most_connections=3) as url:
        host, port = url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(3)]
        with httpx2.Client(trust_env=False) as one:
            assert one.get(url + "/health").status_code == 503
        for line in silent:
            line.close()
        while httpx2.get(url + "/health").status_code != 200:
            time.sleep(0.01)


def test_a_prompt_that_the_reward_cannot_score_is_the_clients_fault():
    class Choosy(Told):
        @classmethod
        def check_prompt(cls, prompt):
            raise ValueError(f"no circles in {prompt!r}")

    with running({"told": Choosy(RewardSettings(kind="told", role="held_out"), CPU)}) as url:
        said = post(url, body(1))
    assert said.status_code == 422 and "no circles" in said.json()["detail"]


def test_a_reward_that_fails_says_so_and_goes_on(url):
    said = post(url, body(**{"raise": True}))
    assert said.status_code == 500 and "RuntimeError: told to by" in said.json()["detail"]
    assert post(url, body()).status_code == 200


def test_metrics_count_what_was_answered(url):
    post(url, body(2))
    text = metrics(url)
    assert 'gardo_reward_requests_total{reward="told",status="200"}' in text
    assert 'gardo_reward_waiting_images{reward="told"} 0.0' in text


def test_what_is_served_is_described(url):
    every = httpx2.get(url + "/rewards", headers=HEADERS).json()
    said = every["rewards"]
    assert every["body_bytes"] == 1 << 20
    assert said["told"]["methods"] == ["score"] and said["pairs"]["methods"] == ["compare"]


def test_64_clients_get_their_own_answers():
    reward = told()
    with running({"told": reward}) as url, ThreadPoolExecutor(64) as threads:

        def ask(seed: int) -> bool:
            mine = pictures(3, seed)
            content = pack_request(Request((mine,), PROMPTS, exact=bool(seed % 2)))
            got = unpack_answer(post(url, content).content, 3).values
            return bool(torch.allclose(got, mine.mean((1, 2, 3)), atol=1e-6))

        assert all(threads.map(ask, range(192)))
    assert sum(reward.calls) == 3 * 192


def test_questions_that_allow_it_are_computed_together():
    reward = told()
    with running({"told": reward}, most_together=8) as url, ThreadPoolExecutor(8) as threads:
        reward.gate.clear()
        held = threads.submit(post, url, body(1, hold=True))
        while not reward.calls:
            time.sleep(0.01)
        others = [threads.submit(post, url, body(2, exact=False)) for _ in range(5)]
        alone = threads.submit(post, url, body(2))
        while httpx_waiting(url) < 12:
            time.sleep(0.01)
        reward.gate.set()
        assert {f.result().status_code for f in (held, alone, *others)} == {200}
    assert sorted(reward.calls) == [1, 2, 2, 8]


def metrics(url: str) -> str:
    return httpx2.get(url + "/metrics", headers=HEADERS).text


def httpx_waiting(url: str) -> float:
    lines = metrics(url).splitlines()
    line = next(x for x in lines if x.startswith("gardo_reward_waiting_images{"))
    return float(line.split()[-1])


def test_one_bad_question_does_not_spoil_those_beside_it():
    reward = told()
    with running({"told": reward}) as url, ThreadPoolExecutor(8) as threads:
        reward.gate.clear()
        held = threads.submit(post, url, body(1, hold=True))
        while not reward.calls:
            time.sleep(0.01)
        bad = threads.submit(post, url, body(2, exact=False, **{"raise": True}))
        good = threads.submit(post, url, body(2, exact=False))
        while httpx_waiting(url) < 4:
            time.sleep(0.01)
        reward.gate.set()
        assert [f.result().status_code for f in (held, bad, good)] == [200, 500, 200]


def test_a_full_queue_is_said_with_when_to_come_again():
    reward = told()
    with running({"told": reward}, most_waiting=4) as url, ThreadPoolExecutor(8) as threads:
        reward.gate.clear()
        held = threads.submit(post, url, body(1, hold=True))
        while not reward.calls:
            time.sleep(0.01)
        waiting = threads.submit(post, url, body(3))
        while httpx_waiting(url) < 3:
            time.sleep(0.01)
        refused = post(url, body(2))
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        reward.gate.set()
        assert held.result().status_code == waiting.result().status_code == 200


def test_a_client_that_hangs_up_costs_nobody_else_an_answer():
    reward = told()
    with running({"told": reward}) as url:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(
                url + "/score/told", content=body(1, sleep=1.0), headers=HEADERS, timeout=0.2
            )
        assert post(url, body(2)).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-node-3"])
def test_an_address_for_others_needs_a_token(host):
    with pytest.raises(ValueError, match=f"--host {host}: others reach this address"):
        check_address(ServeSettings(host=host))
    check_address(ServeSettings(host=host, token=TOKEN))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_the_machine_itself_needs_none(host):
    check_address(ServeSettings(host=host))


def test_the_token_is_not_shown():
    assert TOKEN not in repr(ServeSettings(token=TOKEN))


@pytest.mark.parametrize("token", ["hunter2", "hunter2 and a blank", "hunter2-and-eol\n"])
def test_nor_is_one_that_is_refused(token):
    with pytest.raises(ValueError) as caught:
        ServeSettings(token=token)
    assert "hunter2" not in str(caught.value)


def test_an_end_of_line_is_no_part_of_the_token():
    assert ServeSettings(token=f"{TOKEN}\n").token == TOKEN
