"""Records of a run as its log holds them."""

from pathlib import Path
from typing import Any

from gardo.report.metrics_log import MetricsLog

EVIL = "two <script>alert('x')</script> circles & a \"square\""


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {
        "kind": "step",
        "step": step,
        "seconds": {"sample": 18.2, "reward": 3.1, "train": 24.0},
        "rewards": {
            "hpsv2": {"mean": 0.312 + step / 1000, "std": 0.1, "role": "proxy", "valid": 96},
            "aesthetic": {"mean": 5.5, "std": 0.1, "role": "auxiliary", "valid": 96},
            "pickscore": {"mean": 22.41, "std": 0.1, "role": "held_out", "valid": 96},
        },
        "metrics": {
            "kl": 1.9e-4, "ratio": 1.0, "ratio_error": 3e-5, "clip_fraction": 0.11,
            "gate_share": 0.004, "diversity": 17.3, "loss": 0.1,
        },
        "events": [],
    }  # fmt: skip
    return record | changes


def evaluation_record(step: int, *, proxy: float = 0.0, held_out: float = 0.0) -> dict[str, Any]:
    def around(value: float, **extra: str) -> dict[str, Any]:
        return {"mean": value, "low": value - 0.01, "high": value + 0.01, **extra}

    return {
        "kind": "evaluation",
        "step": step,
        "seconds": 4.1,
        "rewards": {
            "count": around(0.6 + proxy, role="proxy"),
            "quality": around(0.9 + held_out, role="held_out"),
        },
        "change": {"count": around(proxy), "quality": around(held_out)},
        "diversity": {"layout": 3.0 - step / 100},
        "images": f"samples/step-{step:05d}.png",
        "image_count": 288,
        "prompt_count": 36,
        "prompts": [EVIL, "one green triangle"],
    }


def write_log(path: Path, records: list[dict[str, Any]]) -> None:
    with MetricsLog(path) as log:
        for record in records:
            log.write(record)
