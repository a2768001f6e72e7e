"""What a recipe says of its model, checked against the folder before anything loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gardo.policies.attention import BACKENDS, check_name
from gardo.policies.embeddings import Residence
from gardo.policies.weights import shapes_in
from gardo.settings import (
    FieldError,
    Pair,
    Strict,
    config_folder,
    is_hub_id,
    model_path,
    read_object,
    read_value,
)


class PolicySettings(Strict):
    """What every family needs to be told. A local folder is looked into before anything loads."""

    pipeline_name: ClassVar[str]  # `_class_name` in model_index.json

    family: str = Field(
        description="which model family: a built-in name, or module:Class of your own",
    )
    path: str = Field(description="hub id, local folder in diffusers format, or builtin:NAME")
    revision: str | None = Field(
        None, description="commit, tag or branch of a hub id; its main branch if left out"
    )
    base: Literal["nf4", "int8", "bf16"] | None = Field(
        None,
        description="how the frozen weights are kept: nf4 and int8 (bitsandbytes, for LoRA), or as "
        "distributed.precision if left out",
    )
    size: Pair[Annotated[int, Field(gt=0, le=16_384)]] = Field(
        description="height and width in pixels"
    )
    guidance: float = Field(3.5, ge=0, description="guidance scale")
    text_tokens: int = Field(
        512, ge=1, le=512, description="T5 tokens a prompt is cut or padded to"
    )
    encoders: Residence = Field(
        "offload",
        description="where the text encoders wait: resident on the GPU; offload: in host memory, "
        "but while a new prompt is encoded; free: nowhere, all prompts are encoded beforehand",
    )
    attention: Annotated[str, AfterValidator(check_name)] = Field(
        "native",
        description="what computes attention",
        json_schema_extra={"enum": [name for name, b in BACKENDS.items() if b.backward]},
    )
    block_kernels: bool = Field(
        False,
        description="has the model's blocks take our kernels between their matmuls: norms, "
        "modulation, rotation, gates, GELU",
    )

    @field_validator("path")
    @classmethod
    def _exists(cls, value: str) -> str:
        path = Path(model_path(value))
        if not os.path.isdir(path):
            if not is_hub_id(value):
                raise ValueError(
                    f"no such folder: {value!r}; give a diffusers folder or a hub id owner/name"
                )
            return value
        index = path / "model_index.json"
        if not index.is_file():
            raise ValueError(f"{value!r} has no model_index.json: not a folder in diffusers format")
        found = read_object(index).get("_class_name")
        if found != cls.pipeline_name:
            raise ValueError(
                f"{value!r} holds a {found}, this family needs a {cls.pipeline_name}; change "
                "model.family or model.path"
            )
        return value

    @field_validator("revision")
    @classmethod
    def _of_a_hub_id(cls, value: str | None, info: ValidationInfo) -> str | None:
        path = info.data.get("path", "")
        if value is not None and path and not is_hub_id(path):
            raise ValueError(f"a folder, model.path: {path!r}, has no revisions; leave it out")
        return value

    @model_validator(mode="after")
    def _size_fits(self) -> Self:
        config = Path(model_path(self.path)) / "vae" / "config.json"
        if os.path.isfile(config):
            check_size(self.size, 2 ** len(read_value(config, "block_out_channels", list)))
        return self


def check_size(size: tuple[int, int], multiple: int) -> None:
    """ValueError where the pixels do not make whole latent patches; names sizes that do."""
    if any(side % multiple for side in size):
        near = [max(multiple, round(side / multiple) * multiple) for side in size]
        raise ValueError(
            f"size: {list(size)} is not a multiple of {multiple} pixels; nearest: {near}"
        )


def usual_size(path: str) -> tuple[int, int] | None:
    """The pixels that a model was made for, as its VAE says; None where that is not known here."""
    config = (config_folder(path) or Path()) / "vae" / "config.json"
    side = read_object(config).get("sample_size") if config.is_file() else None
    return (side, side) if isinstance(side, int) else None


def most_text_tokens(path: str) -> int | None:
    """The longest text that the tokenizer of a model here takes; None where it does not say."""
    folders = sorted((config_folder(path) or Path()).glob("tokenizer*/tokenizer_config.json"))
    most = read_object(folders[-1]).get("model_max_length") if folders else None
    return most if isinstance(most, int) else None


def check_parts(path: str) -> None:
    """FieldError where a local pipeline lacks a part, or a file of one is torn or something else.

    The headers of weights are read, not the weights. A model on a hub is not looked at.
    """
    folder = Path(model_path(path))
    if not folder.is_dir():
        return
    try:
        check_pipeline(folder)
    except ValueError as error:
        raise FieldError(f"model.path: {error}") from None


def check_pipeline(folder: Path) -> None:
    """As `check_parts`, of a folder. ValueError."""
    for part in parts_of(folder):
        _check_part(part)


def parts_of(folder: Path) -> list[Path]:
    """The folders of a pipeline's parts, as its index names them. ValueError without one."""
    index = read_object(folder / "model_index.json")
    return [folder / n for n, by in index.items() if isinstance(by, list) and None not in by]


def files_of(path: str) -> list[str]:
    """Patterns of the files of a hub id that a run reads; none where its parts are not known here.

    A repository may also have the same weights in one file for other programs, and in float16.
    """
    folder = config_folder(path)
    if folder is None or not (folder / "model_index.json").is_file():
        return []
    parts = [f"{part.name}/*" for part in parts_of(folder)]
    return ["model_index.json", *parts, "!*.fp16*"]


def _check_part(part: Path) -> None:
    if not part.is_dir():
        raise ValueError(f"{str(part)!r} is missing, a part of the pipeline; get it again")
    for file in part.glob("*config.json"):
        read_object(file)
    weights = {file.name for file in part.glob("*.safetensors")}
    for name in weights:
        shapes_in(part / name)
    if (part / "config.json").is_file() and not weights:
        raise ValueError(f"{str(part)!r} has no weights (*.safetensors); get them again")
    for index in part.glob("*.safetensors.index.json"):
        shards = map(str, read_value(index, "weight_map", dict).values())
        if lacking := {*shards} - {*weights}:
            raise ValueError(f"{str(part / min(lacking))!r} is missing; get it again")
