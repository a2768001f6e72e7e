"""How a kernel is laid over its elements: one function of sizes chooses block, chunk, rows, warps.

`./run gpu --only shapes` tries candidates on a GPU and writes the best ones as launch_shapes.json;
put beside this file, that table is what the ops take. Where it has no row for an op, a GPU's
compute capability and a size, the op takes its default. What the file says of itself: `measured`.

The choice looks at sizes and at the kind of the GPU alone, never at a clock, so a run has the same
bits when it is run again. It is not free of bits all the same: chunk, block and warps are the order
in which a row is added up, and two of them differ in the last digits of the losses' sums (and of
`sde_step`'s square). A measured row makes those digits a function of the size of the batch too.

Integers in, integers out: it can be called while a CUDA graph is captured.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("launch_shapes.json")


class LaunchShape(NamedTuple):
    """Of one op. Where an op's own file says something else of a field, that holds."""

    block: int = 1024  # elements of a row that a program has in hand at a time
    chunk: int = 4096  # elements of a row that a program adds up, block by block
    rows: int = 64  # rows at a time, where a program has one value of each
    warps: int = 4
    stages: int = 3


Key = tuple[str, str, int]  # op, compute capability, size class


def launch_shape(
    op: str, rows: int, elements: int, device: torch.device, default: LaunchShape | None = None
) -> LaunchShape:
    """The shape of the op's launches for so many rows of so many elements."""
    key = (op, capability(device), size_class(rows, elements))
    return measured_shapes().get(key) or default or LaunchShape()


def size_class(rows: int, elements: int) -> int:
    """rows x elements, rounded up to a power of four."""
    return 4 ** ((int(rows * elements - 1).bit_length() + 1) // 2)


def capability(device: torch.device) -> str:
    """9.0 for an H100; `interpreter` where no GPU is."""
    return _capability(device.index) if device.type == "cuda" else "interpreter"


def leaves_idle(rows: int, elements: int, size: int, device: torch.device) -> bool:
    """Whether programs of `size` elements of a row are fewer than the GPU's multiprocessors."""
    if device.type != "cuda":
        return False
    return rows * -(-elements // size) < _multiprocessors(device.index)


@cache
def _multiprocessors(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@cache
def _capability(index: int | None) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(index)))


@cache
def measured_shapes() -> dict[Key, LaunchShape]:
    """The table of the file; read once."""
    return read_shapes(json.loads(FILE.read_text(encoding="utf-8")))


def measured_note() -> str:
    """What the file says of where it was measured."""
    return str(json.loads(FILE.read_text(encoding="utf-8"))["measured"])


@contextmanager
def trying(key: Key, shape: LaunchShape) -> Iterator[None]:
    """Inside, the table has this shape there: for the sweep that fills it, and for tests."""
    table = measured_shapes()
    before = table.get(key)
    table[key] = shape
    try:
        yield
    finally:
        del table[key]
        if before is not None:
            table[key] = before


def read_shapes(table: dict[str, Any]) -> dict[Key, LaunchShape]:
    """What the file holds: a shape has op, capability, up_to (a size class), LaunchShape's fields.

    KeyError where a field is missing; one too many is a TypeError.
    """
    found = {}
    for row in table["shapes"]:
        key = (row["op"], row["capability"], row["up_to"])
        fields = {name: value for name, value in row.items() if name not in _KEY}
        if missing := set(LaunchShape._fields) - set(fields):
            raise KeyError(f"{FILE.name}: {key} has no {', '.join(sorted(missing))}")
        found[key] = LaunchShape(**fields)
    return found


_KEY = ("op", "capability", "up_to")


def write_shapes(shapes: dict[Key, LaunchShape], measured: str) -> str:
    """The text of the file, a line a shape; `measured` says where, with what and when."""
    rows = [dict(zip(_KEY, key, strict=True)) | shape._asdict() for key, shape in shapes.items()]
    lines = ",".join(f"\n  {json.dumps(row)}" for row in rows)
    end = "\n " if rows else ""
    return f'{{\n "measured": {json.dumps(measured)},\n "shapes": [{lines}{end}]\n}}\n'
