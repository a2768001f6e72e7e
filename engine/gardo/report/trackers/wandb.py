"""Weights & Biases: the project `gardo`, or WANDB_PROJECT; offline where there is no key.

Offline runs lie in RUN/wandb, for `wandb sync`. Everything else is as its own environment variables
say (WANDB_MODE, WANDB_ENTITY, ...). The key is W&B's own matter: the environment, or `wandb login`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class WeightsAndBiases:
    package = "wandb"

    def __init__(self, folder: Path, about: Mapping[str, Any], step: int) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gardo"),
            dir=folder,
            id=about["id"],
            name=about["name"],
            config=about["recipe"],
            resume="allow",
            mode=mode,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                x_disable_machine_info=True,  # names of the user and of folders among it
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, file: Path, step: int, caption: str) -> None:
        image = self._wandb.Image(str(file), caption=caption)
        self._run.log({"evaluation/samples": image, "step": step})

    def close(self) -> None:
        self._run.finish()


def _has_key() -> bool:
    """In the environment, or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


PLUGIN = WeightsAndBiases
