"""A reward elsewhere: the same values to the bit, and never an exception while a run trains."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from gardo.rewards.assembly import served_settings
from gardo.rewards.panel import Panel
from gardo.rewards.serving.calls import CallSettings
from gardo.rewards.serving.client import Remote
from gardo.types import Prompt
from tests.engine.rewards.serving.served import (
    CPU,
    PROMPTS,
    QUICK,
    SIZE,
    TOKEN,
    Pairs,
    RewardSettings,
    Told,
    free_port,
    pictures,
    remote,
    running,
    tiny,
    told,
)

DINO = {"kind": "dinov3", "path": "builtin:dinov3", "size": 32, "batch": 4, "dtype": "float32"}
SECTIONS = {"tiny_shape": {}, "tiny_fidelity": {}, "dinov3": DINO}


@pytest.fixture(scope="module")
def rewards():
    return tiny(**SECTIONS)


@pytest.fixture(scope="module")
def url(rewards):
    with running(rewards) as found:
        yield found


@pytest.mark.parametrize("name", SECTIONS)
def test_values_are_those_of_the_reward_here_to_the_bit(url, rewards, name):
    asked = remote(url, name, section={"kind": name, **SECTIONS[name]})
    asked.meet(PROMPTS[0], SIZE)
    images, prompts = pictures(9), [PROMPTS[i % 3] for i in range(9)]
    assert torch.equal(asked.score(images, prompts), rewards[name].score(images, prompts))


def test_a_judge_of_pairs_compares_from_afar():
    with running({"pairs": Pairs(RewardSettings(kind="pairs", role="held_out"), CPU)}) as url:
        asked = remote(url, "pairs", Pairs)
        asked.meet(PROMPTS[0], SIZE)
        first, second = pictures(3), pictures(3, seed=1)
        wanted = (first.mean((1, 2, 3)) > second.mean((1, 2, 3))).float()
        assert torch.equal(asked.compare(first, second, PROMPTS), wanted)


def test_a_call_is_cut_as_the_reward_would_cut_it(url):
    asked = remote(url, "dinov3", section=DINO)
    asked.meet(PROMPTS[0], SIZE)
    value = asked.score(pictures(9), [PROMPTS[0]] * 9)  # 4, 4 and 1
    assert value.shape[0] == 9 and value.isfinite().all()


def meeting_error(*arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        remote(*arguments, **options).meet(PROMPTS[0], SIZE)
    return str(caught.value)


def test_what_the_server_lacks_is_said_with_what_it_has(url):
    assert "has no 'tiny_count'; it has tiny_shape, tiny_fidelity, dinov3" in meeting_error(
        url, "tiny_count"
    )


def test_settings_that_the_recipe_says_must_be_the_servers(url):
    said = meeting_error(url, "dinov3", section={**DINO, "size": 64})
    assert said.startswith("size: 64, but http://127.0.0.1") and "with 32" in said


def test_settings_that_are_left_out_are_the_servers(url):
    remote(url, "dinov3", section={"kind": "dinov3", "path": "builtin:dinov3"}).meet(
        PROMPTS[0], SIZE
    )


def test_a_wrong_token_is_one_clear_error(url):
    assert "401 no such token" in meeting_error(url, "tiny_shape", token="another-token-here")


def test_nobody_there_is_one_clear_error():
    said = meeting_error(f"http://127.0.0.1:{free_port()}", "tiny_shape")
    assert said.startswith("where: http://127.0.0.1") and "4 tries" in said


def test_tokens_are_not_in_errors(url):
    assert TOKEN not in meeting_error(url, "tiny_count")


def ask(reward: Told, *prompts: Prompt, **options):
    """What a client of the reward gets, and the client."""
    with running({"told": reward}) as url:
        asked = remote(url, "told", Told, **options)
        return asked.score(pictures(len(prompts)), prompts), asked


def test_a_failing_reward_is_nan_not_zero_and_not_tried_again():
    reward = told()
    value, asked = ask(reward, Prompt("bad", {"raise": True}))
    assert value.isnan().all() and len(reward.calls) == 1
    assert "RuntimeError: told to by bad" in asked.trouble


def test_a_server_that_hangs_is_nan_after_the_deadline():
    settings = CallSettings(deadline=1.0, attempt=0.4, retries=9, first_pause=0.05)
    began = time.monotonic()
    value, asked = ask(told(), Prompt("slow", {"sleep": 1.5}), settings=settings)
    assert value.isnan().all() and "Timeout" in asked.trouble
    assert time.monotonic() - began < 10


def test_nan_of_the_reward_stays_nan():
    value, asked = ask(told(), Prompt("a"), Prompt("b", {"nan": True}))
    assert value.isnan().tolist() == [False, True] and not asked.trouble


def test_a_server_that_comes_back_in_time_is_waited_for():
    reward, prompts = told(), [Prompt("a")]
    with running({"told": reward}) as url:
        port = int(url.rpartition(":")[2])
    patient = QUICK.model_copy(update={"retries": 100, "deadline": 20.0})
    asked = remote(url, "told", Told, settings=patient)
    wait = asked.begin(pictures(1), prompts)
    time.sleep(0.5)
    with running({"told": reward}, at=port):
        assert torch.equal(wait(), pictures(1).mean((1, 2, 3)))


def test_questions_are_in_flight_side_by_side():
    reward = told()
    with running({"told": reward}) as url:
        asked = remote(url, "told", Told)
        began = time.monotonic()
        waits = [asked.begin(pictures(1), [Prompt("a", {"sleep": 1.0})]) for _ in range(3)]
        assert time.monotonic() - began < 1
        assert all(wait().isfinite().all() for wait in waits)


def test_a_panel_waits_for_what_is_far_after_what_is_here():
    """Here it is computed while the other is asked, and the panel says the same either way."""
    near = tiny(tiny_shape={"role": "proxy"}, tiny_purity={"role": "auxiliary"})
    images, prompts = pictures(6), [PROMPTS[i % 3] for i in range(6)]
    with running({"tiny_purity": near["tiny_purity"]}) as url:
        far = remote(url, "tiny_purity", section={"kind": "tiny_purity", "role": "auxiliary"})
        place = {"sample_B": torch.arange(6), "group_B": torch.arange(6) // 3}
        wanted = Panel(near)(images, prompts, **place)
        panel = Panel({**near, "tiny_purity": far})
        got = panel(images, prompts, **place)
        begun = panel.alone(images, prompts)
        assert callable(begun["tiny_purity"]) and isinstance(begun["tiny_shape"], torch.Tensor)
        later = panel(images, prompts, **place, said=begun)
    for scores in (got, later):
        assert list(scores.rewards) == list(wanted.rewards)
        for name, value in wanted.rewards.items():
            assert torch.equal(scores.rewards[name], value)


def test_a_value_outside_of_its_limits_is_a_failure():
    class Loud(Told):
        limits = (0.0, 0.4)

    reward = Loud(RewardSettings(kind="told", role="proxy"), CPU)
    place = {"sample_B": torch.arange(2), "group_B": torch.zeros(2, dtype=torch.int64)}
    images = torch.stack([torch.full((3, 8, 8), 0.3), torch.full((3, 8, 8), 0.6)])
    scores = Panel({"loud": reward})(images, [Prompt("a")] * 2, **place)
    assert scores.valid_B.tolist() == [True, False]


class Named(RewardSettings):
    model: str = "a"  # a field of its own, though judges have one of that name
    table: dict[str, int] = {}
    calls: CallSettings = CallSettings()


def test_what_is_the_clients_own_is_not_compared_and_the_rest_is():
    """Of settings inside what is said, of a table all of it."""
    of = partial(Named, kind="mine", role="held_out")
    served = of().model_dump(mode="json")

    def check(settings):
        asked = Remote.__new__(Remote)
        asked.settings, asked.name = settings, "mine"
        asked.server = SimpleNamespace(address="there")
        asked._same(served)

    check(of(weight=3.0, calls={"deadline": CallSettings().deadline}))
    served["table"] = {"x": 1, "y": 2}
    for wrong in ({"model": "b"}, {"calls": {"deadline": 7}}, {"table": {"x": 1}}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: .* serves mine with"):
            check(of(**wrong))
    assert "model" in served_settings(of()) and "weight" not in served_settings(of())


def test_no_images_are_no_question():
    asked = Remote.__new__(Remote)
    asked.device, asked.gives_features, asked._width = CPU, False, None
    assert asked.compare(pictures(0), pictures(0), []).shape == (0,)
