"""`gardo eval` with a judge behind an endpoint says what its questions took."""

from __future__ import annotations

from pathlib import Path

from gardo.evaluate import main
from tests.engine.rewards.judging.endpoint import Endpoint

SUITE = """\
name: judged
prompts: prompts.txt
images_per_prompt: 2
steps: 1
size: [16, 16]
text_tokens: 8
batch: 4
shown: 1
rewards:
  good: {kind: vlm, role: held_out, model: judge, where: "WHERE"}
"""


def test_what_was_asked_is_said(endpoint: Endpoint, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("one red circle\ntwo green squares\n")
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE.replace("WHERE", endpoint.where))
    endpoint.hangs = 0.1
    arguments = ["builtin:flux", "--suite", str(suite), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "good: 4 questions (0 known, 0 unanswered, 0 unreadable), " in said
    tokens, seconds = said.split("unreadable), ")[1].split(" tokens, ")
    assert int(tokens.replace(",", "")) > 0 and 0.1 <= float(seconds.split(" s")[0]) < 60
