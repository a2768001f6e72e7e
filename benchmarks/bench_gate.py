"""What the gate picks on the tiny Flux: by the paper's sign, and by that of the released code.

    ./run bench gate

Draws a batch with the untrained tiny Flux of recipes/tiny_flux_gardo.yaml, scores it with the
recipe's rewards, and gates the same fraction by either sign. Writes results/gate_signs.{png,csv}
and fills the table of docs/algorithms.md.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

import torch
from torch import Tensor

from gardo.algorithms.gardo import Gate, GateSettings
from gardo.algorithms.uncertainty import uncertainty
from gardo.config import load
from gardo.flow import transitions
from gardo.loading import build_panel, build_policy
from gardo.report.pictures import save_grid
from gardo.rollout import sample
from gardo.types import SamplePlan, Scores
from gardo_kernels import win_rate
from pages import ROOT, fill, revision

RESULTS = ROOT / "benchmarks" / "results"
PROMPTS, IMAGES = 12, 8  # of each prompt
SIGNS = {"paper": "the paper's sign", "official_code": "the released code's sign"}


def drawn() -> tuple[Tensor, Scores]:
    """Images [B, 3, H, W] of the recipe's first prompts, and what its rewards say of them."""
    recipe = load(ROOT / "recipes" / "tiny_flux_gardo.yaml")
    device = torch.device("cpu")
    policy, panel = build_policy(recipe, device), build_panel(recipe, device)
    policy.load_transformer()
    table = transitions(
        policy.sigmas(recipe.sampler.steps), recipe.sampler.sde, recipe.sampler.noise_level
    )
    prompts = recipe.prompts()
    rollout = sample(
        policy,
        prompts[:: len(prompts) // PROMPTS][:PROMPTS],
        SamplePlan(transitions=table, record=()),
        images_per_prompt=IMAGES,
        first=0,
        count=PROMPTS * IMAGES,
        seed=recipe.run.seed,
        step=0,
        device=device,
        micro_batch=24,
    )
    scores = panel(
        rollout.images_B3HW, rollout.prompts, sample_B=rollout.sample_B, group_B=rollout.group_B
    )
    return rollout.images_B3HW, scores


def table(rows: Sequence[dict[str, object]]) -> str:
    names = [n for n in rows[0] if n not in ("revision", "torch")]
    lines = [
        "| " + " | ".join(n.replace("_", " ") for n in names) + " |",
        "|---" * len(names) + "|",
    ]
    for row in rows:
        values = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in map(row.get, names))
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    images, scores = drawn()
    uncertainty_B = uncertainty(scores, "batch")
    proxy_B = win_rate(scores.proxy_B, scores.valid_B)
    auxiliary_B = torch.stack(
        [win_rate(scores.rewards[n], scores.valid_B) for n in scores.auxiliaries]
    ).mean(0)
    gates = {s: Gate(GateSettings(sign=s)).select(scores)[0] for s in SIGNS}
    rows: list[dict[str, object]] = []
    for sign, gate_B in gates.items():
        rows.append({
            "sign": f"`{sign}`", "gated": int(gate_B.sum()), "of": len(gate_B),
            "gated_by_both": int((gate_B & gates["paper"] & gates["official_code"]).sum()),
            "win_rate_by_the_proxy": float(proxy_B[gate_B].mean()),
            "by_the_auxiliaries": float(auxiliary_B[gate_B].mean()),
            "U": float(uncertainty_B[gate_B].mean()),
            "held-out_fidelity": float(scores.rewards["tiny_fidelity"][gate_B].mean()),
            "torch": torch.__version__, "revision": revision(),
        })  # fmt: skip
    with open(RESULTS / "gate_signs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shown = [gate_B.nonzero().flatten() for gate_B in gates.values()]
    columns = max(len(index) for index in shown)
    save_grid(
        torch.cat([images[index] for index in shown]), RESULTS / "gate_signs.png", columns, scale=3
    )
    note = (
        f"{PROMPTS} prompts, {IMAGES} images each, by `./run bench gate` on a CPU at revision "
        f"{revision()}. Above what the paper's sign gates, below what the released code's does:\n\n"
        "![gated by the paper's sign, and by the released code's]"
        "(../benchmarks/results/gate_signs.png)"
    )
    fill(ROOT / "docs" / "algorithms.md", "gate", f"{table(rows)}\n\n{note}")


if __name__ == "__main__":
    main()
