"""The model that stands beside what the campaign measures: seconds of FLOPs and of bytes."""

from __future__ import annotations

import pytest
from diffusers import FluxTransformer2DModel

from block_traffic import MATMULS, MEMORY, flux_traffic, seconds, share
from campaign.flux_model import SMALL


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(**SMALL.transformer)


def test_every_way_to_run_a_lora_moves_less_than_eager(transformer: FluxTransformer2DModel) -> None:
    eager = flux_traffic("eager", transformer)
    for path in ("folded", "kernels", "compiled", "compiled+folded", "kernels+folded"):
        moved = flux_traffic(path, transformer)
        assert moved.forward < eager.forward and moved.backward < eager.backward, path
    alone, both = (flux_traffic(path, transformer) for path in ("folded", "compiled+folded"))
    assert both.forward < alone.forward


def test_without_a_lora_nothing_is_moved_for_it(transformer: FluxTransformer2DModel) -> None:
    with_lora, without = (flux_traffic("eager", transformer, lora) for lora in (True, False))
    assert without.forward < with_lora.forward


def test_traffic_goes_with_blocks_and_width(transformer: FluxTransformer2DModel) -> None:
    shape = dict(SMALL.transformer)
    more = shape | {name: 2 * shape[name] for name in ("num_layers", "num_single_layers")}
    wide = shape | {"num_attention_heads": 2 * shape["num_attention_heads"]}
    for changed in (more, wide):
        twice = flux_traffic("eager", FluxTransformer2DModel(**changed))
        assert twice.forward == pytest.approx(2 * flux_traffic("eager", transformer).forward)


def test_what_was_not_counted_is_refused(transformer: FluxTransformer2DModel) -> None:
    with pytest.raises(ValueError, match="has no"):
        flux_traffic("folded", transformer, lora=False)


def test_a_share_is_the_matmuls_part_of_the_seconds() -> None:
    assert seconds(MATMULS, MEMORY) == pytest.approx(2)
    assert share(MATMULS, MEMORY) == pytest.approx(1 / 2)
    assert share(MATMULS, MEMORY, MATMULS / 3) == pytest.approx(3 / 4)
    assert share(MATMULS, 0) == 1


def test_running_again_moves_the_forward_pass_twice(transformer: FluxTransformer2DModel) -> None:
    moved = flux_traffic("compiled", transformer)
    assert moved.training(True) - moved.training(False) == pytest.approx(moved.forward)
