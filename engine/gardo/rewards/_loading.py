"""Loading of the frozen models of rewards: whole, or not at all."""

from __future__ import annotations

from typing import Any

import torch


def filled_model(
    model_class: Any, where: str, name: str | None, *, exact: bool = False, **options: Any
) -> Any:
    """`from_pretrained` in float32 on the CPU, but an error for what it would draw at random.

    `options` are its own. ValueError, opening with `where`, names a weight that is missing or has
    another shape; with `exact` also one that the class does not have.
    """
    model, report = model_class.from_pretrained(
        name,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # the report names them
        output_loading_info=True,
        **options,
    )
    wrong = {
        "lacks": report["missing_keys"],
        "has another shape of": {key for key, *_ in report["mismatched_keys"]},
        "also has": report["unexpected_keys"] if exact else (),
    }
    for what, keys in wrong.items():
        if keys:
            first, more = min(keys), len(keys) - 1
            raise ValueError(
                f"{where} {what} {first}{f' and {more} more' if more else ''}; "
                f"is it a whole {model_class.__name__} of this size?"
            )
    return model
