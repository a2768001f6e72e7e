"""What is known of a base model's licence, and what is said where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCardData

from gardo.licences import LICENCES, UNKNOWN, hub_id_of, licence_of


@pytest.mark.parametrize(
    ("path", "name", "commercial", "gated"),
    [
        ("black-forest-labs/FLUX.1-dev", "flux-1-dev-non-commercial-license", "no", True),
        ("Black-Forest-Labs/flux.1-dev", "flux-1-dev-non-commercial-license", "no", True),
        ("black-forest-labs/FLUX.1-schnell", None, "yes", True),
        ("stabilityai/stable-diffusion-3.5-medium", "stabilityai-ai-community",
         "under conditions", True),
        ("builtin:flux", None, "yes", False),
        ("builtin:sd3", None, "yes", False),
        ("somebody/FLUX.1-dev", None, "unknown", None),
        ("./nowhere", None, "unknown", None),
    ],
)  # fmt: skip
def test_licences_of_published_models(path, name, commercial, gated):
    found = licence_of(path)
    assert (found.name, found.commercial, found.gated) == (name, commercial, gated)
    assert found.known == (commercial != "unknown")


def test_what_a_card_says_of_them():
    for licence in LICENCES.values():
        assert ModelCardData(**licence.front_matter).to_dict() == licence.front_matter
        assert licence.hub != "other" or (licence.name and licence.link)
    assert UNKNOWN.front_matter == {}


def folder(path: Path, card: str | None = None) -> str:
    path.mkdir(parents=True)
    if card is not None:
        (path / "README.md").write_text(card)
    return str(path)


def test_a_snapshot_of_the_hub_is_its_model(tmp_path):
    place = tmp_path / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "0ef5fff7"
    path = folder(place)
    assert hub_id_of(path) == "black-forest-labs/FLUX.1-dev"
    assert licence_of(path) == licence_of("black-forest-labs/FLUX.1-dev")


@pytest.mark.parametrize(
    ("card", "front_matter", "commercial"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# It", {"license": "mit"}, "unknown"),
        ("---\nlicense: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md"
         "\n---\n", licence_of("stabilityai/stable-diffusion-3.5-large").front_matter,
         "under conditions"),
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
         {"license": "other", "license_name": "mine", "license_link": "LICENSE"}, "unknown"),
        ("---\nlicense: [a]\n---\n", {}, "unknown"),
        ("---\nlicense: {\n---\n", {}, "unknown"),
        ("---\nnever ends", {}, "unknown"),
        ("license: mit", {}, "unknown"),
        (None, {}, "unknown"),
    ],
)  # fmt: skip
def test_a_folder_is_asked_for_its_card(tmp_path, card, front_matter, commercial):
    found = licence_of(folder(tmp_path / "model", card))
    assert (found.front_matter, found.commercial, found.gated) == (front_matter, commercial, None)


def test_a_card_that_is_no_text(tmp_path):
    path = folder(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert licence_of(path) == UNKNOWN
