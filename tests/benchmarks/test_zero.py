"""What ZeRO adds to a micro-batch: the runs that are compared, and the collectives they count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench_zero import RECIPE, SMALL, WAYS, WEIGHTS, Way
from collectives import Collectives
from gardo.config import load
from gardo.planner import geometry
from tests.integration.launch import Launched


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.name}, {way.ranks}")
def test_every_way_trains_as_many_micro_batches_a_rank(way: Way) -> None:
    for kind in WEIGHTS.values():
        prompts = f"data.prompts_per_step={2 * way.ranks}"
        recipe = load(RECIPE, [*SMALL, *way.settings, kind, prompts])
        plan = geometry(recipe, rank=0, world=way.ranks)
        assert (plan.accumulation, plan.micro_batch) == (6, 4)


def exchange(out: Path) -> None:
    """A rank: gathers, reduces and waits, and says what was counted."""
    dist.init_process_group("gloo")
    with Collectives() as collectives:
        whole, part = torch.zeros(8), torch.ones(4)
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(output=part, input=whole)
        dist.all_gather([torch.zeros(4), torch.zeros(4)], part)
        dist.all_reduce(part.double())
        dist.barrier()
    dist.all_reduce(part)
    counted = [dict(collectives.calls), dict(collectives.bytes)]
    (out / f"{dist.get_rank()}.json").write_text(json.dumps([counted, whole.tolist()]))
    dist.destroy_process_group()


def test_collectives_are_counted_while_it_is_open(tmp_path: Path) -> None:
    Launched(2, exchange, tmp_path).wait()
    bytes_ = {"all_gather_into_tensor": 32, "reduce_scatter_tensor": 32, "all_gather": 32,
              "all_reduce": 32, "barrier": 0}  # fmt: skip
    for rank in range(2):
        (calls, counted), whole = json.loads((tmp_path / f"{rank}.json").read_text())
        assert calls == dict.fromkeys(bytes_, 1) and counted == bytes_
        assert whole == 8 * [1.0]
