"""Compiles every kernel for sm_90 and sm_100 without a GPU; prints what the machine code is like.

    python -m tests.kernels.compiled [--rows ROWS] [OP ...]

A JSON list, one object a kernel and architecture. What is compiled is what the ops' examples
launch, in bf16 and fp32, with the types and constants of the launch. Runs in a process of its own,
because kernels that were defined under Triton's interpreter cannot be compiled. SASS is counted for
each element that a thread computes; in a kernel with a loop, for each of one turn, to which what
stands around the loop is added: an upper bound. What only the last program does, all others having
left, is not of an element.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gardo_kernels._examples import On, op_modules
from gardo_kernels._launch import OPTIONS
from tests.kernels.launches import Launch, recorded

ARCHITECTURES = (90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TICKET = re.compile(r"(@%p\d+) atom\.global\.gpu\.acq_rel\.add\.u32")  # PTX: a thread, an integer
STORE = re.compile(r"^.*\bst\.global\b", re.MULTILINE)
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.bool: "*i1",
}  # fmt: skip
WHOLE = ("count", "elements", "features", "width", "before", "row_stride")  # multiples of 16
# The constants that say how many elements a program, or a turn of its loop, has in hand. Of a tile
# TILE or ROWS are its rows and its columns, and DEPTH or LANES with WIDE each its features.
SIZES = {"BLOCK": 1, "ROWS": 1, "DEPTH": 1, "TILE": 2}
PAIRED = {"ROWS": 2, "LANES": 1, "WIDE": 1}


@dataclass(frozen=True)
class Spec:
    """A kernel with the types and the constants of a launch. Pointers and counts are aligned."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    @property
    def per_program(self) -> int:
        """Elements."""
        constants = dict(self.constants)
        sizes = PAIRED if "LANES" in constants else SIZES
        return prod(constants[name] ** power for name, power in sizes.items() if name in constants)


@dataclass(frozen=True)
class Code:
    """What the machine code of a kernel is like."""

    op: str
    name: str
    architecture: int
    instructions: int
    per_element: float
    registers: int
    stack: int
    spills: int
    wide: int  # 128-bit global accesses
    other: int  # other global accesses, such as a row's scalars
    doubles: int
    atomics: int
    tickets: int  # of them integers that are drawn by the thread that has stored what came before
    drops: int  # minima and maxima of floats that drop NaN


def spec_of(launch: Launch) -> Spec:
    """What Triton would compile for the launch; but no integer is taken as a constant."""
    types, constants = {}, {}
    for name, parameter in zip(launch.kernel.arg_names, launch.kernel.params, strict=True):
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None:
            constants[name] = getattr(value, "value", value)
        elif isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype]
        else:
            integer = "i64" if parameter.do_not_specialize else "i32"
            types[name] = "fp32" if isinstance(value, float) else integer
    more = launch.arguments
    return Spec(launch.kernel, tuple(types.items()), tuple(constants.items()), more["num_warps"],
                more["num_stages"])  # fmt: skip


def specs_of(op: str, module: ModuleType, rows: int) -> dict[str, Spec]:
    """Everything the op's examples launch, by name: kernel, example, dtype; those only to tell
    apart what differs."""
    launched: dict[str, dict[str, dict[str, Spec]]] = {}
    for dtype_name, dtype in DTYPES.items():
        with recorded() as launches:
            for example, _ in module.examples(On("triton", torch.device("cpu"), dtype, rows)):
                for spec in map(spec_of, launches):
                    kernel = spec.kernel.__name__.strip("_").removesuffix("_kernel")
                    name = "_".join([op, *[kernel.removeprefix(op).strip("_")], *[example]])
                    launched.setdefault(name.replace("__", "_").strip("_"), {})[dtype_name] = spec
                launches.clear()
    found: dict[str, Spec] = {}
    for name, specs in launched.items():
        if len(set(specs.values())) == 1:
            specs = {"": specs["fp32"]}
        for dtype_name, spec in specs.items():
            if spec not in found.values():
                found[f"{name}_{dtype_name}".strip("_")] = spec
    return found


def output(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def for_all(instructions: list[str]) -> int:
    """How many of them stand before the exit at which all but the last program leave."""
    atomics = [i for i, name in enumerate(instructions) if name.startswith("ATOM")]
    return instructions.index("EXIT", atomics[0]) + 1 if atomics else len(instructions)


def tickets(ptx: str) -> int:
    """Atomic additions of an integer, each by the one thread that all stores before it are of."""
    drawn = [(found[1], ptx[: found.start()]) for found in TICKET.finditer(ptx)]
    return sum(
        all(line.split()[0] == thread for line in STORE.findall(before)) for thread, before in drawn
    )


def compiled(op: str, name: str, spec: Spec, architecture: int) -> Code:
    names, types = spec.kernel.arg_names, dict(spec.types)
    aligned = [n for n, kind in types.items() if kind.startswith("*") or n.endswith(WHOLE)]
    source = ASTSource(
        spec.kernel,
        {n: types.get(n, "constexpr") for n in names},
        {(names.index(n),): value for n, value in spec.constants},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": spec.warps, "num_stages": spec.stages, **OPTIONS},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = output("nvdisasm", "-c", "-ndf", file.name)  # without its slow flow analysis
        usage = output("cuobjdump", "-res-usage", file.name)
    found = [name for name in INSTRUCTION.findall(sass) if name != "NOP"]
    vectors = [n for n in found if re.match(r"(LDG|STG|LDGSTS)\.", n)]
    wide = [n for n in vectors if ".128" in n]
    return Code(
        op=op,
        name=name,
        architecture=architecture,
        instructions=len(found),
        per_element=for_all(found) * 32 * spec.warps / spec.per_program,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
        spills=sum(n.startswith(("LDL", "STL")) for n in found),
        wide=len(wide),
        other=len(vectors) - len(wide),
        doubles=sum(re.match(r"D(ADD|MUL|FMA|SETP)", n) is not None for n in found),
        atomics=sum(re.match(r"(ATOM|RED)G?(\.|$)", n) is not None for n in found),
        tickets=tickets(kernel.asm["ptx"]),
        drops=sum(n.startswith("FMNMX") and ".NAN" not in n for n in found),
    )


def codes(ops: Iterable[str], rows: int) -> Iterator[Code]:
    modules = op_modules()
    for op in ops or modules:
        for name, spec in specs_of(op, modules[op], rows).items():
            for architecture in ARCHITECTURES:
                yield compiled(op, name, spec, architecture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=On.rows, help="of the examples")
    parser.add_argument("op", nargs="*")
    options = parser.parse_args()
    json.dump([asdict(code) for code in codes(options.op, options.rows)], sys.stdout, indent=1)
