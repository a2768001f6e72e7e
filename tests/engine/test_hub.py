"""What a model that does not come from the hub says: the field, the model, the command."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gardo.hub import download_error

ANSWER = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (GatedRepoError, "is gated; accept its terms on its page, then `hf auth login`"),
        (
            RepositoryNotFoundError,
            "is no repository of the hub; mend the name or, if it is private",
        ),
        (RevisionNotFoundError, "has no revision 'v2'; name a commit or a tag of it"),
    ],
)
def test_an_answer_of_the_hub(error: type, why: str) -> None:
    said = str(download_error(error("x", response=ANSWER), "model.path", "owner/name", "v2"))
    assert said.startswith(f"model.path: 'owner/name' {why}")
    assert said.endswith("get it with `hf download owner/name --revision v2`, or name a folder")


def test_no_answer() -> None:
    error = LocalEntryNotFoundError("Got: ConnectError\nlong advice")
    said = str(download_error(error, "rewards.a.path", "owner/name", None, ["a.pt", "b.json"]))
    assert said == (
        "rewards.a.path: 'owner/name' is not whole in the cache and does not download "
        "(LocalEntryNotFoundError: Got: ConnectError); get it with "
        "`hf download owner/name a.pt b.json`, or name a folder"
    )


def test_patterns_are_quoted_for_a_shell() -> None:
    said = str(download_error(OSError(), "path", "owner/name", None, ["config.json", "model*"]))
    assert "`hf download owner/name --include config.json --include 'model*'`" in said
