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

from tests import ROOT
from tests.integration.cases import Case
from tests.integration.checks import steps_of
from tests.integration.launch import start, wait_for

GOLDEN = ROOT / "tests" / "golden" / "tiny_flux_gardo.json"
CASE = Case("gardo", "lora", "local", ("large",), steps=5, probes=())
TRITON = CASE.but(kernels="triton", steps=3)  # until after the reset: the interpreter is slow
WAYS = [CASE.plus("folded"), CASE.plus("compiled", "folded", "block_kernels")]


def curve(folder: Path, case: Case) -> list[dict]:
    return [
        {"step": r["step"], "events": r["events"], "metrics": r["metrics"],
         "rewards": {n: v["mean"] for n, v in r["rewards"].items()}}
        for r in steps_of(folder, case)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    wait_for([start(0, folder, [case]) for case in (CASE, TRITON)])
    wait_for([start(0, folder, [case]) for case in WAYS])
    return folder


@pytest.mark.parametrize("case", [CASE, TRITON, *WAYS], ids=str)
def test_the_golden_curve_holds(trained: Path, case: Case) -> None:
    """By plain torch, by every kernel that the engine calls, here in Triton's interpreter, and
    however the model is run."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    now = curve(trained, case)
    assert len(golden) == CASE.steps and len(now) == case.steps
    for old, new in zip(golden, now, strict=False):
        assert old["step"] == new["step"]
        assert old["events"] == new["events"]
        for part in ("metrics", "rewards"):
            assert old[part].keys() == new[part].keys()
            for name, value in old[part].items():
                floor = 1e-6 if name in ("loss", "policy_loss", "ratio_error") else 1e-9
                close = math.isclose(value, new[part][name], rel_tol=1e-4, abs_tol=floor)
                assert close, (old["step"], name, value, new[part][name])


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        start(0, Path(temporary), [CASE]).wait()
        text = json.dumps(curve(Path(temporary), CASE), indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")
