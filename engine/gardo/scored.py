"""What the record of a step says of its rewards."""

from __future__ import annotations

import json
import math
from typing import Any

from torch import Tensor

from gardo.distributed.base import Ranks, gather_text
from gardo.rewards.judging.base import added_up
from gardo.rewards.panel import Panel
from gardo.session import Session
from gardo.types import Scores


def summary(s: Session, scores: Scores, gate_B: Tensor, name: str) -> dict[str, Any]:
    """Of a reward over the iteration's samples; of the gated ones too, where some are and not all.

    With the paper's gate a judge that nothing optimises should think less of these.
    """
    value_B, valid_B = scores.rewards[name], scores.masks[name]
    valid, gated = value_B[valid_B], value_B[valid_B & gate_B]
    caught = {"gated": float(gated.mean())} if 0 < len(gated) < len(valid) else {}
    return caught | {
        "mean": float(valid.mean()),
        "std": float(valid.std(correction=0)) if len(valid) else math.nan,
        "role": s.panel.rewards[name].settings.role,
        "valid": len(valid),
    }


def judges(panel: Panel, ranks: Ranks) -> dict[str, Any]:
    """What questions to models have taken, over all ranks; nothing where no reward asks one."""
    costs = panel.costs()
    if not costs:
        return {}
    every = [json.loads(said) for said in gather_text(ranks, json.dumps(costs))]
    return {"judges": {name: added_up([one[name] for one in every]) for name in costs}}
