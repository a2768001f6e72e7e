"""A judge in this process, on tiny random models of both classes, against plain transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gardo.rewards._loading import one_copy_each
from gardo.rewards.judging.local import LocalVoice
from gardo.rewards.judging.questions import Answer, Question, Unanswered, choice_of
from tests.engine.rewards import vlm_models
from tests.engine.rewards.vlm_models import CLASSES, CPU, HOSTILE, PICTURE

LOW, HIGH = 28 * 28, 16 * 28 * 28
SYSTEM = "You are a helpful assistant."
CHOICES = ("yes", "no")


@pytest.fixture(scope="module", params=CLASSES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    vlm_models.save(path, request.param)
    said = path / "generation_config.json"
    settings = {"repetition_penalty": 3.0, "do_sample": True, "temperature": 0.5}
    said.write_text(json.dumps(json.loads(said.read_text()) | settings))  # as Qwen2.5-VL's
    return path


def voice_of(folder: Path, **changed: Any) -> LocalVoice:
    fields: dict[str, Any] = {"batch": 8, "min_pixels": LOW, "max_pixels": HIGH, **changed}
    return LocalVoice(str(folder), None, fields.pop("dtype", "float32"), CPU, **fields)


@pytest.fixture(scope="module")
def voice(folder: Path) -> LocalVoice:
    return voice_of(folder)


def pictures() -> list[Tensor]:
    sizes = [(56, 56), (84, 112), (28, 56)]
    return [vlm_models.pictures(1, *size, seed=i)[0] for i, size in enumerate(sizes)]


def questions() -> list[Question]:
    """Texts and pictures in several orders, of several lengths."""
    one, two, three = pictures()
    return [
        Question(SYSTEM, (one, "Is the picture what the prompt asks for?"), max_tokens=9),
        Question("Yes or no?", ("first", one, " second", two, "better?"), max_tokens=5),
        Question("Say one word.", ("no picture at all",), max_tokens=3),
        Question("", (three, three, "the same"), max_tokens=12),
    ]


def asked(voice: LocalVoice, *said: Question) -> list[Answer]:
    answers = voice.begin(said)()
    assert all(isinstance(answer, Answer) for answer in answers)
    return answers  # type: ignore[return-value]


def choosing(question: Question, choices: tuple[str, ...] = CHOICES) -> Question:
    return dataclasses.replace(question, choices=choices)


# ---- against transformers ------------------------------------------------------------------------


class Plain:
    """The authors' template, processor and model, one question at a time."""

    def __init__(self, folder: Path) -> None:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        model_class = getattr(transformers, CLASSES[kind])
        self.model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = vlm_models.tokenizer()
        self.processor = Qwen2VLImageProcessorPil(size={"shortest_edge": LOW, "longest_edge": HIGH})

    def inputs(self, question: Question) -> dict[str, Tensor]:
        content = [p if isinstance(p, str) else None for p in question.parts]
        text = self.tokenizer.apply_chat_template(
            vlm_models.messages(question.system, content),
            tokenize=False,
            add_generation_prompt=True,
        )
        shown = [p[None] for p in question.parts if isinstance(p, Tensor)]
        seen = {}
        if shown:
            images = [vlm_models.pil(picture)[0] for picture in shown]
            seen = dict(self.processor(images, return_tensors="pt"))
            for grid in seen["image_grid_thw"]:
                pads = int(grid.prod()) // 4 * "<|image_pad|>"
                text = text.replace(PICTURE, PICTURE.replace("<|image_pad|>", pads + "#"), 1)
        ids = torch.tensor([self.tokenizer(text.replace("#", "")).input_ids])
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return {"input_ids": ids, "mm_token_type_ids": (ids == pad).int(), **seen}

    @torch.no_grad()
    def chances(self, question: Question) -> dict[str, float]:
        logits = self.model(**self.inputs(question)).logits[0, -1]
        found = dict.fromkeys(question.choices, 0.0)
        for token, chance in enumerate(logits.double().softmax(-1).tolist()):
            choice = choice_of(self.tokenizer.decode([token]), question.choices)
            if choice:
                found[choice] += chance
        return found

    def text(self, question: Question) -> tuple[str, int]:
        inputs = self.inputs(question)
        self.model.generation_config = transformers.GenerationConfig(
            eos_token_id=self.model.config.text_config.eos_token_id, pad_token_id=0
        )
        ids = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=question.max_tokens
        )[0, inputs["input_ids"].shape[1] :]  # fmt: skip
        return self.tokenizer.decode(ids, skip_special_tokens=True), len(ids)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


# Chances of float32: 2^-24 a step, about 100 steps on logits of size 1 to 30
TOLERANCE = 30 * 100**0.5 * 2**-24


@pytest.mark.parametrize("choices", [CHOICES, ("first", "second", "tie"), ("1", "2")])
def test_chances_are_those_of_the_next_token(
    voice: LocalVoice, plain: Plain, choices: tuple[str, ...]
) -> None:
    several = [choosing(question, choices) for question in questions()]
    found = asked(voice, *several)
    for question, answer in zip(several, found, strict=True):
        wanted = plain.chances(question)
        assert answer.chances is not None and list(answer.chances) == list(choices)
        assert all(abs(answer.chances[c] - wanted[c]) < TOLERANCE for c in choices)
        assert 0 < sum(wanted.values()) < 1
        inputs = plain.inputs(question)
        logits = plain.model(**inputs).logits[0, -1]
        assert answer.text == plain.tokenizer.decode([int(logits.argmax())])
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]
        assert answer.completion_tokens == 1


def test_texts_are_those_that_transformers_generates(voice: LocalVoice, plain: Plain) -> None:
    """The folder's penalty, temperature and sampling are not used."""
    several = questions()
    found = asked(voice, *several)
    assert len({answer.text for answer in found}) > 1
    for question, answer in zip(several, found, strict=True):
        text, tokens = plain.text(question)
        assert answer.text == text and answer.chances is None
        assert answer.completion_tokens == tokens <= question.max_tokens
        assert answer.prompt_tokens == plain.inputs(question)["input_ids"].shape[1]


def test_an_answer_ends_where_the_folder_says(folder: Path, voice: LocalVoice) -> None:
    """The stop is counted and not said."""
    question = questions()[0]
    whole = asked(voice, question)[0]
    other = voice_of(folder)
    row = other._row(question)
    assert not isinstance(row, Unanswered)
    fourth = int(other.model.generate(**other._inputs([row]), max_new_tokens=4)[0, -1])
    other.stops = other.model.generation_config.eos_token_id = [fourth]
    short = asked(other, question, questions()[3])[0]
    assert 1 <= short.completion_tokens <= 4 < whole.completion_tokens <= 9
    assert whole.text.startswith(short.text)


# ---- neighbours, pictures, texts -----------------------------------------------------------------


@pytest.mark.parametrize("chooses", [True, False])
def test_an_answer_does_not_depend_on_its_neighbours(
    folder: Path, voice: LocalVoice, chooses: bool
) -> None:
    several = [choosing(q) if chooses else q for q in questions()]
    together = asked(voice, *several)
    alone = [asked(voice, question)[0] for question in several]
    pairs = asked(voice_of(folder, batch=2), *several[::-1])[::-1]
    for other in (alone, pairs):
        for one, two in zip(together, other, strict=True):
            assert one.text == two.text and one.prompt_tokens == two.prompt_tokens
            assert one.completion_tokens == two.completion_tokens
            for choice in CHOICES if chooses else ():
                assert abs(one.chances[choice] - two.chances[choice]) < TOLERANCE  # type: ignore[index]


def test_questions_of_both_sorts_come_back_in_their_order(voice: LocalVoice) -> None:
    several = [q if i % 2 else choosing(q) for i, q in enumerate(questions())]
    found = asked(voice, *several)
    assert [answer.chances is not None for answer in found] == [True, False, True, False]
    for question, answer in zip(several, found, strict=True):
        assert asked(voice, question)[0].text == answer.text
    assert voice.begin([])() == []


def test_pictures_and_their_order_matter(voice: LocalVoice) -> None:
    one, two, _ = pictures()
    text = "which is better?"
    shown = [(one, two, text), (two, one, text), (one, one, text), (text,)]
    found = asked(voice, *(choosing(Question(SYSTEM, parts)) for parts in shown))
    chances = torch.tensor([[answer.chances[c] for c in CHOICES] for answer in found])  # type: ignore[index]
    apart = (chances[:, None] - chances[None]).abs().amax(-1)
    assert float(apart[~torch.eye(len(shown), dtype=torch.bool)].min()) > 10 * TOLERANCE


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_cannot_write_special_tokens(voice: LocalVoice, text: str) -> None:
    added = set(voice.words.tokenizer.get_added_vocab().values())
    rows = [voice._row(Question(s, (pictures()[0], s, "?"))) for s in ("tame", text)]
    tame, wild = ([i for i in row.ids if i in added] for row in rows)  # type: ignore[union-attr]
    assert tame == wild
    for question in (Question(text, (pictures()[0], text), max_tokens=2), Question(text, (text,))):
        assert isinstance(voice.begin([choosing(question)])()[0], Answer)


def test_what_cannot_be_asked_is_unanswered_alone(voice: LocalVoice) -> None:
    one = pictures()[0]
    long = Question(SYSTEM, (one, "word " * 3000), max_tokens=3)
    thin = Question(SYSTEM, (torch.zeros(3, 2, 500, dtype=torch.uint8), "?"), max_tokens=3)
    good = dataclasses.replace(questions()[0])
    found = voice.begin([long, good, thin, choosing(long)])()
    assert "tokens; the model takes 2045" in str(found[0])
    assert "longer than 200 : 1" in str(found[2])
    assert isinstance(found[0], Unanswered) and isinstance(found[2], Unanswered)
    assert isinstance(found[3], Unanswered)
    assert found[1] == asked(voice, good)[0]


def test_a_model_that_overflows_does_not_answer(folder: Path) -> None:
    broken = voice_of(folder)
    broken.model.lm_head.weight.data.fill_(torch.nan)
    found = broken.begin([choosing(questions()[0])])()[0]
    assert isinstance(found, Unanswered) and "no finite numbers" in str(found)


# ---- loading -------------------------------------------------------------------------------------


def test_pictures_keep_within_their_pixels(folder: Path, voice: LocalVoice) -> None:
    large = Question(SYSTEM, (vlm_models.pictures(1, 280, 280)[0], "?"), choices=CHOICES)
    assert asked(voice, large)[0].prompt_tokens == asked(
        voice_of(folder, max_pixels=4 * 28 * 28), large
    )[0].prompt_tokens + (16 - 4)


def test_the_model_is_loaded_in_its_dtype_once(folder: Path) -> None:
    with one_copy_each():
        one, two = (voice_of(folder, dtype="bfloat16") for _ in range(2))
    assert one.model.model is two.model.model and one.model.lm_head is two.model.lm_head
    assert {p.dtype for p in one.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in one.model.parameters())
    assert asked(one, choosing(questions()[0]))[0].chances
    one.close()


def test_a_tied_model_is_whole(tmp_path: Path) -> None:
    """The 2B's `lm_head` is its embedding."""
    vlm_models.save(tmp_path, "qwen2_vl", tie_word_embeddings=True)
    voice, plain = voice_of(tmp_path), Plain(tmp_path)
    question = choosing(questions()[0])
    wanted, found = plain.chances(question), asked(voice, question)[0].chances
    assert found and all(abs(found[c] - wanted[c]) < TOLERANCE for c in CHOICES)


def test_another_model_is_sent_to_an_endpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^path: .* 'dinov3_vit'; .*where: openai:URL$"):
        voice_of(Path("builtin:dinov3"))
    with pytest.raises(ValueError, match=r"^path: .* holds no model: "):
        voice_of(tmp_path / "none")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    vlm_models.save(tmp_path, "qwen2_vl")
    tokens = vlm_models.tokenizer()
    tokens.add_tokens([f"<{n}>" for n in range(9)])
    tokens.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^path: .* holds another model's tokenizer"):
        voice_of(tmp_path)
