"""TensorBoard: `tensorboard --logdir RUN/tensorboard`, or the folder of all runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import yaml
from PIL import Image


class TensorBoard:
    package = "tensorboard"

    def __init__(self, folder: Path, about: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # of a resumed run, what is there of steps after this one is hidden
        again = {"purge_step": step + 1} if step else {}
        self._writer = SummaryWriter(str(folder / "tensorboard"), **again)
        if not step:
            recipe = yaml.safe_dump(about["recipe"], sort_keys=False)
            self._writer.add_text("recipe", indent(recipe, "    "), 0)  # Markdown's code

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, file: Path, step: int, caption: str) -> None:
        with Image.open(file, formats=["PNG"]) as found:
            pixels = np.asarray(found.convert("RGB"))
        self._writer.add_image("evaluation/samples", pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


PLUGIN = TensorBoard
