"""Prompts out of a data set, by the library `datasets`: of the Hugging Face hub, or of a folder.

    data: {prompts: "hf:owner/name", split: train, column: caption}
    data: {prompts: "hf:my_folder"}        # parquet, csv or jsonl; or what save_to_disk wrote

The column is the text; what else is JSON by its type (numbers, texts, lists and records of them) is
the prompt's metadata, as in a .jsonl file; what is null is not there. Pictures, sounds and dates
are left out, and not read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from gardo.data import MAX_PROMPTS, prompt_of
from gardo.settings import FieldError, check_installed, is_hub_id
from gardo.types import Prompt

MARK = "hf:"
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes: of splits, of one
JSON_TYPE = re.compile(r"bool|u?int\d+|float\d+|(large_)?string(_view)?")


def is_dataset(source: str | None) -> bool:
    """Whether `data.prompts` names a data set, and no file."""
    return source is not None and source.startswith(MARK)


@lru_cache(maxsize=2)
def dataset_prompts(
    source: str, split: str, column: str, revision: str | None
) -> tuple[Prompt, ...]:
    """The prompts of a data set `hf:FOLDER` or `hf:owner/name`; read once.

    FieldError, opening with the field of the recipe, for what cannot be had; ValueError for a row
    whose column holds no text.
    """
    path = source.removeprefix(MARK)
    check_installed("datasets", "data.prompts")
    if not os.path.isdir(path) and not is_hub_id(path):
        raise FieldError(
            f"data.prompts: no such folder: {path!r}; give a data set's folder, or a hub id "
            "owner/name"
        )
    rows = _opened(path, split, revision)
    if column not in rows.column_names:
        raise FieldError(
            f"data.column: {column!r} is no column of {path!r}; there are "
            f"{', '.join(rows.column_names)}"
        )
    if not 0 < len(rows) <= MAX_PROMPTS:
        raise FieldError(
            f"data.split: {split} of {path!r} has {len(rows)} rows; 1 to {MAX_PROMPTS} can be "
            "prompts; a part of a split is, for example, train[:10000]"
        )
    kept = [n for n in rows.column_names if n == column or _is_json(rows.features[n])]
    prompts = []
    for number, row in enumerate(rows.select_columns(kept), start=1):
        try:
            prompts.append(prompt_of({column: row[column], **_said(row)}, column))
        except ValueError as error:
            raise ValueError(f"row {number} of {path!r}: {error}") from None
    return tuple(prompts)


def _opened(path: str, split: str, revision: str | None) -> Any:
    """The rows of a split. FieldError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if any((Path(path) / name).is_file() for name in SAVED):
            saved = datasets.load_from_disk(path)
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if split not in saved:
                raise ValueError(f'Unknown split "{split}". There are {", ".join(saved)}')
            return saved[split]
        return datasets.load_dataset(path, split=split, revision=revision)
    except Exception as error:  # whatever a network, a cache or a reader of files can say
        first, *_ = str(error).splitlines() or [type(error).__name__]
        if "split" in first.lower():
            raise FieldError(f"data.split: {split!r} of {path!r}: {first}") from error
        raise FieldError(
            f"data.prompts: the data set {path!r} cannot be loaded: {first}; check the spelling, "
            "or get it to a folder where the hub is in reach: "
            f"hf download --repo-type dataset {path}"
        ) from error


def _said(value: Any) -> Any:
    """Without the fields of records that are None: `datasets` gives every row all of them, and a
    .jsonl file would not have them."""
    if isinstance(value, Mapping):
        return {name: _said(inner) for name, inner in value.items() if inner is not None}
    return [_said(inner) for inner in value] if isinstance(value, list) else value


def _is_json(feature: Any) -> bool:
    """Whether all values of a column's type are JSON."""
    if type(feature).__name__ == "Json":  # records that have not all fields
        return True
    if isinstance(feature, Mapping):
        return all(map(_is_json, feature.values()))
    if isinstance(feature, list):
        return all(map(_is_json, feature))
    inner = getattr(feature, "feature", None)  # of lists
    if inner is not None:
        return _is_json(inner)
    return JSON_TYPE.fullmatch(str(getattr(feature, "dtype", ""))) is not None
