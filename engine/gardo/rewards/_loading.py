"""Frozen models of rewards: whole or not at all. Which files they need: _files.py.

Rewards of one panel that run the same weights have one copy of them: `one_copy_each`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from gardo.hub import download_error
from gardo.rewards._files import WEIGHTS
from gardo.rewards.base import Weights, tower_of, weights_dtype
from gardo.settings import FieldError, is_hub_id, model_path

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG = ("config.json",)
FILES = (*CONFIG, *WEIGHTS)

_TOWERS: ContextVar[dict[object, nn.Module] | None] = ContextVar("towers", default=None)


def quiet_transformers() -> None:
    """No loading bars, no notes: what a command prints is ours. A worker may do without it."""
    if importlib.util.find_spec("transformers") is None:
        return
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def read_weights(
    path: str, file: str, revision: str | None, *, field: str = "path"
) -> dict[str, Tensor]:
    """The state dict in `file` (.safetensors, or torch's format) of a folder or hub id.

    A training checkpoint's is under `state_dict`. ValueError where the file holds none, and,
    opening with the `field` that names it, where there is no such file.
    """

    from safetensors.torch import load_file
    from transformers.utils import cached_file

    try:
        found = cached_file(model_path(path), file, revision=revision)
    except OSError as error:
        raise _not_had(error, field, path, revision, "weights", [file]) from error
    try:
        if file.endswith(".safetensors"):
            return load_file(found)
        saved = torch.load(found, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise what their readers meet
        raise ValueError(
            f"{found} cannot be read as tensors ({type(error).__name__}); it must be safetensors, "
            "or a file of torch.save that holds tensors and no code"
        ) from error
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{found} holds no state dict (names and tensors)")
    return state


def load_model(
    model_class: Any,
    path: str,
    revision: str | None = None,
    *,
    field: str = "path",
    also: str | None = None,
    exact: bool = False,
    dtype: str = "float32",
) -> Any:
    """A `model_class` from a folder or hub id, in `dtype` on the CPU.

    Its config.json must be of the class's own type, or of type `also`. ValueError, opening with
    the `field` that names it, where that is not so or as `filled_model` says.
    """
    where = f"{field}: {path!r}"
    check_type(where, path, revision, model_class.config_class.model_type, also, files=FILES)
    try:
        return filled_model(
            model_class,
            where,
            model_path(path),
            exact=exact,
            dtype=dtype,
            revision=revision,
            use_safetensors=True,
        )
    except (OSError, SafetensorError) as error:
        raise _not_had(error, field, path, revision, "weights", FILES) from error


def _not_had(
    error: Exception,
    field: str,
    path: str,
    revision: str | None,
    what: str,
    files: Sequence[str],
) -> FieldError:
    """What is said of a model that is not to be had: of a hub id how it is got."""
    if is_hub_id(path) and not Path(model_path(path)).is_dir():
        return download_error(error, field, path, revision, files)
    return FieldError(f"{field}: {path!r} holds no {what}: {error}")


def check_type(
    where: str,
    path: str,
    revision: str | None,
    *kinds: str | None,
    files: Sequence[str] = CONFIG,
) -> None:
    """ValueError unless the config.json is of one of the types of models."""
    found = type_of(where, path, revision, files)
    if found not in kinds:
        wanted = " or ".join(filter(None, kinds))
        raise ValueError(f"{where} holds a model of type {found!r}; it must be {wanted}")


def type_of(
    where: str, path: str, revision: str | None, files: Sequence[str] = CONFIG
) -> str | None:
    """The type of model that the config.json says. ValueError where there is none.

    `files` are those of the model that are needed, for who has to get them.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model_path(path), revision=revision)
    except (OSError, ValueError) as error:
        field = where.partition(":")[0]
        raise _not_had(error, field, path, revision, "model", files) from error
    found: str | None = config.get("model_type")
    return found


def model_of(model_class: Any, where: str, config: Any, state: Any, **options: Any) -> Any:
    """A `model_class` with exactly the weights `state`, in float32 (or `dtype`) on the CPU.

    ValueError, opening with `where`, unless their names and shapes are its own.
    """
    options |= {"config": config, "state_dict": state}
    return filled_model(model_class, where, None, exact=True, **options)


def filled_model(
    model_class: Any,
    where: str,
    name: str | None,
    *,
    exact: bool = False,
    dtype: str = "float32",
    **options: Any,
) -> Any:
    """`from_pretrained` in `dtype` on the CPU, but an error for what it would draw at random.

    A model of billions is read in the `dtype` that it runs in: in float32 it might not fit.
    `options` are its own. ValueError, opening with `where`, names a weight that is missing or has
    another shape; with `exact` also one that the class does not have.
    """
    model, report = model_class.from_pretrained(
        name,
        dtype=weights_dtype(dtype),
        ignore_mismatched_sizes=True,  # the report names them
        output_loading_info=True,
        **options,
    )
    wrong = {
        "lacks": report["missing_keys"],
        "has another shape of": {key for key, *_ in report["mismatched_keys"]},
        "also has": report["unexpected_keys"] if exact else (),
    }
    for what, keys in wrong.items():
        if keys:
            first, more = min(keys), len(keys) - 1
            raise ValueError(
                f"{where} {what} {first}{f' and {more} more' if more else ''}; "
                f"is it a whole {model_class.__name__} of this size?"
            )
    return model


@contextmanager
def one_copy_each() -> Iterator[None]:
    """Inside, what `frozen` gives of the same weights is the same modules.

    Only the rewards hold them afterwards: nothing is shared with those of another panel.
    """
    token = _TOWERS.set({} if _TOWERS.get() is None else _TOWERS.get())
    try:
        yield
    finally:
        _TOWERS.reset(token)


def frozen(
    model: nn.Module, dtype: str, device: torch.device, weights: Weights | None = None
) -> Any:
    """The model for use alone; `dtype` as in ModelRewardSettings.

    `weights` says where they are from. A tower (module) of the model that `one_copy_each` knows in
    this dtype and on this device is put in its place: an image tower of CLIP is one, whoever asked
    for it alone.
    """
    towers = _TOWERS.get()
    if towers is not None and weights is not None:
        for name, module in model.named_children():
            key = tower_of(weights, dtype, name, module), device
            if key in towers:
                setattr(model, name, towers[key])
            else:
                towers[key] = module
    return model.to(device, weights_dtype(dtype)).eval().requires_grad_(False)
