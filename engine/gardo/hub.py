"""What a hub's refusals mean for who wrote a recipe: one line, with what to do."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

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

    command = download_command(path, revision, files)
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


def download_command(path: str, revision: str | None = None, files: Sequence[str] = ()) -> str:
    """What gets these files of a hub id to its cache here; all of them if none is named.

    Files with * are patterns, and one that opens with ! leaves out what fits it. Of several not
    all need be in the repository, which the command would demand of names without an option.
    """
    patterns = len(files) > 1 or "*" in "".join(files)
    words = ["hf", "download", path]
    for file in files:
        option = ["--exclude"] if file.startswith("!") else ["--include"] if patterns else []
        words += [*option, file.removeprefix("!")]
    return shlex.join([*words, *(["--revision", revision] if revision else [])])


def snapshot(
    path: str, revision: str | None = None, files: Sequence[str] = ()
) -> tuple[Path | None, bool]:
    """The folder of a hub id in this machine's cache, None where there is none; and whether it has
    all such files that the hub was once seen to have. No hub is asked."""
    from huggingface_hub import errors, snapshot_download

    patterns = [file for file in files if not file.startswith("!")] or None
    without = [file.removeprefix("!") for file in files if file.startswith("!")]
    try:
        found = snapshot_download(
            path, revision=revision, local_files_only=True, allow_patterns=patterns,
            ignore_patterns=without,
        )  # fmt: skip
    except errors.LocalEntryNotFoundError as error:
        torn = getattr(error, "snapshot_path", None)  # of one that is not whole
        return (Path(torn) if torn else None), False
    except (OSError, ValueError):  # no name of a repository, or of a revision
        return None, False
    return Path(found), True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
