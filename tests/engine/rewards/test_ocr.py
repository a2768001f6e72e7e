"""The OCR reward, with the real reader on rendered texts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gardo import plugins
from gardo.rewards.ocr import MATCHING, Ocr, plain, sign, target_of, to_pictures
from gardo.types import Prompt
from tests import ROOT

CPU = torch.device("cpu")


def build(**settings: Any) -> Ocr:
    plugin = plugins.resolve("gardo.rewards", "ocr")
    return plugin(plugin.Settings(role="proxy", **settings), CPU)


def rendered(*texts: str) -> Tensor:
    """[B, 3, 128, 256] in [0, 1]."""
    pictures = np.stack([sign(text) for text in texts])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def quoted(*texts: str) -> list[Prompt]:
    return [Prompt(f'"{text}"') for text in texts]


# ---- the target and the formula ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "OPEN Today"', "opentoday"),
        ('"a" above "b"', "a"),
        ("a mug with “Good  Morning” on it", "goodmorning"),
        ('“first” and "second"', "first"),
        ("it's '\"ÉTÉ 24!\"'", "été24!"),
        ('two lines "up\ndown"', "updown"),
    ],
)
def test_target_is_what_the_first_quotes_hold(prompt: str, target: str) -> None:
    assert target_of(Prompt(prompt)) == target
    Ocr.check_prompt(Prompt(prompt))


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("a sign that says OPEN", "has no text in quotes"),
        ('a 5" pipe', "has no text in quotes"),
        ("it's a dog's", "has no text in quotes"),
        ('a sign "" and "b"', "the first pair of quotes is empty"),
        ('a sign " \t"', "the first pair of quotes is empty"),
        ("a sign “”", "the first pair of quotes is empty"),
    ],
)
def test_prompts_without_a_target_are_refused(prompt: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        Ocr.check_prompt(Prompt(prompt))
    assert repr(prompt) in str(error.value)


def test_the_metadata_names_the_target() -> None:
    assert target_of(Prompt('a sign: "OPEN"', {"text": " Closed Today"})) == "closedtoday"
    assert target_of(Prompt("an open shop", {"text": "OPEN"})) == "open"
    assert target_of(Prompt('a sign: "OPEN"', {"tag": "sign"})) == "open"
    for text in ("", " \n", 24, None):
        with pytest.raises(ValueError, match=f"'a sign': \"text\" is {re.escape(repr(text))}; it"):
            Ocr.check_prompt(Prompt("a sign", {"text": text}))


def edits(a: str, b: str) -> int:
    """Levenshtein's table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


@settings(deadline=None)  # the first import of rapidfuzz takes what a busy machine gives it
@given(seen=st.text("abc", max_size=9), target=st.text("abc", min_size=1, max_size=5))
def test_matching_is_the_formula(seen: str, target: str) -> None:
    strict, compat = (MATCHING[name](seen, target) for name in ("strict", "compat"))
    assert strict == 1 - min(edits(seen, target), len(target)) / len(target)
    assert compat == (1 if target in seen else strict)
    assert 0 <= strict <= compat <= 1 and (strict == 1) == (seen == target)


# ---- reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward() -> Ocr:
    return build()


def test_rendered_texts_are_read(reward: Ocr) -> None:
    images = rendered("HELLO", "HELLO", "HALLO", "WORLD", "")
    prompts = [Prompt("a card", {"text": "Hel lo"}), *quoted("HELLO", "hello", "I am", "I")]
    values = reward.score(images, prompts)
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx([1, 1, 0.8, 0, 0])


def test_only_compat_overlooks_extra_text(reward: Ocr) -> None:
    images = rendered("BIG SALE", "SALE\nSALE", "SALES", "SAIL")
    prompts = quoted(*["SALE"] * 4)
    assert reward.score(images, prompts).tolist() == pytest.approx([0.25, 0, 0.75, 0.5])
    lenient = build(matching="compat").score(images, prompts)
    assert lenient.tolist() == pytest.approx([1, 1, 1, 0.5])


def test_lines_are_read_from_the_top(reward: Ocr) -> None:
    (text,) = reward.texts([sign("UP\nDOWN")])
    assert text is not None and plain(text) == "updown"


def test_pictures_are_8_bits_in_bgr() -> None:
    images = torch.zeros(1, 3, 2, 2)
    images[0, :, 0, 1] = torch.tensor([1.0, 0.5, -0.2])
    (picture,) = to_pictures(images)
    assert picture is not None and picture.dtype == np.uint8 and picture.shape == (2, 2, 3)
    assert picture[0, 1].tolist() == [0, 128, 255] and picture.sum() == 383


def test_the_batch_does_not_matter() -> None:
    images, prompts = rendered("ONE", "TWO", "SIX"), quoted("ONE", "TWO", "NINE")
    images[2, 0, 5, 5] = torch.nan
    with pytest.warns(UserWarning, match="image 2 cannot be read"):
        values = build(batch=2).score(images, prompts)
    assert values[:2].tolist() == [1, 1] and bool(values[2].isnan())


# ---- failures ------------------------------------------------------------------------------------


def test_an_image_that_is_not_finite_has_no_value(reward: Ocr) -> None:
    images = rendered("ONE", "TWO", "SIX")
    images[1, 0, 5, 5] = torch.nan
    with pytest.warns(UserWarning, match="image 1 cannot be read: .*not finite"):
        values = reward.score(images, quoted("ONE", "TWO", "SIX"))
    assert values[[0, 2]].tolist() == [1, 1] and bool(values[1].isnan())


@pytest.fixture(scope="module")
def pooled() -> Ocr:
    return build(workers=1)


@pytest.mark.parametrize("where", ["reward", "pooled"])
def test_a_reader_that_fails_loses_one_image(where: str, request: pytest.FixtureRequest) -> None:
    """RapidOCR divides by the height: an empty picture makes it raise."""
    reward: Ocr = request.getfixturevalue(where)
    with pytest.warns(UserWarning, match="image 1 cannot be read: ZeroDivisionError"):
        texts = reward.texts([sign("ONE"), np.zeros((0, 0, 3), np.uint8), sign("SIX")])
    assert texts == ["ONE", None, "SIX"]


def test_a_pool_survives_its_worker(pooled: Ocr) -> None:
    images, prompts = rendered("ONE", "TWO", "SIX"), quoted("ONE", "TWO", "NINE")
    expected = [1, 1, 0.25]
    assert pooled.score(images, prompts).tolist() == expected
    assert pooled.pool
    (pid,) = pooled.pool._processes
    os.kill(pid, signal.SIGKILL)
    assert pooled.score(images, prompts).tolist() == expected
    assert pid not in pooled.pool._processes


KILLED_TRAINER = """
import os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from gardo.rewards.ocr_reader import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)
    pid = pool.submit(os.getpid).result()
    Path("said").write_text(f"{pid} {'torch' in sys.modules}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_trainer(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text(KILLED_TRAINER)
    path = f"{ROOT / 'engine'}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "trainer.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGKILL
    pid, torch_loaded = (tmp_path / "said").read_text().split()
    assert torch_loaded == "False"
    end = time.monotonic() + 10
    while running(int(pid)) and time.monotonic() < end:
        time.sleep(0.05)
    left = running(int(pid))
    if left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left


def running(pid: int) -> bool:
    """Not gone, and not a zombie that nobody has waited for."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("library", ["rapidocr", "onnxruntime", "rapidfuzz"])
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # Python's way to say: not importable
    with pytest.raises(ValueError, match=f"{library} cannot be imported") as error:
        build()
    assert 'pip install "gardo-engine[rewards]"' in str(error.value)
