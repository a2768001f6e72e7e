"""What a tracker is told of a run: the records of metrics.jsonl, and evaluations' pictures.

    run: {track: [tensorboard, wandb]}

The first rank alone has trackers. One that fails is left out with a message: a run never ends for
it, nor waits. A run that is resumed goes on in the same place; values after the step that it goes
on from are written again. Your own is a class with this protocol, `my_module:MyTracker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gardo import plugins

PACKAGE = "gardo.report.trackers"
Record = Mapping[str, Any]


class Tracker(Protocol):
    """`package` is what must be installed for it."""

    package: str | None

    def __init__(self, folder: Path, about: Mapping[str, Any], step: int) -> None:
        """`folder`: the run's; `about`: its `id`, `name` and resolved `recipe` as JSON; `step`: how
        many steps it has done."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers after `step` steps, by name: rewards/hpsv2/mean."""

    def picture(self, file: Path, step: int, caption: str) -> None:
        """A PNG of an evaluation after `step` steps."""

    def close(self) -> None:
        """The run is over, or cut."""


def tracker_class(name: str) -> type[Tracker]:
    """ValueError says which there are."""
    found: type[Tracker] = plugins.resolve(PACKAGE, name)
    return found


def values_of(record: Record) -> dict[str, float]:
    """The numbers of a record by their paths; what is no number is left out."""
    skipped = {"kind", "step", "prompts", "images", "events"}
    inner = {name: value for name, value in record.items() if name not in skipped}
    prefix = "evaluation/" if record["kind"] == "evaluation" else ""
    return {f"{prefix}{path}": value for path, value in _leaves(inner)}


def _leaves(mapping: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{path}", number) for path, number in _leaves(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


class Trackers:
    """All of a run."""

    def __init__(self, folder: Path, say: Callable[[str], object]) -> None:
        self._folder, self._say = folder, say
        self._all: dict[str, Tracker] = {}

    def start(self, names: Sequence[str], about: Mapping[str, Any], step: int) -> None:
        for name in names:
            with _Kept(self, name):
                self._all[name] = tracker_class(name)(self._folder, about, step)

    def write(self, record: Record) -> None:
        """A record of metrics.jsonl."""
        values = values_of(record)
        for name, tracker in list(self._all.items()):
            with _Kept(self, name):
                tracker.log(values, record["step"])
                if isinstance(image := record.get("images"), str):
                    caption = ", ".join(map(str, record.get("prompts", ())))
                    tracker.picture(self._folder / image, record["step"], caption)

    def close(self) -> None:
        for name, tracker in list(self._all.items()):
            with _Kept(self, name):
                tracker.close()
        self._all = {}

    def lose(self, name: str, error: Exception) -> None:
        self._all.pop(name, None)
        first = (str(error).splitlines() or [type(error).__name__])[0]
        self._say(f"run.track: {name} has failed and is left out from here on: {first}")


class _Kept:
    """Inside, an error is a tracker's own: it is left out, and the run goes on."""

    def __init__(self, trackers: Trackers, name: str) -> None:
        self._trackers, self._name = trackers, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._trackers.lose(self._name, error)
        return True
