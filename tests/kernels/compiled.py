"""Compiles every kernel for sm_90 and sm_100 without a GPU; prints what the machine code is like.

    python -m tests.kernels.compiled            a JSON list, one object a kernel and architecture

Runs in a process of its own, because kernels that were defined under Triton's interpreter cannot be
compiled. SASS is counted for each element that a thread computes; in a kernel with a loop, for each
of one turn, to which what stands around the loop is added: an upper bound.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gardo_kernels import philox
from gardo_kernels._launch import OPTIONS

ARCHITECTURES = (90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class Spec:
    """A kernel with its types; constants are those of the op. Pointers and counts are aligned."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    per_program: int  # elements
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Code:
    """What the machine code of a kernel is like."""

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
    drops: int  # minima and maxima of floats that drop NaN


RANDOM = {"out_ptr": "*fp32", "seed_ptr": "*i64", "id_ptr": "*i64", "stream": "i64", "count": "i32"}
SPECS = [
    Spec(f"random_{name}", philox._random_kernel, {**RANDOM, "out_ptr": pointer},
         {"KIND": kind, "FAST": True, "BLOCK": 1024}, 1024)
    for name, kind, pointer in (("bits", philox.BITS, "*i64"), ("uniform", philox.UNIFORM, "*fp32"),
                                ("normal", philox.NORMAL, "*fp32"))
]  # fmt: skip


def policy_loss_specs(name: str, pointer: str) -> list[Spec]:
    """The two kernels that touch every element."""
    velocities = {f"{n}_ptr": pointer for n in ("v", "v_old", "u", "v_ref")}
    others = ("gate", "sums", "rows", "upstream")
    types = {**velocities, **{f"{n}_ptr": "*fp32" for n in others}, "grad_ptr": pointer,
             "elements": "i32", "chunks": "i32", "rows": "i32"}  # fmt: skip
    module = import_module("gardo_kernels.policy_loss")  # its function has its name
    chunk, block = module.CHUNK, module.BLOCK
    return [
        Spec(f"policy_loss_sums_{name}", module._policy_loss_sums_kernel, types,
             {"HAS_REF": True, "QUADRATIC": True, "CHUNK": chunk, "BLOCK": block}, block),
        Spec(f"policy_loss_bwd_{name}", module._policy_loss_bwd_kernel, types,
             {"HAS_REF": True, "QUADRATIC": True, "BLOCK": block}, block),
    ]  # fmt: skip


def nft_loss_specs(name: str, pointer: str) -> list[Spec]:
    """The two kernels that touch every element."""
    inputs = {f"{n}_ptr": pointer for n in ("v", "v_old", "x_t", "x0", "v_ref")}
    others = ("t", "gate", "sums", "rows", "upstream")
    types = {**inputs, **{f"{n}_ptr": "*fp32" for n in others}, "grad_ptr": pointer,
             "elements": "i32", "chunks": "i32", "rows": "i32", "b": "fp32"}  # fmt: skip
    module = import_module("gardo_kernels.nft_loss")
    chunk, block = module.CHUNK, module.BLOCK
    return [
        Spec(f"nft_loss_sums_{name}", module._nft_loss_sums_kernel, types,
             {"HAS_REF": True, "CHUNK": chunk, "BLOCK": block}, block),
        Spec(f"nft_loss_bwd_{name}", module._nft_loss_bwd_kernel, types,
             {"HAS_REF": True, "BLOCK": block}, block),
    ]  # fmt: skip


def sde_step_specs(name: str, pointer: str, *, guided: bool) -> list[Spec]:
    """As the rollout calls it: noise drawn, u kept, the model's copy; guided, all that there is."""
    low = ("v", "uncond", "low", "velocity")
    wide = ("x", "m_prev", "table", "x_next", "u", "m", "sums")
    types = {**{f"{n}_ptr": pointer for n in low}, **{f"{n}_ptr": "*fp32" for n in wide},
             **{f"{n}_ptr": "*i64" for n in ("step", "seed", "id")},
             "elements": "i32", "steps": "i32", "columns": "i32", "guidance": "fp32"}  # fmt: skip
    module = import_module("gardo_kernels.sde_step")
    return [
        Spec(f"sde_step_{name}", module._sde_step_fwd_kernel, types,
             {"HAS_NOISE": True, "GUIDED": guided, "HAS_M": guided, "KEEP_LOW": pointer != "*fp32",
              "KEEP_U": True, "KEEP_M": guided, "KEEP_SQUARE": guided, "FAST": True,
              "BLOCK": module.BLOCK}, module.BLOCK),
    ]  # fmt: skip


SPECS += sde_step_specs("bf16", "*bf16", guided=False) + sde_step_specs(
    "fp32", "*fp32", guided=False
)
SPECS += sde_step_specs("guided_bf16", "*bf16", guided=True)


def awm_loss_specs(name: str, pointer: str) -> list[Spec]:
    """The two kernels that touch every element, with all that is optional; the target is fp32."""
    velocities = {f"{n}_ptr": pointer for n in ("v", "v_ref", "v_ema", "v_old")}
    others = ("target", "gate", "sums", "rows", "upstream")
    types = {**velocities, **{f"{n}_ptr": "*fp32" for n in others}, "grad_ptr": pointer,
             "elements": "i32", "chunks": "i32", "rows": "i32"}  # fmt: skip
    module = import_module("gardo_kernels.awm_loss")
    chunk, block = module.CHUNK, module.BLOCK
    return [
        Spec(f"awm_loss_sums_{name}", module._awm_loss_sums_kernel, types,
             {"HAS_REF": True, "HAS_EMA": True, "CURVED": True, "CHUNK": chunk, "BLOCK": block},
             block),
        Spec(f"awm_loss_bwd_{name}", module._awm_loss_bwd_kernel, types,
             {"HAS_REF": True, "HAS_EMA": True, "BLOCK": block}, block),
    ]  # fmt: skip


SPECS += awm_loss_specs("bf16", "*bf16") + awm_loss_specs("fp32", "*fp32")


def nearest_cosine_specs() -> list[Spec]:
    """The kernels that touch every feature; an element is a feature, or that of a pair of rows."""
    scalars = {"leader_ptr": "*i32", "bounds_ptr": "*i32", "group_ptr": "*i64", "rows": "i32"}
    floats = ("e", "n", "zero", "nearest", "sums", "square")
    types = {f"{n}_ptr": "*fp32" for n in floats} | scalars
    types |= {"features": "i32", "width": "i32"}
    m = import_module("gardo_kernels.nearest_cosine")
    rows, tile = {"ROWS": m.ROWS}, {"TILE": m.TILE, "DEPTH": m.DEPTH}
    chords = {**rows, "COLUMNS": m.COLUMNS, "SPLITS": m.SPLITS, "LANES": m.LANES,
              "STAGES": m.STAGES}  # fmt: skip
    return [
        *(Spec(f"nearest_cosine_normalise_{name}", m._normalise_kernel, {**types, "e_ptr": pointer},
               {**rows, "HAS_GROUPS": True, "BLOCK": m.BLOCK}, m.ROWS * m.BLOCK, 8)
          for name, pointer in (("bf16", "*bf16"), ("fp32", "*fp32"))),
        Spec("nearest_cosine_chords", m._chords_kernel, types, chords,
             m.ROWS * m.COLUMNS * m.LANES * 4, 1),
        Spec("nearest_cosine_squares", m._squares_kernel, types, tile, m.TILE**2 * m.DEPTH, 4, 2),
        Spec("nearest_cosine_tiles", m._tiles_kernel, types, tile, m.TILE**2 * m.DEPTH),
    ]  # fmt: skip


SPECS += nearest_cosine_specs()
SPECS += nft_loss_specs("bf16", "*bf16") + nft_loss_specs("fp32", "*fp32")
SPECS += policy_loss_specs("bf16", "*bf16") + policy_loss_specs("fp32", "*fp32")


def few_specs() -> list[Spec]:
    """The kernels that see one value a row: what is left out is None, a gate may be booleans."""
    row_values = ("advantage", "h", "B", "w", "t", "r", "weight", "gate", "kl_scale", "leader")
    written = ("sums", "rows", "loss", "parts", "zero", "nearest", "mean")
    numbers = ("log_low", "log_high", "clip_low", "clip_high", "beta", "ema_beta", "adv_clip",
               "power", "policy_scale", "floor", "b")  # fmt: skip
    types = {**{f"{n}_ptr": "*fp32" for n in row_values + written}, "flags_ptr": "*i1",
             "leader_ptr": "*i32", "bounds_ptr": "*i32", **dict.fromkeys(numbers, "fp32"),
             **dict.fromkeys(("rows", "elements", "chunks"), "i32")}  # fmt: skip
    loss, nft, awm, near = (
        import_module(f"gardo_kernels.{n}")
        for n in ("policy_loss", "nft_loss", "awm_loss", "nearest_cosine")
    )
    rows = {"ROWS": loss.ROWS_AT_A_TIME}
    plain = {"weight_ptr": None, "kl_scale_ptr": None, **rows}
    means = {"ROWS": near.ROWS, "SPLITS": near.SPLITS, "BLOCK": near.MEANS_BLOCK}
    count = loss.ROWS_AT_A_TIME
    return [
        Spec("policy_loss_rows", loss._policy_loss_rows_kernel, types, rows, count),
        Spec("policy_loss_rows_plain", loss._policy_loss_rows_kernel,
             {n: t for n, t in types.items() if n not in plain} | {"gate_ptr": "*i1"}, plain,
             count),
        Spec("nft_loss_rows", nft._nft_loss_rows_kernel, types, rows, count),
        Spec("awm_loss_rows", awm._awm_loss_rows_kernel, types, {**rows, "CURVED": True}, count),
        Spec("nearest_cosine_means", near._means_kernel, types, means, near.MEANS_BLOCK),
    ]  # fmt: skip


SPECS += few_specs()


def compiled(spec: Spec, architecture: int) -> Code:
    names = spec.kernel.arg_names
    signature = {n: spec.types.get(n, "constexpr") for n in names}
    whole = ("count", "elements", "features", "width")  # of a row: multiples of 16
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in whole]
    source = ASTSource(
        spec.kernel,
        signature,
        {(names.index(n),): getattr(v, "value", v) for n, v in spec.constants.items()},
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
        sass, usage = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = [name for name in INSTRUCTION.findall(sass) if name != "NOP"]
    vectors = [n for n in found if re.match(r"(LDG|STG|LDGSTS)\.", n)]
    wide = [n for n in vectors if ".128" in n]
    return Code(
        name=spec.name,
        architecture=architecture,
        instructions=len(found),
        per_element=len(found) * 32 * spec.warps / spec.per_program,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
        spills=sum(n.startswith(("LDL", "STL")) for n in found),
        wide=len(wide),
        other=len(vectors) - len(wide),
        doubles=sum(re.match(r"D(ADD|MUL|FMA|SETP)", n) is not None for n in found),
        atomics=sum(re.match(r"(ATOM|RED)G?(\.|$)", n) is not None for n in found),
        drops=sum(n.startswith("FMNMX") and ".NAN" not in n for n in found),
    )


if __name__ == "__main__":
    codes = [compiled(spec, architecture) for spec in SPECS for architecture in ARCHITECTURES]
    json.dump([asdict(code) for code in codes], sys.stdout, indent=1)
