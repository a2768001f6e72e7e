"""What a hub refuses, told in one line; and a snapshot that a hub has left on this machine."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import constants, errors

from gardo.hub import download_command, download_error
from gardo.policies.flux import FluxPolicy, FluxSettings
from gardo.policies.settings import files_of
from gardo.settings import FieldError, model_path
from gardo.train import main
from tests import ROOT

ID = "some-owner/some-model"
GET = f"hf download {ID}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "http://hub.invalid/"))


def wrapped(inner: Exception) -> OSError:
    """As diffusers raises it: an OSError whose cause is the hub's."""
    try:
        try:
            raise inner
        except Exception as error:
            raise OSError(f"Cannot load model {ID}: it is not cached") from error
    except OSError as error:
        return error


GATED = errors.GatedRepoError("403 Client Error", response=response(403))
NO_REVISION = errors.RevisionNotFoundError("404 Client Error", response=response(404))
NO_REPOSITORY = errors.RepositoryNotFoundError("404 Client Error", response=response(404))
NOT_CACHED = errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
OFFLINE = errors.OfflineModeIsEnabled("Cannot reach it: offline mode is enabled")


@pytest.mark.parametrize("around", [lambda error: error, wrapped], ids=["bare", "wrapped"])
@pytest.mark.parametrize(
    ("error", "revision", "said"),
    [
        (GATED, None,
         f"model.path: '{ID}' is gated: accept its licence on its page, then `hf auth login`, "
         f"then `{GET}`"),
        (GATED, "v1",
         f"model.path: '{ID}' is gated: accept its licence on its page, then `hf auth login`, "
         f"then `{GET} --revision v1`"),
        (NO_REVISION, "v9",
         f"model.revision: 'v9' is no commit, tag or branch of '{ID}'; give one that its page "
         "lists, or leave it out"),
        (NO_REPOSITORY, None,
         f"model.path: no '{ID}' on the hub, or it is private; check the spelling, or "
         f"`hf auth login`, then `{GET}`"),
        (NOT_CACHED, "v1",
         f"model.path: '{ID}' is not on this machine, and the hub is out of reach; run "
         f"`{GET} --revision v1` where it is in reach, or give a local folder"),
        (OFFLINE, None,
         f"model.path: '{ID}' is not on this machine, and the hub is out of reach; run "
         f"`{GET}` where it is in reach, or give a local folder"),
        (OSError(28, "No space left on device\nand more"), None,
         f"model.path: '{ID}' cannot be downloaded ([Errno 28] No space left on device); "
         f"try `{GET}`"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line(error, revision, said, around) -> None:
    told = download_error(around(error), "model.path", ID, revision)
    assert isinstance(told, FieldError)
    if around is wrapped and "cannot be downloaded" in said:
        assert str(told).startswith(f"model.path: '{ID}' cannot be downloaded (Cannot load model")
    else:
        assert str(told) == said


def test_the_files_of_a_model_are_quoted_for_a_shell() -> None:
    said = str(download_error(OSError(), "path", ID, None, ["config.json", "model*"]))
    assert f"`{GET} --include config.json --include 'model*'`" in said


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ""),
        (["model.pt"], " model.pt"),
        (["a b.pt"], " 'a b.pt'"),
        (["one.pt", "or.pt"], " --include one.pt --include or.pt"),  # which of them is there?
        (["vae/*", "!*.fp16*"], " --include 'vae/*' --exclude '*.fp16*'"),
    ],
)
def test_the_command_gets_these_files(files: list[str], words: str) -> None:
    assert download_command(ID, files=files) == GET + words
    assert download_command(ID, "v1", files) == f"{GET}{words} --revision v1"


def test_a_published_model_is_got_without_its_other_copies() -> None:
    """As one file for other programs, and in float16; of an unknown one nothing is left out."""
    files = files_of("black-forest-labs/FLUX.1-dev")
    names = ["model_index.json", "transformer/config.json", "flux1-dev.safetensors",
             "text_encoder/model.fp16.safetensors"]  # fmt: skip
    wanted = [n for n in names if any(fnmatch(n, f) for f in files if f[0] != "!")]
    assert [n for n in wanted if not fnmatch(n, files[-1][1:])] == names[:2]
    assert files_of(ID) == []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache on this machine, and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_model_that_is_not_to_be_had_ends_the_command(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line and exit code 2, before anything is loaded or written."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = (f"model.path={ID}", "model.revision=v1", f"run.folder={cache / 'runs'}",
                "distributed.engine=local", "distributed.threads=1")  # fmt: skip
    recipe = ROOT / "recipes/tiny_flux_gardo.yaml"
    assert main([str(recipe), *(part for s in settings for part in ("--set", s))]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{recipe}: model.path: '{ID}' is not on this machine, and the hub is out of reach; run "
        f"`{GET} --revision v1` where it is in reach, or give a local folder"
    )
    assert not (cache / "runs").exists()


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_the_revision_is_the_one_asked_for(cache: Path, revision: str) -> None:
    """A branch or tag, or a commit; the run's identity is the commit."""
    repository = cache / f"models--{ID.replace('/', '--')}"
    for commit in (COMMIT, "f" * 40):
        shutil.copytree(model_path("builtin:flux"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for name, commit in (("v1", COMMIT), ("main", "f" * 40)):
        (repository / "refs" / name).write_text(commit)
    settings = FluxSettings(path=ID, revision=revision, size=(16, 16), text_tokens=8)
    policy = FluxPolicy(settings, dtype=torch.float32, device=torch.device("cpu"), defer=True)
    assert policy.identity == {"id": ID, "revision": COMMIT}
