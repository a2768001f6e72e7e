"""Bytes as people write them."""

from __future__ import annotations

import re


def bytes_of(text: str) -> int:
    """80GB, 79.1GiB, 24g -> bytes. ValueError says what is understood."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GIB|G|)\s*", text.upper())
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is no memory size; write 80GB or 79GiB")
    return int(float(found[1]) * (2**30 if found[2] == "GIB" else 10**9))


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e8 else f"{count / 1e9:.3f}"
