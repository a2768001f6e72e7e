"""`gardo rewards check` of judges: their values, and one exchange in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gardo.cli import app
from tests.engine.rewards.judging.endpoint import QUICK, Endpoint
from tests.engine.rewards.serving.served import free_port


def checked(folder: Path, reward: dict[str, Any], *more: str) -> tuple[int, list[str]]:
    file = folder / "rewards.yaml"
    file.write_text(yaml.safe_dump({"rewards": {"it": reward}, "model": {"size": [32, 32]}}))
    done = CliRunner().invoke(app, ["rewards", "check", str(file), *more])
    return done.exit_code, done.stdout.splitlines()


def section(where: str, kind: str = "vlm") -> dict[str, Any]:
    return {"kind": kind, "where": where, "model": "m", "calls": QUICK}


def test_a_judges_exchange_is_shown_in_full(endpoint: Endpoint, tmp_path: Path) -> None:
    code, lines = checked(tmp_path, section(endpoint.where))
    text = "\n".join(lines)
    assert code == 0 and lines[0] == f"ok      it (vlm, {endpoint.where})"
    for part in ("        system:", "            You judge pictures", "        user:",
                 "            [a picture, 32 x 32]", "        answer:", "            Grade: ",
                 "            100 + 10 tokens, ", "        value: 0."):  # fmt: skip
        assert f"\n{part}" in text
    assert len(endpoint.bodies) == 1 + 4, "a question to meet it, and one a picture"
    assert text.count("system:") == 1


@pytest.mark.parametrize("kind", ["unifiedreward_pair", "yes_no_pair"])
def test_a_judge_of_pairs_inside_a_preference_compares_the_pictures(
    endpoint: Endpoint, tmp_path: Path, kind: str
) -> None:
    """Which has no score of one picture alone."""
    preferred = {"kind": "preference", "judge": section(endpoint.where, kind), "opponents": 4}
    code, lines = checked(tmp_path, {**preferred, "role": "proxy"}, "--record", f"{tmp_path}/g")
    assert code == 0, lines
    (said,) = (line for line in lines if "verdicts on 1 and 4, 2 and 3" in line)
    first, second, third, fourth = (float(word) for word in said.partition(":")[2].split())
    assert first + fourth == pytest.approx(1, abs=1e-3) and 0 <= first <= 1
    assert second + third == pytest.approx(1, abs=1e-3)
    assert lines.count("            [a picture, 32 x 32]") == 2
    assert checked(tmp_path, preferred, "--golden", f"{tmp_path}/g")[0] == 0


def test_a_judge_of_single_pictures_inside_a_preference_scores_them(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    code, lines = checked(tmp_path, {"kind": "preference", "judge": section(endpoint.where)})
    assert code == 0 and any(line.startswith("        values ") for line in lines)
    assert any(line.startswith("        value: ") for line in lines)


def test_an_answer_that_cannot_be_read_is_shown_with_why(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.says = "It is a fine picture."
    code, lines = checked(tmp_path, section(endpoint.where))
    why = "no Grade in 'It is a fine picture.'"
    assert code == 1 and lines[0].startswith("FAILED  it ") and lines[1].endswith(f"; {why}")
    assert "            It is a fine picture." in lines and f"        value: {why}" in lines


@pytest.mark.parametrize("inside", [False, True])
def test_an_endpoint_that_is_not_there_is_named_in_seconds(tmp_path: Path, inside: bool) -> None:
    its = section(f"openai:http://127.0.0.1:{free_port()}/v1")
    field = "it.judge.where" if inside else "it.where"
    code, lines = checked(tmp_path, {"kind": "preference", "judge": its} if inside else its)
    assert code == 1 and lines[0].startswith("FAILED  it ")
    assert f"rewards.{field}: http://" in lines[1] and "`vllm serve m --port " in lines[1]
