"""Under which licence a base model is published: what is trained on it inherits that.

The table says what the models' pages said in 2025; the page itself is what holds. The licences of
rewards are their own matter (`About` in rewards/base.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from gardo.settings import is_hub_id, model_path

Commercial = Literal["yes", "under conditions", "no", "unknown"]
HUB = "https://huggingface.co"
LONGEST_CARD = 1 << 20  # bytes of a README.md that are looked at


@dataclass(frozen=True)
class Licence:
    """A licence, and what has to be done to get the model."""

    title: str
    hub: str  # Hugging Face's `license`; "other" where `name` and `link` say more; "" if not known
    name: str | None = None  # Hugging Face's `license_name`
    link: str | None = None
    gated: bool | None = None  # accept it on the model's page and log in; None: not known
    commercial: Commercial = "unknown"
    terms: str = ""  # a sentence on the use of the weights

    @property
    def known(self) -> bool:
        return bool(self.hub)

    @property
    def front_matter(self) -> dict[str, str]:
        """What the metadata of a model card says of it; nothing where it is not known."""
        said = {"license": self.hub, "license_name": self.name, "license_link": self.link}
        return {field: value for field, value in said.items() if value}


FLUX_DEV = Licence(
    "FLUX.1 [dev] Non-Commercial License",
    "other",
    "flux-1-dev-non-commercial-license",
    f"{HUB}/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    gated=True,
    commercial="no",
    terms="The weights, and what is trained from them, may not be used commercially.",
)
STABILITY = Licence(
    "Stability AI Community License",
    "other",
    "stabilityai-ai-community",
    "https://stability.ai/community-license-agreement",
    gated=True,
    commercial="under conditions",
    terms="Free, commercially too, for who earns less than 1 million US dollars a year.",
)
APACHE = Licence("Apache License 2.0", "apache-2.0", commercial="yes", gated=False)
UNKNOWN = Licence("unknown", "")

LICENCES: dict[str, Licence] = {  # hub ids, * being any end; the first that fits
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "black-forest-labs/FLUX.1-Krea-dev": FLUX_DEV,
    "black-forest-labs/FLUX.1-schnell": Licence(
        APACHE.title, APACHE.hub, commercial="yes", gated=True
    ),
    "stabilityai/stable-diffusion-3.5-*": STABILITY,
    "stabilityai/stable-diffusion-3-medium-diffusers": STABILITY,
    "builtin:*": APACHE,  # ours, with the repository's licence
}


def licence_of(path: str) -> Licence:
    """The licence of a base model: a hub id, `builtin:NAME`, or a folder.

    A folder is asked which hub id it is a download of, then what its README.md says.
    """
    name = hub_id_of(path) or path
    for pattern, licence in LICENCES.items():
        if fnmatchcase(name.lower(), pattern.lower()):
            return licence
    folder = Path(model_path(path))
    return _said_by(folder / "README.md") if folder.is_dir() else UNKNOWN


def hub_id_of(path: str) -> str | None:
    """The hub id that `path` is, or that the cache of the hub's client has it as a snapshot of."""
    if path.startswith("builtin:"):
        return None
    folder = Path(model_path(path))
    if not folder.is_dir():
        return path if is_hub_id(path) else None
    snapshot = folder.resolve()
    kind, _, name = snapshot.parent.parent.name.partition("--")
    if snapshot.parent.name == "snapshots" and kind == "models":
        return name.replace("--", "/", 1)
    return None


def _said_by(card: Path) -> Licence:
    """What a model card's metadata says, as far as it says it."""
    said = _metadata(card)
    hub, name, link = (said.get(f) for f in ("license", "license_name", "license_link"))
    if not isinstance(hub, str) or not hub:
        return UNKNOWN
    name, link = (value if isinstance(value, str) and value else None for value in (name, link))
    for licence in LICENCES.values():
        if (hub, name) == (licence.hub, licence.name):
            return replace(licence, gated=None)  # it is here already
    return Licence(name or hub, hub, name, link)


def _metadata(card: Path) -> dict[str, Any]:
    """The YAML between the --- lines that a model card opens with; {} where there is none."""
    try:
        with open(card, encoding="utf-8-sig") as file:
            start, *rest = file.read(LONGEST_CARD).split("\n---", 1)
        found = yaml.safe_load(start.removeprefix("---")) if start[:3] == "---" and rest else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
