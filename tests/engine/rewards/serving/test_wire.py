"""What goes over the line: to the bit there and back, and nothing else is taken."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gardo.rewards.serving.wire import (
    BadBody,
    Request,
    Scored,
    pack_answer,
    pack_request,
    unpack_answer,
    unpack_request,
)
from gardo.types import Prompt


def request(count: int = 3, **options) -> Request:
    generator = torch.Generator().manual_seed(count)
    pictures = torch.rand(count, 3, 8, 6, generator=generator)
    prompts = tuple(
        Prompt(f"a prompt, {i} “é”\n", {"tag": i, "in": [{"a": None}]}) for i in range(count)
    )
    return Request((pictures,), prompts, **options)


def test_pictures_and_prompts_arrive_as_they_were():
    sent = request()
    got = unpack_request(pack_request(sent), "score")
    assert torch.equal(got.pictures[0], sent.pictures[0])
    assert got.prompts == sent.prompts and got.exact
    assert [dict(p.metadata) for p in got.prompts] == [dict(p.metadata) for p in sent.prompts]


def test_pairs_arrive_in_their_order():
    one = request().pictures[0]
    sent = Request((one, one.flip(0)), request().prompts, exact=False)
    got = unpack_request(pack_request(sent), "compare")
    assert all(map(torch.equal, got.pictures, sent.pictures)) and not got.exact


def test_eight_bits_are_a_quarter_and_off_by_half_a_step():
    sent = request(8)
    body = pack_request(sent, "uint8")
    got = unpack_request(body, "score").pictures[0]
    assert (got - sent.pictures[0]).abs().max() <= 0.5 / 255 + 1e-6
    assert len(pack_request(sent)) - len(body) == 3 * sent.pictures[0].numel()


@pytest.mark.parametrize("shape", [(4,), (4, 5)], ids=str)
def test_answers_keep_every_bit_nan_too(shape):
    value = torch.randn(shape)
    value[1] = torch.nan
    got = unpack_answer(pack_answer(Scored(value, {"questions": 4, "seconds": 0.5}, "why")), 4)
    assert torch.equal(got.values.view(torch.int32), value.view(torch.int32))
    assert got.costs == {"questions": 4, "seconds": 0.5} and got.trouble == "why"
    assert unpack_answer(pack_answer(Scored(value)), 4).costs is None


@pytest.mark.parametrize(
    "said", [{"costs": [1]}, {"costs": {"a": "1"}}, {"costs": {"a": -1}}, {"costs": {"a": True}},
             {"trouble": None}], ids=str,
)  # fmt: skip
def test_costs_that_are_none_are_refused(said):
    body = body_of({"values": torch.zeros(2)}, {"version": 1, **said})
    with pytest.raises(BadBody, match="costs: numbers by name"):
        unpack_answer(body, 2)


def test_an_answer_for_others_is_refused():
    with pytest.raises(BadBody, match="4 values for 3 images"):
        unpack_answer(pack_answer(Scored(torch.zeros(4))), 3)


def body_of(tensors: dict, said: object) -> bytes:
    from safetensors.torch import save

    return save(tensors, {"gardo": json.dumps(said)})


PICTURES = torch.zeros(2, 3, 4, 4)
PROMPTS = [["a", {}], ["b", {}]]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "no safetensors"),
        (b"\x80\x04K\x01.", "no safetensors"),
        (pickle.dumps({"images": [1, 2]}), "no safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", "no safetensors"),
        (body_of({"images": PICTURES}, {"version": 2, "prompts": PROMPTS}), "not of version 1"),
        (body_of({"images": PICTURES}, {"version": 1}), "prompts"),
        (body_of({"images": PICTURES}, [1]), "not of version"),
        (body_of({"images": PICTURES}, {"version": 1, "prompts": [["a"], ["b"]]}), "prompts"),
        (body_of({"images": PICTURES}, {"version": 1, "prompts": PROMPTS[:1]}), "1 prompts for"),
        (body_of({"first": PICTURES}, {"version": 1, "prompts": PROMPTS}), "score takes"),
        (body_of({"images": PICTURES[0]}, {"version": 1, "prompts": PROMPTS}), "shape"),
        (body_of({"images": PICTURES.double()}, {"version": 1, "prompts": PROMPTS}), "float64"),
        (body_of({"images": PICTURES + 2}, {"version": 1, "prompts": PROMPTS}), "outside of"),
        (body_of({"images": PICTURES / 0}, {"version": 1, "prompts": PROMPTS}), "outside of"),
        (body_of({"images": PICTURES}, {"version": 1, "prompts": PROMPTS, "exact": 1}), "exact"),
    ],
)
def test_what_is_no_request_is_refused_in_words(body, why):
    with pytest.raises(BadBody, match=why):
        unpack_request(body, "score")


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_understood(body):
    with pytest.raises(BadBody):
        unpack_request(body, "score")


@given(st.integers(8, 400), st.integers(0, 255))
def test_a_request_with_a_changed_byte_never_does_worse(at, value):
    body = bytearray(pack_request(request(2)))
    body[at % len(body)] = value
    try:
        got = unpack_request(bytes(body), "score")
    except BadBody:
        return
    assert got.pictures[0].shape[0] == len(got.prompts)
