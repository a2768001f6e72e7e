"""A run that starts from a LoRA: its values, to the bit, whatever holds the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gardo.distributed.saved import Saved, committed
from gardo.policies.lora_files import lora_config, open_lora, save_diffusers
from gardo.tiny.models import flux_pipeline
from tests.integration.cases import Case
from tests.integration.checks import check_slots, seen
from tests.integration.launch import launch

# the reference is never moved: it stays what the run started from
LOCAL = Case("flow_grpo", "lora", "local", ("start",), steps=1, probes=("slots",))
CASES = [
    LOCAL.but(engine="stage3").plus("tight"),
    LOCAL.but(engine="stage1").plus("bf16"),
    LOCAL.but(engine="stage3").plus("bf16", "host"),
]
TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj",
           "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2",
           "ff_context.net.0.proj", "ff_context.net.2")  # fmt: skip


def write_lora(folder: Path) -> None:
    """Values that bf16 does not have, of the rank and alpha of the cases' recipe."""
    transformer, generator = flux_pipeline().transformer, torch.Generator().manual_seed(3)
    weights = {}
    for name, module in transformer.named_modules():
        if name.endswith(tuple(f".{target}" for target in TARGETS)):
            sizes = {"A": (4, module.in_features), "B": (module.out_features, 4)}
            for half, size in sizes.items():
                value = 0.1 * torch.randn(size, generator=generator)
                weights[f"{name}.lora_{half}.default.weight"] = value
    folder.mkdir()
    save_diffusers(weights, lora_config(rank=4, alpha=8, targets=TARGETS), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    write_lora(root / "start")
    launch(0, root, [LOCAL])
    launch(2, root, CASES)
    return root


@pytest.mark.parametrize("case", [LOCAL, *CASES], ids=str)
def test_masters_and_reference_are_the_files_values(folder: Path, case: Case) -> None:
    saved = Saved(committed(folder / case.run / "checkpoints")[0])
    lora = open_lora(folder / "start")
    for name, tensor in lora.read().items():
        assert torch.equal(saved.whole("slot.reference", name, tensor.shape), tensor), name
        assert not torch.equal(saved.whole("master", name, tensor.shape), tensor), name
    assert saved.manifest["state"]["base"]["lora"] == lora.digest


@pytest.mark.parametrize("case", [LOCAL, *CASES], ids=str)
def test_forward_passes_see_them(folder: Path, case: Case) -> None:
    """Before the first step as with the reference afterwards; in fp32 as one process does."""
    check_slots(folder, case)
    if not case.has("bf16"):
        start, expected = seen(folder, case)["start"], seen(folder, LOCAL)["start"]
        torch.testing.assert_close(start, expected, rtol=0, atol=1e-5)
