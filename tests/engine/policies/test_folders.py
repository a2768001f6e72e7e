"""Whole weights as diffusers folders: shards, memory, links; loaded by diffusers and by us."""

from __future__ import annotations

import json
import os
import weakref

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from gardo.policies.folders import link_pipeline, save_transformer, write_shards, write_tensors
from gardo.policies.weights import WeightFiles
from tests.engine.policies.tiny import TRANSFORMERS, randomise, velocity


def trained(make, family):
    policy = make(family)
    policy.train_full()
    assert set(policy.trainable()) == {n for n, _ in policy.transformer.named_parameters()}
    return policy, randomise(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_is_the_one_that_safetensors_writes(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b.c": (), "ü": (0, 4), "d": (7,)}
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    file, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(file, shapes, tensors.__getitem__, dtype)
    save_file(tensors, theirs, {"format": "pt"})
    ours, expected = load_file(file), load_file(theirs)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[n], expected[n]) and ours[n].dtype == dtype for n in ours)


@pytest.mark.parametrize("limit", [5 * 10**9, 100_000])
def test_diffusers_loads_the_transformer(make, family, tmp_path, limit):
    (policy, weights), fresh = trained(make, family), make(family)
    save_transformer(policy.transformer, weights, tmp_path, dtype=policy.dtype, limit=1 << 40)
    save_transformer(policy.transformer, weights, tmp_path, dtype=policy.dtype, limit=limit)
    files = sorted(tmp_path.glob("*.safetensors"))  # of the second time alone
    assert (len(files) > 3) == (limit == 100_000)
    expected, untrained = velocity(policy), velocity(fresh)
    assert (expected - untrained).abs().max() > 1e-2
    loaded, report = TRANSFORMERS[family].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    fresh.pipeline.transformer = loaded.eval()
    assert torch.equal(velocity(fresh), expected)
    WeightFiles(tmp_path).check(policy.transformer)  # what training reads


def test_shards_hold_no_more_than_their_limit(tmp_path):
    shapes = {"a": (6,), "b": (4,), "c": (20,), "d": (1,), "e": (9,)}
    write_shards(tmp_path, shapes, lambda n: torch.ones(shapes[n]), torch.float32, limit=40)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    names = [f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index == {
        "metadata": {"total_size": 160},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1], "d": names[2], "e": names[2]},
    }
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == names


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: set[str] = set()
    most = 0

    def read(name):
        nonlocal most
        tensor = torch.full((8,), float(name))
        alive.add(name)
        weakref.finalize(tensor, alive.remove, name)
        most = max(most, len(alive))
        return tensor

    shapes = dict.fromkeys(map(str, range(20)), (8,))
    write_shards(tmp_path, shapes, read, torch.float32)
    assert most <= 2  # the last one is let go when the next is there
    assert (load_file(next(tmp_path.glob("*.safetensors")))["7"] == 7).all()


def test_diffusers_loads_the_pipeline(make, family, tmp_path):
    (policy, weights), fresh = trained(make, family), make(family)
    kept = (policy.folder / "vae/config.json").read_bytes()
    for _ in range(2):  # again over the first
        link_pipeline(policy.folder, tmp_path)
        save_transformer(policy.transformer, weights, tmp_path / "transformer", dtype=policy.dtype)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is type(policy.pipeline)
    fresh.pipeline.transformer = pipeline.transformer.eval()
    assert torch.equal(velocity(fresh), velocity(policy))
    assert (policy.folder / "vae/config.json").read_bytes() == kept
    linked = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    assert os.path.samefile(linked, policy.folder / "vae/diffusion_pytorch_model.safetensors")
    assert make(family, path=str(tmp_path)).folder == tmp_path  # and training can start from it


def test_files_are_copied_where_links_cannot_be(make, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    base = make("flux").folder
    monkeypatch.setattr(os, "link", refuse)
    link_pipeline(base, tmp_path)
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (base / name).read_bytes()
    assert not os.path.samefile(tmp_path / name, base / name)
    assert not (tmp_path / "transformer").exists()
