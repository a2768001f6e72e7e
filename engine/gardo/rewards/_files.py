"""Which files a reward needs of a folder or a hub id: said in the type of the field that names it.

    path: Annotated[ModelFolder, Holds("CLIPModel")] = Field("owner/name", description="...")
    head: Annotated[str, holding(lambda fields: fields["head_file"])]

A folder without them is an error of the recipe. `find_files` is for the start of a run, before any
model loads: what a hub has is in the cache then, or the run ends. The revision of a hub id is in
the field `revision` if `path` names it, else in FIELD_revision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema
from safetensors import SafetensorError, safe_open

from gardo.hub import download_error
from gardo.rewards.base import RewardSettings
from gardo.settings import FieldError, is_hub_id, model_path, read_object

File = str | tuple[str, ...] | Callable[[Mapping[str, Any]], str]
WEIGHTS = ("model*.safetensors*",)  # one file, or shards and their index
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True)
class Files:
    """Of a field: a hub id, or a folder that holds `needed`, of a tuple one of them.

    A function says which file it is from the fields that stand before. `loaded` are patterns of
    what is loaded beside them; at least one such file must be there when a run starts.
    """

    needed: tuple[File, ...]
    loaded: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._check, handler(source))

    def _check(self, path: str, info: ValidationInfo) -> str:
        if info.data.get("where", "here") != "here":  # it lies where it is scored
            return path
        try:
            missing = self.missing(Path(model_path(path)), info.data)
        except KeyError:  # a field that it depends on is wrong itself, and says so
            return path
        if missing and not is_hub_id(path):
            raise ValueError(
                f"no folder with {missing}: {path!r}; give one, or a hub id owner/name"
            )
        self._look_into(Path(model_path(path)))
        return path

    def _look_into(self, folder: Path) -> None:
        """ValueError where a file of a local folder is torn, or something else; reads headers."""
        if os.path.isfile(config := folder / "config.json"):
            read_object(config)
        for file in (file for pattern in self.loaded for file in folder.glob(pattern)):
            if file.suffix == ".safetensors":
                try:
                    safe_open(file, "np")  # of torch it would load all
                except (OSError, SafetensorError) as error:
                    raise ValueError(
                        f"{str(file)!r} cannot be read: {error}; get it again"
                    ) from None

    def alternatives(self, fields: Mapping[str, Any]) -> list[tuple[str, ...]]:
        chosen = [file(fields) if callable(file) else file for file in self.needed]
        return [(names,) if isinstance(names, str) else names for names in chosen]

    def missing(self, folder: Path, fields: Mapping[str, Any]) -> str:
        """What `needed` asks for, in words, unless the folder has it all."""
        wanted = self.alternatives(fields)
        whole = all(any((folder / name).is_file() for name in names) for names in wanted)
        return "" if whole else " and ".join(" or ".join(names) for names in wanted)

    def absent(self, folder: Path, fields: Mapping[str, Any]) -> list[str]:
        """What the folder lacks when a run starts."""
        loads = not self.loaded or any(any(folder.glob(pattern)) for pattern in self.loaded)
        missing = self.missing(folder, fields)
        return [*filter(None, [missing]), *([] if loads else [" or ".join(self.loaded)])]


def holding(*files: File) -> Files:
    return Files(files)


MODEL_WEIGHTS, TOKENIZER_FILES = Files((), WEIGHTS), Files((), TOKENIZER)
ConfigFolder = Annotated[str, holding("config.json")]
ModelFolder = Annotated[ConfigFolder, MODEL_WEIGHTS]
TokenizerFolder = Annotated[str, holding("tokenizer_config.json"), TOKENIZER_FILES]


class ModelRewardSettings(RewardSettings):
    """Fields of all rewards that run a model; each adds its own `path`."""

    revision: str | None = Field(
        None, description="commit or tag of a hub id `path`; its newest if left out"
    )
    batch: int = Field(32, ge=1, description="images, or prompts, that the model sees at once")
    dtype: Literal["tf32", "float32", "bfloat16", "float16"] = Field(
        "tf32",
        description="of the model; what it gives is float32. tf32: float32 whose matrix products a "
        "GPU takes in TF32 (a CPU has none)",
    )

    def models_inside(self) -> Mapping[str, RewardSettings]:
        """By the field that an error names: rewards whose model in `path` this one runs, as its
        own files say, which are here."""
        return {}


@dataclass(frozen=True)
class Need:
    """The files that a field of a reward's settings names a folder or a hub id of."""

    field: str  # its place in the recipe
    path: str
    revision: str | None
    marks: tuple[Files, ...]
    fields: Mapping[str, Any]  # of the settings, by which a mark may choose its files

    @property
    def patterns(self) -> list[str]:
        """Of all files that a run reads."""
        needed = [n for mark in self.marks for names in mark.alternatives(self.fields)
                  for n in names]  # fmt: skip
        return [*needed, *(pattern for mark in self.marks for pattern in mark.loaded)]

    def lacking(self, folder: Path) -> str:
        """In words, what a folder does not have of them; "" where it has all."""
        return " and ".join(
            text for mark in self.marks for text in mark.absent(folder, self.fields)
        )

    def find(self) -> None:
        """Downloads those of a hub id. ValueError, opening with the field, where one is missing."""
        folder, hub = Path(model_path(self.path)), is_hub_id(self.path)
        if hub:
            from huggingface_hub import snapshot_download

            try:
                folder = Path(
                    snapshot_download(
                        self.path, revision=self.revision, allow_patterns=self.patterns
                    )
                )
            except Exception as error:  # whatever a network, a proxy or a cache can say
                raise self._error(error) from error
        lacks = self.lacking(folder)
        if lacks and hub:
            raise self._error(FileNotFoundError(f"no {lacks} in {folder}"))
        if lacks:
            raise FieldError(f"{self.field}: {self.path!r} holds no {lacks}")

    def _error(self, error: Exception) -> FieldError:
        return download_error(error, self.field, self.path, self.revision, self.patterns)


def find_files(settings: RewardSettings, where: str) -> None:
    """Looks for every file that the fields name, of a judge inside too, and downloads those of hubs

    ValueError, opening with the field behind `where`, for the first that is not there. Of a reward
    that is scored elsewhere nothing is needed here.
    """
    for need in needs_of(settings, where):
        need.find()


def needs_of(settings: RewardSettings, where: str, *, workers: bool = False) -> Iterator[Need]:
    """What `find_files` looks for; with `workers` also what the workers of this machine need."""
    here = settings.where == "here" or (workers and settings.where.startswith("worker"))
    if not here:
        return
    for field, about in type(settings).model_fields.items():
        value, place = getattr(settings, field), f"{where}.{field}"
        if isinstance(value, RewardSettings):
            yield from needs_of(value, place, workers=workers)
        if marks := tuple(mark for mark in about.metadata if isinstance(mark, Files)):
            yield _need(settings, field, place, marks)
    inside = settings.models_inside() if isinstance(settings, ModelRewardSettings) else {}
    for field, its in inside.items():
        marks = tuple(m for m in type(its).model_fields["path"].metadata if isinstance(m, Files))
        yield _need(its, "path", f"{where}.{field}", marks)


def _need(settings: RewardSettings, field: str, place: str, marks: tuple[Files, ...]) -> Need:
    revision = getattr(settings, "revision" if field == "path" else f"{field}_revision")
    return Need(place, getattr(settings, field), revision, marks, vars(settings))
