"""Triton's interpreter, without the third of its time that changes nothing.

A launch replaces the language's functions by interpreted ones. The interpreter looks through the
whole language for that, and again for every call of a device function, which finds it replaced.
"""

from __future__ import annotations

import functools
from typing import Any


def look_once() -> None:
    """Looks for what is to be replaced only where something is. Once a process."""
    import triton.language as tl
    from triton.runtime import interpreter

    if isinstance(interpreter._patch_lang, functools.partial):
        return

    @functools.cache
    def seen_by(function: Any) -> list[Any]:
        return [x for x in function.__globals__.values() if x is tl or x is tl.core]

    def replace(replace_all: Any, function: Any) -> Any:
        if any(tl.core.is_builtin(lang.load) for lang in seen_by(function)):
            return replace_all(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = functools.partial(replace, interpreter._patch_lang)
