"""What the counts of whole blocks predict: A MODEL of an H100, never a measurement.

A call takes its FLOPs at the rate of matrix products, and then, beside those and attention, the
bytes of results/model_counts.csv (`./run bench model`) at a stated bandwidth, one after the other.

Bytes are those of a token, image or text, through all blocks; they go with the width.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from core_ops import report
from pages import ROOT

COUNTS = ROOT / "benchmarks" / "results" / "model_counts.csv"
MATMULS, MEMORY = 790e12, 3.0e12  # FLOP/s and bytes/s of an H100 at work, both assumed
WIDTH = 3072  # of the Flux that was counted


class Traffic(NamedTuple):
    """Bytes a token that are moved beside matmuls and attention."""

    forward: float
    backward: float

    def training(self, again: bool) -> float:
        """Forward and backward; `again` where checkpointing runs all of it but matmuls twice."""
        return (1 + again) * self.forward + self.backward


def flux_traffic(path: str, transformer: Any, lora: bool = True) -> Traffic:
    """Of a FluxTransformer2DModel that trains a LoRA, or all of itself.

    `path` says how blocks run, as "compiled+kernels+folded": any of the three; eager diffusers and
    PEFT where it is none of them. ValueError for what was not counted.
    """
    parts = path.split("+")
    case = {
        "weights": "lora" if lora else "full",
        "model": ", ".join(part for part in ("folded", "kernels") if part in parts) or "as it is",
        "mode": "compiled" if "compiled" in parts else "eager",
    }
    found = {row["block"]: row for row in _counts() if case.items() <= row.items()}
    blocks = {
        "FluxTransformerBlock": len(transformer.transformer_blocks),
        "FluxSingleTransformerBlock": len(transformer.single_transformer_blocks),
    }
    if not blocks.keys() <= found.keys():
        raise ValueError(f"{COUNTS.name} has no {case}")
    scale = 1e3 * transformer.inner_dim / WIDTH
    return Traffic(
        *(
            scale * sum(n * float(found[kind][f"{way}_kb_token"]) for kind, n in blocks.items())
            for way in ("forward", "backward")
        )
    )


@cache
def _counts() -> list[dict[str, str]]:
    return report.read(COUNTS)


def seconds(flops: float, moved: float, rate: float = MATMULS) -> float:
    return flops / rate + moved / MEMORY


def share(flops: float, moved: float, rate: float = MATMULS) -> float:
    """Of the matmul ceiling."""
    return flops / rate / seconds(flops, moved, rate)
