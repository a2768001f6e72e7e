"""A golden curve: five iterations of GARDO on the tiny Flux, committed with full precision.

One process. A refactor reproduces it; a change of numerics changes the file in the same commit,
with its reason. Other CPUs round differently in the last bits, so values are compared to 1e-4
relative, counts and events exactly. To write it anew:

    python -m tests.integration.test_golden
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from gardo.report.metrics_log import read_metrics
from tests import ROOT
from tests.integration.test_parity import launch

GOLDEN = ROOT / "tests" / "golden" / "tiny_flux_gardo.json"
CASE = "gardo-lora-local"


def curve(folder: Path, case: str = CASE) -> list[dict]:
    launch(0, str(folder), case)
    records = read_metrics(folder / case.replace("+", ".") / "metrics.jsonl")
    return [
        {"step": r["step"], "events": r["events"], "metrics": r["metrics"],
         "rewards": {n: v["mean"] for n, v in r["rewards"].items()}}
        for r in records if r["kind"] == "step"
    ]  # fmt: skip


@pytest.mark.parametrize("case", [CASE, f"{CASE}+triton"])
def test_the_golden_curve_holds(tmp_path: Path, case: str) -> None:
    """By plain torch, and by every kernel that the engine calls, here in Triton's interpreter."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    now = curve(tmp_path, case)
    assert len(golden) == len(now) == 5
    for old, new in zip(golden, now, strict=True):
        assert old["events"] == new["events"]
        for part in ("metrics", "rewards"):
            assert old[part].keys() == new[part].keys()
            for name, value in old[part].items():
                floor = 1e-6 if name in ("loss", "policy_loss", "ratio_error") else 1e-9
                close = math.isclose(value, new[part][name], rel_tol=1e-4, abs_tol=floor)
                assert close, (old["step"], name, value, new[part][name])


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        text = json.dumps(curve(Path(temporary)), indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
