"""Where the models of a recipe are: in a folder, in the hub's cache, or to be downloaded.

No weights are read and no hub is asked: sizes are those of files that are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gardo.doctor.finding import Finding, State
from gardo.hub import download_command, snapshot
from gardo.licences import HUB, licence_of
from gardo.policies.settings import check_pipeline, files_of, parts_of
from gardo.recipe import Recipe, reward_plugin, reward_settings
from gardo.rewards._files import Need, needs_of
from gardo.rewards.assembly import with_judges
from gardo.rewards.base import RewardSettings
from gardo.settings import is_hub_id, model_path


@dataclass(frozen=True)
class Model:
    """A folder or hub id that a field names, as far as it is known without a hub."""

    field: str
    path: str
    revision: str | None
    files: Sequence[str]  # patterns of those that a run reads; all of them if there are none
    gated: bool
    folder: Path | None  # here, whole or not
    lacks: str = ""  # of what a run reads, in words

    @property
    def here(self) -> bool:
        return self.folder is not None and not self.lacks

    @property
    def command(self) -> str | None:
        """What gets it; None where it is here, or can be got by no command."""
        wanted = not self.here and is_hub_id(self.path)
        return download_command(self.path, self.revision, self.files) if wanted else None

    @property
    def bytes(self) -> int | None:
        """Of its files here; None where it is not."""
        return sum(file.stat().st_size for file in self._found()) if self.here else None

    def _found(self) -> Iterable[Path]:
        assert self.folder
        patterns = [file for file in self.files if not file.startswith("!")] or ["**/*"]
        found = {file for pattern in patterns for file in self.folder.glob(pattern)}
        return (file for file in found if file.is_file())


def base_model(recipe: Recipe) -> Model:
    path, revision = recipe.model.path, recipe.model.revision
    files = files_of(path)
    folder, lacks = _placed(path, revision, files)
    if folder and not lacks:
        try:
            check_pipeline(folder)
            files = ["model_index.json", *(f"{part.name}/*" for part in parts_of(folder))]
        except ValueError as error:
            lacks = str(error)
    gated = bool(licence_of(path).gated)
    return Model("model.path", path, revision, files, gated, folder, lacks)


def reward_models(name: str, settings: RewardSettings) -> Iterator[Model]:
    """Those of a reward that is scored in the training process or in a worker of its machine."""
    for need in needs_of(settings, f"rewards.{name}", workers=True):
        folder, lacks = _placed(need.path, need.revision, need.patterns)
        if folder and not lacks:
            lacks = need.lacking(folder)
        yield Model(need.field, need.path, need.revision, need.patterns,
                    _is_gated(settings, need), folder, lacks and f"no {lacks}")  # fmt: skip


def _placed(path: str, revision: str | None, files: Sequence[str]) -> tuple[Path | None, str]:
    """Its folder here, and what a cache is known to lack of it."""
    folder = Path(model_path(path))
    if folder.is_dir():
        return folder, ""
    found, whole = snapshot(path, revision, files) if is_hub_id(path) else (None, True)
    return found, "" if whole else "not all of its files"


def _is_gated(settings: RewardSettings, need: Need) -> bool:
    """Of the weights that a reward, or the judge inside it, has by default."""
    for its in with_judges({"": settings}).values():
        about, field = reward_plugin(its).about, type(its).model_fields.get("path")
        if about and about.gated and field and need.path == field.default:
            return True
    return False


# ---- findings ------------------------------------------------------------------------------------


def models(recipe: Recipe) -> Iterator[Finding]:
    """The base model, its licence, and the models of every reward that is scored here."""
    token, found = _token(), [base_model(recipe)]
    yield _finding(found[0], token)
    yield _licence(recipe.model.path)
    for name, settings in reward_settings(recipe).items():
        try:
            for model in reward_models(name, settings):
                found.append(model)
                yield _finding(model, token)
        except (OSError, ValueError) as error:  # a fitted head says which model it is for
            yield Finding(f"rewards.{name}", "note", f"its model is not known yet: {error}")
    if any(is_hub_id(model.path) for model in found):
        none = "none; a gated model needs one: hf auth login"
        yield Finding("hub token", "ok" if token else "note", "is here" if token else none)


def _finding(model: Model, token: bool) -> Finding:
    state, detail = _said(model, token)
    facts = {"path": model.path, "revision": model.revision, "here": model.here,
             "bytes": model.bytes, "gated": model.gated, "get": model.command}  # fmt: skip
    return Finding(model.field, state, detail, facts)


def _said(model: Model, token: bool) -> tuple[State, str]:
    if model.here:
        weighs = size(model.bytes or 0)
        if model.path.startswith("builtin:"):
            return "ok", f"{model.path}, {weighs}, ships with gardo"
        where = "in the hub's cache" if is_hub_id(model.path) else "here"
        return "ok", f"{model.path}: {where}, {weighs}"
    if not model.command:
        return "problem", f"{model.path}: {model.lacks or 'no such folder'}; give another folder"
    why = f"incomplete in the hub's cache ({model.lacks})" if model.folder else "not here"
    get = f"`{model.command}`"
    if model.gated:
        terms = f"is gated: accept its licence at {HUB}/{model.path}"
        if not token:
            return "problem", f"{model.path}: {why}, and {terms}, then `hf auth login`, then {get}"
        return "note", f"{model.path}: {why}, and {terms}, then {get}; a run gets it too"
    if _offline():
        return "problem", f"{model.path}: {why}, and HF_HUB_OFFLINE is set; without it {get}"
    return "note", f"{model.path}: {why}; a run downloads it, or {get}"


def _licence(path: str) -> Finding:
    licence = licence_of(path)
    if not licence.known:
        return Finding("licence", "note", f"of {path}: not known here; read its page")
    state: State = "ok" if licence.commercial == "yes" else "note"
    return Finding("licence", state, f"of {path}: {licence.title}. {licence.terms}".strip(),
                   {"licence": licence.title, "commercial": licence.commercial})  # fmt: skip


def _token() -> bool:
    """Whether the hub's client is logged in; the token itself is nobody's matter."""
    from huggingface_hub import get_token

    return get_token() is not None


def _offline() -> bool:
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
