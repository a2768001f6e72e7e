"""What each way to keep activations costs: bytes a training row, and how much runs again.

    ./run bench checkpointing

The models at their published sizes on fake tensors (planner/shadow.py): no weights, no GPU. Bytes
are what a second row adds to the peak of a training step; work run again is counted in FLOPs of
matmuls and attention, as a share of a forward pass. Writes benchmarks/results/checkpointing.csv and
the table of docs/distributed.md.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, get_args

import torch

from gardo.config import load
from gardo.planner.shadow import Shadow
from gardo.policies.checkpointing import Checkpointing
from pages import ROOT, fill, revision

RESULTS = ROOT / "benchmarks" / "results" / "checkpointing.csv"
LARGE = "model.path=stabilityai/stable-diffusion-3.5-large"
MODELS = {
    "FLUX.1-dev": ("flux_gardo_hpsv2", []),
    "SD3.5 Medium": ("sd3_gardo_geneval", []),
    "SD3.5 Large": ("sd3_gardo_geneval", [LARGE]),
}
WEIGHTS = {"LoRA": [], "full": ["train.weights={kind: full}"]}
MODES = ("none", "matmuls", "selective", "full")
assert set(MODES) == set(get_args(Checkpointing))


def measured(shadow: Shadow) -> Iterator[dict[str, Any]]:
    """A row of the table for each mode."""
    forward, plain = shadow.flops(backward=False), shadow.flops(backward=True)
    for mode in MODES:
        one, two = (shadow.training_bytes(rows, mode) for rows in (1, 2))
        shadow.policy.checkpoint_activations(mode)
        again = shadow.flops(backward=True) - plain
        shadow.policy.transformer.disable_gradient_checkpointing()
        yield {
            "checkpointing": mode,
            "bytes_a_row": two - one,
            "again_percent": round(100 * again / forward, 1),
            "forward_tflop": round(forward / 1e12, 2),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """GiB a row and work run again, a line a model and a column a mode."""
    lines = [
        f"| | {' | '.join(f'`{mode}`' for mode in MODES)} |",
        f"|---|{'---|' * len(MODES)}",
    ]
    for first in range(0, len(rows), len(MODES)):
        found = rows[first : first + len(MODES)]
        cells = (f"{r['bytes_a_row'] / 2**30:.2f} GiB, {r['again_percent']:.1f} %" for r in found)
        lines.append(f"| {found[0]['model']}, {found[0]['weights']} | {' | '.join(cells)} |")
    pixels, tokens = rows[0]["size"], {r["model"]: r["text_tokens"] for r in rows}
    told = ", ".join(f"{model} {number}" for model, number in tokens.items())
    lines += [
        "",
        f"What a row of a micro-batch adds to the peak of a training step, in bf16 at {pixels} "
        f"pixels (T5 tokens: {told}), and which share of a forward pass runs again; counted on "
        "fake tensors, not measured on a GPU (`./run bench checkpointing`, torch "
        f"{torch.__version__}, revision {revision()}).",
    ]
    return "\n".join(lines)


def main() -> None:
    rows = []
    for model, (recipe, more) in MODELS.items():
        for weights, kind in WEIGHTS.items():
            loaded = load(ROOT / "recipes" / f"{recipe}.yaml", [*more, *kind], prompts=False)
            facts = {
                "model": model, "weights": weights,
                "size": "x".join(map(str, loaded.model.size)),
                "text_tokens": loaded.model.text_tokens,
            }  # fmt: skip
            for found in measured(Shadow(loaded)):
                rows.append(facts | found | {"torch": torch.__version__, "revision": revision()})
                print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    fill(ROOT / "docs" / "distributed.md", "checkpointing", table(rows))


if __name__ == "__main__":
    main()
