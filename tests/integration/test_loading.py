"""No rank holds a second copy of the model while it is loaded."""

from __future__ import annotations

import pytest

import bench_load


@pytest.mark.full
def test_a_rank_holds_its_part_of_the_model_and_no_more() -> None:
    """The benchmark on 0.5 billion parameters: half of them on each of two ranks, plus a LoRA."""
    rows = bench_load.rows_of(1536, ["lora"])
    size = rows[0]["model_mib"]
    assert rows[0]["parameters"] > 5e8
    peaks = {(r["way"], r["rank"]): r["peak_above_mib"] for r in rows}
    assert max(peaks["streamed", 0], peaks["streamed", 1]) < 0.85 * size
    assert max(peaks["whole", 0], peaks["whole", 1]) > size  # what the first line rules out
