"""What a hub's refusals mean for who wrote a recipe: one line, with what to do."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from gardo.settings import FieldError


def download_error(
    error: BaseException,
    field: str,
    path: str,
    revision: str | None = None,
    files: Sequence[str] = (),
) -> FieldError:
    """The error of a hub id `path`, given in `field`, that could not be downloaded.

    `error` is what huggingface_hub raised, or another library around it. The field of the revision
    is `revision` beside `field`; `files` are those that are needed, all of them if left out.
    """
    from huggingface_hub import errors

    found = list(_chain(error))

    def said(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in found)

    option = "--include " if any("*" in file for file in files) else ""
    command = " ".join([f"hf download {path}", *(f"{option}{shlex.quote(file)}" for file in files)])
    command += f" --revision {revision}" if revision else ""
    if said(errors.GatedRepoError):
        return FieldError(
            f"{field}: {path!r} is gated: accept its licence on its page, then `hf auth login`, "
            f"then `{command}`"
        )
    if said(errors.RevisionNotFoundError):
        beside = field.rpartition(".")[0] + ".revision"
        return FieldError(
            f"{beside}: {revision!r} is no commit, tag or branch of {path!r}; give one that its "
            "page lists, or leave it out"
        )
    if said(errors.RepositoryNotFoundError):
        return FieldError(
            f"{field}: no {path!r} on the hub, or it is private; check the spelling, or "
            f"`hf auth login`, then `{command}`"
        )
    if said(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        return FieldError(
            f"{field}: {path!r} is not on this machine, and the hub is out of reach; run "
            f"`{command}` where it is in reach, or give a local folder"
        )
    first, *_ = str(error).splitlines() or [type(error).__name__]
    return FieldError(f"{field}: {path!r} cannot be downloaded ({first}); try `{command}`")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
