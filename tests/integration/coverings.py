"""Which cases ZeRO is compared with one process on: a covering part, and the whole matrix.

The covering part has every stage, LoRA and full, every way to gather, to keep activations and to
let state wait, every algorithm and every contract between ranks; an algorithm and a layout share a
run where neither knows of the other. Algorithms whose reference never moves take two iterations:
the second has gone through moved weights and moments.
"""

from __future__ import annotations

from tests.integration.cases import LOOK, Case
from tests.integration.recipes import TRAINING

ONE_RANK = [
    Case("gardo", "lora", "stage3", ("tight",)),
    Case("diffusion_nft", "full", "stage3", ("full",), steps=2),
    Case("flow_grpo", "full", "stage1", steps=2),
]
GATHERED = [  # whose all-gathers are counted
    Case("gardo", "lora", "stage3", ("tight", "once"), probes=("evaluation", *LOOK)),
    Case("gardo", "lora", "stage3", ("tight", "each", "full"), probes=("evaluation", *LOOK)),
    Case("gardo", "full", "stage3", ("tight", "once", "full", "buckets")),
    Case("gardo", "full", "stage3", ("tight", "each", "clip")),
    Case("gardo", "lora", "stage3", ("tight", "once", "uneven")),
]
FAILING = Case("flow_grpo", "full", "stage3", ("tight", "once"), steps=2, fault="failing")
LAYOUTS = [
    *GATHERED,
    FAILING,
    Case("gardo_nft_released", "full", "stage3", ("once",)),
    Case("gardo_nft", "full", "stage3", ("offload_all",)),
    Case("diffusion_nft", "lora", "stage3", ("tight", "once", "selective", "host", "ema"), steps=2),
    Case("refl", "lora", "stage3", ("tight", "persistent"), steps=2),
    Case("gardo", "full", "stage2", ("uneven", "offload", "matmuls")),
    Case("gardo_flash", "lora", "stage2"),
    Case("guard", "full", "stage1", ("full", "host"), steps=2),
    Case("gardo", "lora", "stage1", ("pref",)),
    Case("gardo_awm", "full", "stage0", ("full", "clip")),
]
RECOMPUTED = Case("flow_grpo", "lora", "stage3", ("tight", "each", "recompute"), steps=2, probes=())
ALIKE = [  # laid out like one above, and looked at there
    RECOMPUTED,
    Case("gardo_released", "lora", "stage3", ("tight", "once", "matmuls"), probes=()),
    Case("kl_in_reward", "lora", "stage3", ("once",), steps=2, probes=()),
    Case("dance", "full", "stage3", ("tight", "once", "matmuls"), steps=2, probes=()),
    Case("mix", "lora", "stage3", ("once",), steps=2, probes=()),
    Case("ddpo", "lora", "stage2", ("full", "clip"), steps=2, probes=()),
    Case("gardo", "full", "stage1", ("uneven",), probes=()),
    Case("fast", "lora", "stage1", steps=2, probes=()),
]
TWO_RANKS = [*LAYOUTS, *ALIKE]
PARTS = {"one_rank": (1, ONE_RANK), "two_ranks": (2, TWO_RANKS)}

# Compared otherwise than with one process.
BF16 = [
    Case("gardo", "lora", "stage3", ("tight", "once", "bf16")),
    Case("flow_grpo", "full", "stage3", ("tight", "each", "bf16"), steps=2),
    Case("flow_grpo", "full", "stage1", ("bf16",), steps=2),
    Case("diffusion_nft", "lora", "stage2", ("bf16",), steps=2),
    Case("flow_grpo", "full", "stage3", ("bf16_masters",), steps=2),
]
STALE = Case("flow_grpo", "lora", "stage3", ("tight", "each"), steps=2, fault="stale", probes=())
ALL_ROWS = Case("gardo", "lora", "local", ("uneven", "all_rows"))

SETTINGS = [  # of stage 3: what is gathered when, what is kept; of the others there is less
    *(("stage3", ("tight", g, *keep)) for g in ("once", "each") for keep in ((), ("full",))),
    *((f"stage{n}", keep) for n in (0, 1, 2) for keep in ((), ("full",))),
]
EXTRAS = [
    *(Case("gardo", w, f"stage{n}", ("offload",)) for w in ("lora", "full") for n in (1, 2, 3)),
    *(Case("gardo", w, f"stage{n}", ("buckets", "clip")) for w in ("lora", "full") for n in (1, 2)),
    Case("refl", "full", "stage3", ("hpz",)),
    Case("gardo", "full", "stage3", ("offload_all", "uneven")),
]
NAMES = ("flow_grpo", "kl_in_reward", "diffusion_nft", "awm", "gardo", "gardo_nft", "gardo_awm",
         "refl", "fast", "mix", "flash", "gardo_flash", "dance", "guard", "ddpo")  # fmt: skip
ALGORITHMS = [Case(name, w, "stage3", ("tight",)) for w in ("lora", "full") for name in NAMES]
MATRIX = [
    *(Case("gardo", w, engine, options) for w in ("lora", "full") for engine, options in SETTINGS),
    *EXTRAS,
    *ALGORITHMS,
]
WHOLE = {"one_rank": (1, ALGORITHMS), "two_ranks": (2, MATRIX)}


def alone(case: Case) -> Case:
    """The same training in one process."""
    kept = tuple(option for option in case.options if option in TRAINING)
    return case.but(engine="local", options=kept, fault=None, probes=("evaluation",))
