"""Ways to run the model train alike: compiled, its LoRA folded, by our kernels, other attention.

However weights are gathered and activations kept. `compiled` traces blocks as torch.compile does
and runs them by torch's own operators, which gives the same bits as eager blocks in seconds;
`inductor` makes kernels, as a run does.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.cases import Case
from tests.integration.checks import check_slots, check_teachers, compare, steps_of
from tests.integration.coverings import alone
from tests.integration.launch import launch, start, wait_for

QUICK = {
    "local": (0, [Case("gardo", "lora", "local", ("compiled", "folded", "matmuls"), probes=())]),
    "two_ranks": (2, [
        Case("gardo", "full", "stage3", ("tight", "each", "full", "compiled")),
        Case("gardo", "lora", "stage3", ("tight", "once", "folded", "block_kernels")),
    ]),
}  # fmt: skip
STAGES = [
    Case("gardo", weights, f"stage{stage}", (*(("tight",) if stage == 3 else ()), *ways))
    for stage in range(4)
    for weights, ways in (
        ("lora", ("folded",)),
        ("lora", ("compiled",)),
        ("lora", ("compiled", "folded")),
        ("full", ("compiled",)),
        ("full", ("block_kernels",)),
    )
]
WHOLE = {
    "local": (0, [
        Case("gardo", "lora", "local", ("inductor",), probes=()),
        Case("flow_grpo", "full", "local", ("sd3", "compiled"), steps=2, probes=()),
        Case("flow_grpo", "lora", "local", ("sd3", "folded", "block_kernels"), steps=2, probes=()),
        Case("diffusion_nft", "full", "local", ("inductor", "matmuls"), steps=2, probes=()),
        Case("gardo", "lora", "local", ("inductor", "folded", "block_kernels"), probes=()),
        Case("gardo", "full", "local", ("math",), probes=()),  # the CPU's other attention
        Case("flow_grpo", "lora", "local", ("nf4", "folded"), steps=2, probes=()),
        Case("flow_grpo", "lora", "local", ("int8", "folded"), steps=2, probes=()),
    ]),
    "one_rank": (1, [STAGES[-3], STAGES[-2]]),
    "two_ranks": (2, [
        *STAGES,
        Case("flow_grpo", "full", "stage3", ("tight", "once", "matmuls", "compiled"), steps=2),
        Case("flow_grpo", "lora", "stage1", ("selective", "compiled"), steps=2),
        Case("flow_grpo", "lora", "stage1", ("matmuls", "folded"), steps=2),
        Case("gardo", "lora", "stage3", ("tight", "once", "inductor")),
    ]),
}  # fmt: skip
Parts = dict[str, tuple[int, list[Case]]]


def cases_of(parts: Parts) -> list[tuple[str, Case]]:
    return [(world, case) for world, (_, cases) in parts.items() for case in cases]


def run(parts: Parts, folder: Path) -> dict[str, Path]:
    found = {name: folder / name for name in ("eager", *parts)}
    for path in found.values():
        path.mkdir()
    eager = list(dict.fromkeys(alone(case) for _, case in cases_of(parts)))
    wait_for([start(0, found["eager"], eager), start(0, found["local"], parts["local"][1])])
    for name, (ranks, cases) in parts.items():
        if ranks:
            launch(ranks, found[name], cases)
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run(WHOLE, tmp_path_factory.mktemp("whole"))


def graphs(folder: Path, case: Case) -> list[int]:
    """Compiled in each iteration."""
    return [record.get("compiled_graphs", 0) for record in steps_of(folder, case)]


def check(folders: dict[str, Path], world: str, case: Case) -> None:
    """Numbers, slots, and nothing compiled after the first iteration.

    The second iteration is the first to ask the reference: no shape is new then. int8 rounds
    activations: what rounds otherwise before it, it makes larger.
    """
    rel = 0.1 if case.has("int8") else 1e-3 if case.has("inductor") else 1e-4
    compare(folders["eager"], folders[world], case, rel=rel)
    assert not any(graphs(folders[world], case)[1:])
    if case.probes:
        check_slots(folders[world], case)
        check_teachers(folders[world], case)


@pytest.mark.parametrize(("world", "case"), cases_of(QUICK), ids=str)
def test_the_model_trains_as_diffusers_and_peft_run_it(
    quick: dict[str, Path], world: str, case: Case
) -> None:
    check(quick, world, case)


@pytest.mark.parametrize(("world", "case"), cases_of(QUICK), ids=str)
def test_graphs_are_compiled_where_it_was_asked_for(
    quick: dict[str, Path], world: str, case: Case
) -> None:
    """In the first case of a process; a later one of the same shapes finds them there."""
    assert (graphs(quick[world], case)[0] > 0) == case.has("compiled")


@pytest.mark.full
@pytest.mark.parametrize(("world", "case"), cases_of(WHOLE), ids=str)
def test_the_model_trains_as_diffusers_and_peft_run_it_all(
    whole: dict[str, Path], world: str, case: Case
) -> None:
    check(whole, world, case)
