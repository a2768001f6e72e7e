"""Reads the text of pictures with RapidOCR: a detector and a recogniser that run in onnxruntime.

Neither torch nor anything else of gardo is imported here, so the workers of a pool start fast. The
three libraries are optional and imported where they are used; `require` says how to get them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
from functools import cache
from typing import Any

LIBRARIES = ("rapidocr", "onnxruntime", "rapidfuzz")


def require() -> None:
    """ValueError where a library is missing."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"kind: ocr needs {', '.join(LIBRARIES)}, and {name} cannot be imported ({error}); "
                'pip install "gardo-engine[rewards]"'
            ) from error


@cache
def reader(limit_side_len: int, threads: int) -> Any:
    """One reader a process. The models are in rapidocr's wheel."""
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "critical",  # a picture without text is no news
            "Det.limit_side_len": limit_side_len,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def read(picture_HW3: Any, limit_side_len: int, threads: int) -> str:
    """The lines of text in a picture, joined without a space, top to bottom and left to right.

    `picture_HW3`: a uint8 NumPy array, the channels in BGR order as the reader was trained.
    """
    return "".join(reader(limit_side_len, threads)(picture_HW3).txts or ())


def end_with_parent() -> None:
    """Start of a worker: it must not outlive a trainer that was killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
