"""`gardo schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations

import importlib.util
import json

import pytest
import yaml

from gardo import cli, config, plugins
from tests.engine.config.recipe import GOOD, RECIPES, REQUIRED


def test_it_knows_every_plug_in(capsys: pytest.CaptureFixture[str]) -> None:
    cli.schema.schema()
    schema = json.loads(capsys.readouterr().out)
    names = {
        definition["properties"][key]["const"]
        for definition in schema["$defs"].values()
        for key in ("name", "kind", "family")
        if "const" in definition.get("properties", {}).get(key, {})
    }
    packages = ("gardo.algorithms", "gardo.rewards", "gardo.policies")
    built_in = {n for package in packages for n in plugins.names(package)}
    assert {"gardo", "flow_grpo", "diffusion_nft", "refl", "flux", "sd3"} <= built_in
    tiny = {"tiny_count", "tiny_fidelity", "tiny_patches", "tiny_purity"}
    assert tiny | {"preference"} <= built_in
    assert built_in <= names
    windows = {"progressive", "random", "decay", "exp_decay", "frozen"}
    assert names - built_in == {"lora", "full"} | windows


def test_it_has_the_shape_of_a_recipe() -> None:
    schema = config.full_schema()
    assert set(REQUIRED) == set(schema["required"])
    optional = {"checkpoint", "kernels", "rollout", "scoring"}
    assert set(yaml.safe_load(GOOD)) == set(schema["properties"]) - optional
    strict = [d for d in schema["$defs"].values() if d.get("type") == "object"]
    assert strict and all(d["additionalProperties"] is False for d in [schema, *strict])
    sampler = schema["$defs"]["SamplerSettings"]["properties"]
    assert sampler["sde"]["enum"] == ["flow", "dance", "cps"]
    assert sampler["steps"]["description"] == "denoise steps T"
    stage = schema["$defs"]["DistributedSettings"]["properties"]["stage"]
    assert stage["enum"] == [0, 1, 2, 3] and "default" not in stage  # what trains decides


@pytest.mark.skipif(not importlib.util.find_spec("jsonschema"), reason="needs jsonschema")
def test_it_takes_our_recipes() -> None:
    import jsonschema

    schema = config.full_schema()
    for path in RECIPES:
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
