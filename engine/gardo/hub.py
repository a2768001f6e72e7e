"""Why a model does not come from the hub, and the command that gets it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError


def download_error(
    error: Exception, field: str, path: str, revision: str | None, files: Sequence[str] = ()
) -> ValueError:
    """One line for what huggingface_hub raised on the hub id `path` that stands in `field`.

    `files` are those that are needed of it; all of them if left out.
    """
    option = "--include " if any("*" in file for file in files) else ""
    command = " ".join([f"hf download {path}", *(f"{option}{shlex.quote(file)}" for file in files)])
    command += f" --revision {revision}" if revision else ""
    if isinstance(error, GatedRepoError):
        why = "is gated; accept its terms on its page, then `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        why = "is no repository of the hub; mend the name or, if it is private, `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        why = f"has no revision {revision!r}; name a commit or a tag of it"
    else:
        lines = str(error).strip().splitlines() or [""]
        why = (
            f"is not whole in the cache and does not download ({type(error).__name__}: {lines[0]})"
        )
    return ValueError(f"{field}: {path!r} {why}; get it with `{command}`, or name a folder")
