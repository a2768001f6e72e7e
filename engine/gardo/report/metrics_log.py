"""`metrics.jsonl`: one JSON object a line, the source of truth of a run.

Two kinds of record:

    {"kind": "step", "step": 12, "seconds": {"sample": 1.2, "train": 2.0, "other": 0.01},
     "calls": {"sample": 48, "train": 32}, "rows": {"sample": 576, "train": 384},
     "rewards": {"count": {"mean": 0.67, "std": 0.3, "role": "proxy", "valid": 96, "gated": 0.9}},
     "metrics": {"loss": 0.1, "kl": 2e-4}, "events": ["reference reset (kl)"],
     "images_per_second": 30.6, "peak_bytes": 1710000000}
    {"kind": "evaluation", "step": 0, "seconds": 4.1, "image_count": 288, "prompt_count": 36,
     "rewards": {"count": {"mean": 0.67, "low": 0.61, "high": 0.72, "role": "proxy"}},
     "change": {"count": {"mean": 0.0, "low": 0.0, "high": 0.0}}, "diversity": {"layout": 2.9},
     "images": "samples/step-00000.png", "prompts": ["two red circles"]}

`gated` is the mean of the samples under the gated KL, where these are some and not all.

Where a reward asks a model (rewards/judging), both also have what that took, over all ranks:
`"judges": {"better": {"questions": 552, "known": 0, "unanswered": 0, "unreadable": 3,
"prompt_tokens": 711000, "completion_tokens": 90000, "seconds": 1320.5, "longest": 9.1}}`. `known`
were answered before; the seconds are those of all the others, each from asking to its answer.

`seconds`, `calls` (of models) and `rows` (that these took) are of the first rank's phases; the
seconds add up to the step's wall clock (phase_clock.py). Images are those of all ranks; the peak is
of the rank with most since the start, what torch's allocator held or what lay in memory of a
process. On a GPU both kinds of record have
`"memory": {"sample": 21000000000}`: bytes allocated at the peak of a phase, on the rank where they
are most.

`step` counts the training steps finished when the record was written, so step 0 is the untouched
policy.

Floats are written in full (`repr`): a reader gets back the bits. JSON has no NaN, so numbers that
are not finite are written as the strings "nan", "inf" and "-inf", and read back as floats; text
fields are never read as numbers.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Self

from gardo.files import write_atomically

Record = dict[str, Any]

KINDS = ("step", "evaluation")
_TEXT_FIELDS = frozenset({"kind", "role", "prompts", "images", "events"})
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """The writing end of `metrics.jsonl`; a context manager.

    A line that cannot be written (a full disk) stays in memory and is written before the next one;
    `problem` says why, None while nothing waits.

    Args:
        path: the file; made if it is not there.
        from_step: for a resume. Records with `step >= from_step`, which the resumed run will write
            again, and a last line torn by a crash are dropped; everything before stays as it was,
            byte for byte, other damaged lines too. Resuming after N finished steps is
            `from_step=N + 1`. Without it the file must be new or empty.

    Raises:
        FileExistsError: the file holds records and `from_step` was not given.
    """

    def __init__(self, path: str | Path, *, from_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            if from_step is None:
                raise FileExistsError(
                    f"{self.path} already holds a run's records; resume, or use another folder"
                )
            kept = [
                line
                for line, record in _parse(self.path)
                if record is None or record["step"] < from_step
            ]
            write_atomically(self.path, b"".join(line + b"\n" for line in kept))
        self.problem: OSError | None = None
        self._waiting = b""
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed in `close`

    def write(self, record: Record) -> None:
        """Append one record, so that a reader sees it and a killed process leaves it.

        Raises:
            ValueError: unknown kind, or `step` is not a whole number of at least 0.
            TypeError: a value JSON cannot hold, such as a tensor.
        """
        _check(record)
        text = json.dumps(_to_json(record), ensure_ascii=False, allow_nan=False)
        # A lone surrogate (a badly decoded prompt) becomes \udc80: JSON reads back what it was.
        self._waiting += text.encode("utf-8", "backslashreplace") + b"\n"
        self._write_waiting()

    def sync(self) -> None:
        """Force what was written to the disk."""
        self._write_waiting()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self.problem = error

    def close(self) -> None:
        """The same, then close. A second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:  # a disk may take a part of it
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self.problem = None
        except OSError as error:
            self.problem = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[Record]:
    """All records in the order written; lines that are none, torn or damaged, are left out.

    Raises:
        FileNotFoundError: no such file.
    """
    return [record for _, record in _parse(Path(path)) if record is not None]


def missing(path: str | Path, steps: int = 0) -> list[str]:
    """What is wrong with a log: lines that are no records, and training steps up to `steps`, or to
    the last one there is, that have none. A sentence each."""
    parsed = _parse(Path(path))
    damaged = [number for number, (_, record) in enumerate(parsed, start=1) if record is None]
    there = {r["step"] for _, r in parsed if r is not None and r["kind"] == "step"}
    lost = [step for step in range(1, max([steps, *there]) + 1) if step not in there]
    found = []
    if damaged:
        found.append(f"{path}: not a record, and left out: line {_ranges(damaged)}")
    if lost:
        found.append(f"{path}: nothing of step {_ranges(lost)}")
    return found


def _ranges(numbers: list[int]) -> str:
    """1-3, 7"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def step_records(run_folder: Path) -> list[Record]:
    """The training steps of a run, as `read_metrics` reads them."""
    records = read_metrics(run_folder / "metrics.jsonl")
    return [record for record in records if record["kind"] == "step"]


def _parse(path: Path) -> list[tuple[bytes, Record | None]]:
    """Lines (without their newline) and their records, None where a line is not one.

    Without a last line that is not: a crash tore it, or a run is writing it now.
    """
    lines = path.read_bytes().split(b"\n")  # not splitlines: U+2028 may stand inside a prompt
    if lines[-1] == b"":
        lines.pop()
    parsed: list[tuple[bytes, Record | None]] = []
    for line in lines:
        try:
            record = json.loads(line)
            _check(record)
        except (ValueError, RecursionError):  # bad JSON and bad UTF-8 are ValueErrors too
            parsed.append((line, None))
        else:
            parsed.append((line, _from_json(record)))
    if parsed and parsed[-1][1] is None:
        parsed.pop()
    return parsed


def _check(record: object) -> None:
    if not isinstance(record, dict) or record.get("kind") not in KINDS:
        raise ValueError(f"a record is an object whose kind is one of {', '.join(KINDS)}")
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"a record's step counts finished steps, not {step!r}")


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: item if key in _TEXT_FIELDS else _from_json(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    return value
