"""A prompt's conditioning is computed once, alone, and lasts longer than the text encoders."""

import ctypes
import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from gardo.config import load
from gardo.loading import build_policy
from gardo.policies.embeddings import Embeddings
from gardo.policies.weights import stored_dtype
from gardo.recipe import policy_plugin
from gardo.settings import model_path
from tests import ROOT

PROMPTS = ["one red circle", "two blue squares", "three green triangles"]
CPU = torch.device("cpu")


@pytest.fixture(params=["flux", "sd3"])
def policy(request):
    recipe = load(ROOT / "recipes" / f"tiny_{request.param}_gardo.yaml")
    return build_policy(recipe, CPU)


class Counting:
    """`encode_text` of a policy that says what it was asked."""

    def __init__(self, policy):
        self.policy, self.asked = policy, []

    def __call__(self, prompts):
        self.asked.append(prompts)
        return self.policy.encode_text(prompts)


def embeddings(policy, **more):
    counting = Counting(policy)
    more = {"residence": "offload", "device": CPU, "dtype": policy.dtype, **more}
    made = Embeddings(policy.pipeline, counting, **more)
    return made, counting.asked


def same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_prompt_is_encoded_once_and_alone(policy):
    known, asked = embeddings(policy)
    first = known([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    again = known([PROMPTS[1], PROMPTS[2]])
    assert asked == [[p] for p in PROMPTS]
    for name, tensor in policy.encode_text([PROMPTS[1]]).items():
        assert torch.equal(first[name][1:2], tensor) and torch.equal(again[name][:1], tensor)
        assert torch.equal(first[name][0], first[name][2])


def test_what_is_known_stays_within_its_room(policy):
    one = sum(t.nbytes for t in policy.encode_text([PROMPTS[0]]).values())
    known, asked = embeddings(policy, room=2 * one)
    for prompt in (*PROMPTS, PROMPTS[2], PROMPTS[0]):  # the first was dropped for the third
        known([prompt])
    assert asked == [[PROMPTS[i]] for i in (0, 1, 2, 0)]
    same(known(PROMPTS), policy.embeddings(PROMPTS))  # three at once do not fit, and are right


def test_freed_encoders_leave_files_that_the_next_run_finds(policy, tmp_path):
    before = policy.encode(PROMPTS)
    encoders = [weakref.ref(part) for name, part in policy.pipeline.components.items()
                if name.startswith("text_encoder")]  # fmt: skip
    left = sum(name.startswith("text_encoder") for name in policy.pipeline.components)
    share = {"share": (0, 1), "wait": lambda: None}
    new = policy.free_encoders(PROMPTS, tmp_path, **share)
    assert new == 3 + len(policy.own_prompts)
    assert encoders and not any(encoder() for encoder in encoders)
    same(before, policy.encode(PROMPTS))
    there = policy.pipeline.components
    assert all(there[name] is None for name in there if name.startswith("text_encoder")) and left
    with pytest.raises(RuntimeError, match=r"no embedding of 'four'.*model\.encoders: offload"):
        policy.encode(["four"])
    assert policy.free_encoders(PROMPTS, tmp_path, **share) == 0  # nothing to encode any more


def test_ranks_share_the_work(policy, tmp_path):
    """Each encodes its part, and waits for the other's."""
    seen = []
    for rank in (0, 1):
        known, asked = embeddings(policy)
        # what the other rank leaves is there when the wait is over
        known.free(PROMPTS, tmp_path / str(rank), identity="x", share=(rank, 2))
        seen.append([p for (p,) in asked])
        policy.embeddings._show(True)
    assert seen == [[PROMPTS[0], PROMPTS[2]], [PROMPTS[1]]]


def test_another_encoder_has_other_files(policy, tmp_path):
    for identity in ("one", "two"):
        known, asked = embeddings(policy)
        known.free(PROMPTS[:1], tmp_path, identity=identity)
        policy.embeddings._show(True)
        assert len(asked) == 1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_encoders_wait_as_their_files_have_them(policy):
    """Where they move (as to a GPU), they are cast there: the same numbers as if read so."""
    expected = policy.encode_text([PROMPTS[0]])
    known, _ = embeddings(policy)
    parameters = [p for e in known._encoders.values() for p in e.parameters()]
    for parameter in parameters:
        parameter.data = parameter.data.double()
    waiting, known._moves = [p.data_ptr() for p in parameters], True
    same(known([PROMPTS[0]]), expected)
    assert [p.data_ptr() for p in parameters] == waiting
    assert {p.dtype for p in parameters} == {torch.float64}
    policy.embeddings._show(True)


def anonymous():
    """Bytes in use of this process that are no pages of files, nor what its heap has free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in s]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts as Linux does")
def test_encoders_of_a_gpu_are_pages_of_their_files(tmp_path, monkeypatch):
    """64 MB of an encoder in bf16, for a policy in fp32: no copy of them, as there is on a CPU."""
    folder = tmp_path / "flux"
    shutil.copytree(model_path("builtin:flux"), folder)
    config = T5Config(d_model=512, d_ff=2048, num_layers=10, num_heads=8, vocab_size=64)
    large = T5EncoderModel(config).to(torch.bfloat16)
    size = sum(p.nbytes for p in large.parameters())
    large.save_pretrained(folder / "text_encoder_2")
    del large
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)  # no GPU to go to
    read = load(ROOT / "recipes" / "tiny_flux_gardo.yaml", [f"model.path={folder}"])
    grown = {}
    for device in (CPU, torch.device("cuda")):
        before = anonymous()
        policy = policy_plugin(read.model)(
            read.model, dtype=torch.float32, device=device, defer=True
        )
        there = policy.embeddings._encoders["text_encoder_2"].state_dict().values()
        assert all(t.isfinite().all() for t in there)  # every page is read
        grown[device.type] = anonymous() - before
        assert {t.dtype for t in there} == {torch.float32 if device == CPU else torch.bfloat16}
    # in float32 it has twice the size
    assert grown["cuda"] < size / 2 < 2 * size < grown["cpu"] * 1.1


@pytest.mark.parametrize(
    ("types", "wide"),
    [
        (["bfloat16"], "bfloat16"),
        (["float16", "int64"], "float16"),
        (["float16", "float32"], "float32"),
        (["float16", "bfloat16"], "float32"),
    ],
)
def test_the_type_of_files_holds_all_their_numbers(types, wide, tmp_path):
    for number, name in enumerate(types):
        tensor = torch.zeros(2, dtype=getattr(torch, name))
        save_file({"weight": tensor}, tmp_path / f"model-{number}.safetensors")
    assert stored_dtype(tmp_path) == getattr(torch, wide)


def test_without_files_there_is_no_type(tmp_path):
    assert stored_dtype(tmp_path) is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_offloaded_encoders_visit_the_gpu(family, tmp_path):
    """They encode there, wait in host memory, and are gone once freed."""
    device = torch.device("cuda")
    made = {}
    for residence in ("resident", "offload", "free"):
        recipe = ROOT / "recipes" / f"tiny_{family}_gardo.yaml"
        policy = build_policy(load(recipe, [f"model.encoders={residence}"]), device)
        if residence == "free":
            policy.free_encoders(PROMPTS, tmp_path, share=(0, 1), wait=lambda: None)
        made[residence] = policy.encode(PROMPTS)
        there = [part for name, part in policy.pipeline.components.items()
                 if name.startswith("text_encoder")]  # fmt: skip
        assert all((part is None) == (residence != "resident") for part in there)
        waiting = [p.device.type for part in policy.embeddings._encoders.values()
                   for p in part.parameters()]  # fmt: skip
        assert set(waiting) == {"resident": {"cuda"}, "offload": {"cpu"}, "free": set()}[residence]
    for residence in ("offload", "free"):
        same(made["resident"], made[residence])
    assert all(t.device.type == "cuda" for t in made["offload"].values())
