"""The text of a recipe -> plain values: YAML 1.2's core schema, within limits.

A recipe is data of a stranger until it is checked. So nothing here takes long, whatever stands
there, and there is no tag but those of plain values: null, bool, int, float, text, list, mapping.
What an alias (`*name`) stands for is copied: no two places of a recipe share a list or a mapping.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gardo.recipe_errors import RecipeError

MAX_BYTES = 1 << 20
MAX_VALUES = 10_000  # an alias counts as all that it stands for
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1  # what a tensor holds

TAG = "tag:yaml.org,2002:"
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _int(text: str) -> int:
    if len(text) > len(str(MAX_INTEGER)) + 1 or abs(value := int(text, _base(text))) > MAX_INTEGER:
        raise ValueError(f"whole numbers end at {MAX_INTEGER}")
    return value


def _base(text: str) -> int:
    return {"0o": 8, "0x": 16}.get(text[:2], 10)


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


# name of the tag -> what its text looks like, and the value; in the order of YAML 1.2.2, 10.3.2
SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text[0] in "tT"),
    "int": (INT, _int),
    "float": (FLOAT, lambda text: _float(text.lower())),
    "str": (re.compile(r".*", re.DOTALL), str),
}


class _Composer(yaml.SafeLoader):
    """Nodes of a document with YAML 1.2's implicit tags, refused where it is too much of them."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {
        "<": [(f"{TAG}merge", re.compile(r"^<<$"))],
        None: [
            (TAG + name, re.compile(rf"^(?:{pattern.pattern})$"))
            for name, (pattern, _) in SCALARS.items()
            if name != "str"
        ],
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._depth += 1
        self._values += 1
        _limit(self._depth, self._values, self.peek_event())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes a text in quotes where either version of YAML would read it as something else."""

    yaml_implicit_resolvers = {
        **yaml.SafeDumper.yaml_implicit_resolvers,
        None: _Composer.yaml_implicit_resolvers[None],
    }


def _limit(depth: int, values: int, place: Any) -> None:
    if depth > MAX_DEPTH:
        raise ConstructorError(
            None, None, f"nested more than {MAX_DEPTH} deep, or in itself", place.start_mark
        )
    if values > MAX_VALUES:
        raise ConstructorError(
            None, None, f"more than {MAX_VALUES} values, with all that aliases stand for",
            place.start_mark,
        )  # fmt: skip


class _Values:
    """Plain values of nodes, each made anew; counts them."""

    def __init__(self) -> None:
        self._values = 0

    def of(self, node: Node, depth: int = 1) -> Any:
        self._values += 1
        _limit(depth, self._values, node)
        if isinstance(node, SequenceNode) and node.tag == f"{TAG}seq":
            return [self.of(item, depth + 1) for item in node.value]
        if isinstance(node, MappingNode) and node.tag == f"{TAG}map":
            return self._mapping(node, depth + 1)
        if isinstance(node, ScalarNode) and node.tag.removeprefix(TAG) in SCALARS:
            return _scalar(node)
        raise _wrong(f"could not determine a constructor for the tag {node.tag!r}", node)

    def _mapping(self, node: MappingNode, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{TAG}merge":
                value = self.of(value_node, depth)
                for mapping in reversed(value if isinstance(value, list) else [value]):
                    if not isinstance(mapping, dict):
                        raise _wrong("<< takes a mapping, or a list of them", value_node)
                    merged.update(mapping)
                continue
            key = self.of(key_node, depth)
            if not isinstance(key, str) or "\n" in key:
                raise _wrong(f"the key {key!r} is no name; put it in quotes if it is one", key_node)
            if key in own:
                raise _wrong(f"the key {key!r} stands twice", key_node)
            own[key] = self.of(value_node, depth)
        return {**merged, **own}


def _scalar(node: ScalarNode) -> Any:
    name, text = node.tag.removeprefix(TAG), node.value
    pattern, convert = SCALARS[name]
    if not pattern.fullmatch(text):
        raise _wrong(f"{text!r} is no {name}", node)
    if found := UNPRINTABLE.search(text):
        raise _wrong(f"a text with the character {found[0]!r}, which does not print", node)
    try:
        return convert(text)
    except ValueError as error:
        raise _wrong(f"{text[:30]!r}: {error}", node) from None


def _wrong(what: str, node: Node) -> ConstructorError:
    return ConstructorError(None, None, what, node.start_mark)


def read(path: Path) -> dict[str, Any]:
    """The sections of a recipe's file, not checked yet."""
    raw = read_yaml(_text(path), str(path))
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections; this is {type(raw).__name__}"
        )
    return raw


def _text(path: Path) -> str:
    """The file's text; RecipeError where it has none that could be a recipe."""
    if not os.path.isfile(path):
        raise RecipeError(
            f"{path}: no such recipe; give a YAML file, such as recipes/tiny_flux_gardo.yaml"
        )
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise RecipeError(
                f"{path}: {size / 2**20:.0f} MiB; that is no recipe, which has a few kB"
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error


def read_yaml(text: str, source: str) -> Any:
    """The values of a YAML text, none of them shared; `source` names it in errors (RecipeError)."""
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{source}: longer than {MAX_BYTES >> 20} MiB; that is no recipe")
    try:
        node = _Composer(text).get_single_node()
        return None if node is None else _Values().of(node)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def write_yaml(values: Any) -> str:
    """Plain values as YAML that `read_yaml` reads as they were."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
