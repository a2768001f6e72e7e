"""A judge in this process: Qwen2-VL or Qwen2.5-VL, from a folder or a hub id.

With choices: one forward pass, the softmax over the whole vocabulary of the first token of the
answer, summed over the tokens that are or begin each choice. Else: greedy decoding.

Temperature 0 is all that there is: of the folder's generation settings only the tokens that end an
answer are kept (Qwen2.5-VL's have a penalty on repetition, which would change chances). Positions
are the models' own, in three axes (transformers computes them). Questions go `batch` at a time,
padded on the left, where the mask hides it.

Verified on tiny random models of both classes, against transformers on one question at a time. Not
run on published weights yet.

Shapes: B questions, L tokens, K tokens of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gardo.rewards._files import TOKENIZER
from gardo.rewards._loading import FILES, frozen, load_model, type_of
from gardo.rewards.judging.questions import (
    Answer,
    Answers,
    Question,
    Unanswered,
    choice_of,
)
from gardo.rewards.judging.qwen_vl import CLASSES, END, PAD, Pixels, load_words

Said = list["Answer | Unanswered"]


@dataclass(frozen=True)
class Row:
    """A question as the model takes it."""

    question: Question
    ids: list[int]
    patches: list[Tensor]  # [P, V] of each picture, on the device
    grids: list[Tensor]  # [1, 3] of each


class LocalVoice:
    """A Voice in this process."""

    def __init__(
        self,
        path: str,
        revision: str | None,
        dtype: str,
        device: torch.device,
        *,
        batch: int,
        min_pixels: int,
        max_pixels: int,
    ) -> None:
        """ValueError, opening with `path`, for a folder or hub id of something else."""
        import transformers

        kind = type_of(f"path: {path!r}", path, revision, (*FILES, *TOKENIZER))
        if kind not in CLASSES:
            raise ValueError(
                f"path: {path!r} holds a model of type {kind!r}; here run {' and '.join(CLASSES)}, "
                "others behind an endpoint: where: openai:URL"
            )
        self.words = load_words(path, revision, field="path")
        model = self._load(kind, path, revision, dtype)
        config, rows = model.config, model.config.text_config.vocab_size
        if config.image_token_id != self.words.id[PAD] or len(self.words.tokenizer) > rows:
            raise ValueError(f"path: {path!r} holds another model's tokenizer; get it again")
        self.stops = stops_of(model) or [self.words.id[END]]
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=self.stops, pad_token_id=self.words.pad
        )
        self.model = frozen(model, dtype, device, (path, revision))
        self.pixels = Pixels.of(config.vision_config, min_pixels, max_pixels)
        self.longest: int = config.text_config.max_position_embeddings
        self.batch, self.device = batch, device
        self._spelled: list[str] = []  # each token of the vocabulary, once it is needed
        self._starts: dict[tuple[str, ...], list[Tensor]] = {}  # of choices, the tokens of each

    def _load(self, kind: str, path: str, revision: str | None, dtype: str) -> Any:
        import transformers

        return load_model(getattr(transformers, CLASSES[kind]), path, revision, dtype=dtype)

    @torch.no_grad()
    def begin(self, questions: Sequence[Question]) -> Answers:
        """Asks at once; what is returned has the answers."""
        said: dict[int, Answer | Unanswered] = {}
        asks: list[tuple[bool, Callable[[list[Row]], Said]]] = [
            (True, self._choose),
            (False, self._speak),
        ]
        for chooses, ask in asks:
            which = [i for i, q in enumerate(questions) if bool(q.choices) is chooses]
            for at in range(0, len(which), self.batch):
                part = which[at : at + self.batch]
                said |= zip(part, self._asked([questions[i] for i in part], ask), strict=True)
        answers = [said[i] for i in range(len(questions))]
        return lambda: answers

    def close(self) -> None:
        """Nothing to end."""

    def _asked(self, questions: Sequence[Question], ask: Callable[[list[Row]], Said]) -> Said:
        began = time.monotonic()
        rows = [self._row(question) for question in questions]
        good = [row for row in rows if isinstance(row, Row)]
        said = ask(good) if good else []
        share = (time.monotonic() - began) / max(1, len(good))  # they are computed together
        answers = iter(replace(a, seconds=share) if isinstance(a, Answer) else a for a in said)
        return [next(answers) if isinstance(row, Row) else row for row in rows]

    def _row(self, question: Question) -> Row | Unanswered:
        parts: list[str | list[int]] = []
        patches, grids = [], []
        for part in question.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                tokens = self.pixels.tokens(*part.shape[-2:])
            except ValueError as error:
                return Unanswered(str(error))
            patches_1PV, grid_13 = self.pixels.patches(part[None].to(self.device).float() / 255)
            parts.append(self.words.picture(tokens))
            patches.append(patches_1PV[0])
            grids.append(grid_13)
        ids = self.words.turn(question.system, parts)
        most = self.longest - (1 if question.choices else question.max_tokens)
        if len(ids) > most:
            return Unanswered(f"a question of {len(ids)} tokens; the model takes {most}")
        return Row(question, ids, patches, grids)

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids_BL, mask_BL = self.words.rows([row.ids for row in rows], left=True)
        inputs = {
            "input_ids": ids_BL,
            "attention_mask": mask_BL,
            "mm_token_type_ids": (ids_BL == self.words.id[PAD]).int(),
        }
        patches = [picture for row in rows for picture in row.patches]
        if patches:
            inputs["pixel_values"] = torch.cat(patches)
            inputs["image_grid_thw"] = torch.cat([grid for row in rows for grid in row.grids])
        return {name: value.to(self.device) for name, value in inputs.items()}

    def _choose(self, rows: list[Row]) -> Said:
        logits_BK = self.model(
            **self._inputs(rows), logits_to_keep=1, use_cache=False
        ).logits[:, -1]  # fmt: skip
        return [self._chosen(row, k) for row, k in zip(rows, logits_BK.float(), strict=True)]

    def _chosen(self, row: Row, logits_K: Tensor) -> Answer | Unanswered:
        chance_K = logits_K.softmax(-1)
        if not chance_K.isfinite().all():
            return Unanswered("the model gave no finite numbers")
        choices = row.question.choices
        sums = [float(chance_K[tokens].sum()) for tokens in self._tokens_of(choices)]
        best = [int(chance_K.argmax())]
        text: str = self.words.tokenizer.decode(best, skip_special_tokens=True)
        return Answer(text, dict(zip(choices, sums, strict=True)), len(row.ids), 1)

    def _tokens_of(self, choices: tuple[str, ...]) -> list[Tensor]:
        """The ids that are or begin each choice."""
        if choices not in self._starts:
            if not self._spelled:
                every = [[token] for token in range(len(self.words.tokenizer))]
                self._spelled = self.words.tokenizer.backend_tokenizer.decode_batch(
                    every, skip_special_tokens=True
                )
            found = [choice_of(token, choices) for token in self._spelled]
            self._starts[choices] = [
                torch.tensor(
                    [i for i, said in enumerate(found) if said == choice],
                    dtype=torch.int64,
                    device=self.device,
                )
                for choice in choices
            ]
        return self._starts[choices]

    def _speak(self, rows: list[Row]) -> Said:
        most = max(row.question.max_tokens for row in rows)
        inputs = self._inputs(rows)
        ids_BL = self.model.generate(**inputs, max_new_tokens=most)
        new = ids_BL[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._spoken(row, ids) for row, ids in zip(rows, new, strict=True)]

    def _spoken(self, row: Row, ids: list[int]) -> Answer:
        """The first tokens of a greedy answer are those of a shorter one."""
        ids = ids[: row.question.max_tokens]
        end = next((n for n, token in enumerate(ids, 1) if token in self.stops), len(ids))
        text: str = self.words.tokenizer.decode(ids[:end], skip_special_tokens=True)
        cut = not ids or ids[end - 1] not in self.stops
        return Answer(text, None, len(row.ids), end, cut=cut)


def stops_of(model: Any) -> list[int]:
    """The tokens that end an answer, as the model's folder says."""
    said = model.generation_config.eos_token_id
    if said is None:
        said = model.config.text_config.eos_token_id
    return [said] if isinstance(said, int) else [*(said or ())]
