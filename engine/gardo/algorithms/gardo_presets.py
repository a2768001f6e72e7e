"""GARDO's presets: what the paper and the release have where a recipe leaves a field out.

`preset: official_code` reproduces the released code with its sign. What it does that no field can
say is listed in docs/algorithms.md. "*" holds for every base; a base's own entry goes before it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

Preset = Literal["paper", "official_code"]

_NO_STD = {"std": "none"}
_OTHER_SCALE = {"reset_kl": None}  # 1e-4 and 3e-4 are of the step KL, not of a velocity error

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "*": {
            "gate": {
                "sign": "paper", "base": "valid", "ties": "equal", "zero_advantage": True,
                "fraction": 0.1, "limits": (0.0, 1.0), "warmup": 20,
            },
            "diversity": {"normalise": "raw"},
            "reference": {"reset_kl": 1e-4, "reset_updates": 100},
        },
        "flow_grpo": {"base": {"kl_reduction": "batch", "advantage": _NO_STD}},
        "diffusion_nft": {
            "base": {"kl_reduction": "batch", "beta": 0.04, "advantage": _NO_STD},
            "reference": _OTHER_SCALE,
        },
        "awm": {
            "base": {"kl_reduction": "batch", "advantage": _NO_STD},
            "reference": _OTHER_SCALE,
        },
    },
    "official_code": {
        "*": {
            "gate": {
                "sign": "official_code", "base": "nonnegative", "ties": "ordered",
                "zero_advantage": False, "fraction": 0.1, "limits": (0.02, 0.2), "warmup": 1,
            },
            "diversity": {"normalise": "group_mean"},
            "reference": {"reset_kl": 3e-4, "reset_iterations": 16},
        },
        "flow_grpo": {
            "base": {"kl_reduction": "released", "clip_range": 1e-4, "advantage": _NO_STD},
            "reference": {"statistic": "loss"},
        },
        "diffusion_nft": {
            "base": {"kl_reduction": "released", "beta": 0.04, "advantage": _NO_STD},
            "reference": {"reset_kl": 0.15, "statistic": "loss"},
        },
        "awm": {
            "base": {"kl_reduction": "released", "advantage": _NO_STD},
            "reference": _OTHER_SCALE,
        },
    },
}  # fmt: skip


def _filled(given: Any, preset: Any) -> Any:
    """`given` with what it leaves out taken from `preset`, section by section."""
    if isinstance(given, BaseModel) and isinstance(preset, dict):
        given = {name: getattr(given, name) for name in given.model_fields_set}
    if not isinstance(given, dict) or not isinstance(preset, dict):
        return given
    both = {name: _filled(given[name], preset[name]) for name in given if name in preset}
    return {**preset, **given, **both}


def filled(settings: Any) -> Any:
    """The fields of a `gardo` section with its preset's where it leaves them out.

    A section is a mapping or settings; what settings leave out is what they were not given.
    """
    if not isinstance(settings, dict) or settings.get("preset") not in PRESETS:
        return settings
    preset, base = PRESETS[settings["preset"]], settings.get("base")
    name = base.get("name") if isinstance(base, dict) else getattr(base, "name", None)
    whole = _filled(settings, _filled(preset.get(str(name), {}), preset["*"]))
    if isinstance(base, BaseModel):
        whole["base"] = type(base).model_validate(whole["base"])
    return whole
