"""Judges of real size with random weights: how many questions a second, and what they hold.

    python -m campaign.judges --out FOLDER [--seconds 200] [--small]

HPSv3's Qwen2-VL of 7 B, and a Qwen2.5-VL of 7 B that answers yes or no, compares two pictures, or
writes an answer of 128 tokens (random weights never end one: this is the most that it takes). The
classes are the rewards' own, with their pictures, texts and batches; the tokenizer is made of their
texts, so that a question has about as many tokens as with the published one.

judges.csv has a row a case: the median of three calls of `batch` questions, the tokens of a
question, the weights' bytes, the peak beside them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from core_ops.machine import Machine
from gardo import plugins
from gardo.config import reward_sections
from gardo.rewards import hpsv3
from gardo.rewards.base import Reward
from gardo.rewards.judging import templates
from gardo.rewards.judging.local import LocalVoice
from gardo.rewards.judging.qwen_vl import CLASSES, PAD, SPECIAL
from gardo.types import Prompt

from .flux_model import this_place
from .table import Row, Table, number, run_script, tally

COLUMNS = (
    "judge", "model", "side", "batch", "questions_per_second", "ms", "prompt_tokens",
    "weight_bytes", "peak_bytes",
)  # fmt: skip
REPS = 3
PROMPT = Prompt("a photograph of a red cat with a hat, reading a newspaper in a cafe in the rain")
ANSWERS = 128  # tokens


@dataclass(frozen=True)
class Shape:
    """Of the language model and of the vision towers of the two classes."""

    text: dict[str, Any]
    vision: dict[str, dict[str, Any]]


ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
FULL = Shape(
    {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rope_scaling": ROPE,
    },
    {
        "qwen2_vl": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584},
        "qwen2_5_vl": {
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
            "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
        },
    },
)  # fmt: skip
SMALL = Shape(
    {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
        "max_position_embeddings": 4096, "rope_scaling": {**ROPE, "mrope_section": [2, 3, 3]},
    },
    {
        "qwen2_vl": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
        "qwen2_5_vl": {
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
            "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 112,
        },
    },
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    judge: str
    model: str
    side: int
    batch: int


def cases(shape: Shape) -> list[Case]:
    """In the order of their worth; those of a model side by side, for it is made once."""
    if shape is SMALL:
        return [
            Case("hpsv3", "qwen2_vl", 64, 2),
            *(Case(judge, "qwen2_5_vl", 64, 2)
              for judge in ("yes_no", "yes_no_pair", "unifiedreward")),
        ]  # fmt: skip
    return [
        *(Case("hpsv3", "qwen2_vl", 512, batch) for batch in (8, 1, 32)),
        *(Case("yes_no", "qwen2_5_vl", 512, batch) for batch in (8, 1, 32)),
        Case("yes_no_pair", "qwen2_5_vl", 512, 8),
        Case("unifiedreward", "qwen2_5_vl", 512, 8),
        Case("unifiedreward", "qwen2_5_vl", 512, 32),
        Case("yes_no", "qwen2_5_vl", 1024, 8),
    ]


def texts() -> list[str]:
    every = [*templates.UNIFIED_POINT.values(), *templates.UNIFIED_PAIR.values()]
    rest = [templates.SYSTEM, templates.ALIGNED, templates.FIRST, hpsv3.BEFORE, hpsv3.AFTER, PROMPT]
    return [*(template.text for template in every), *rest]


def save_tokenizer(folder: Path) -> Any:
    """A Qwen tokenizer of the judges' own words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts(), trainer)
    said = json.loads(made.to_str())["model"]
    merges = [tuple(pair) for pair in said["merges"]]
    tokens = transformers.Qwen2Tokenizer(vocab=said["vocab"], merges=merges)
    tokens.add_tokens([*SPECIAL], special_tokens=True)
    tokens.save_pretrained(folder)
    return tokens


class Models:
    """Random models on the device, one at a time; a folder with what else a judge reads."""

    def __init__(self, shape: Shape, device: torch.device, folder: Path) -> None:
        self.shape, self.device, self.folder = shape, device, folder
        self.tokens = save_tokenizer(folder)
        self.kind, self.model = "", None

    def config(self, kind: str) -> Any:
        config_class = getattr(transformers, CLASSES[kind]).config_class
        id_of = self.tokens.convert_tokens_to_ids
        ids = {f"{name}_token_id": id_of(f"<|{name}|>") for name in ("vision_start", "vision_end")}
        text = {**self.shape.text, "eos_token_id": None, "bos_token_id": None}
        config = config_class(
            text_config=text,
            vision_config=self.shape.vision[kind],
            image_token_id=id_of(PAD),
            **ids,
        )
        config.save_pretrained(self.folder)
        return config

    def of(self, kind: str, class_name: str, **text: Any) -> Any:
        """A random model of this class; the one before it is forgotten."""
        if (class_name, str(text)) != self.kind:
            self.model = None
            gc.collect()
            config = self.config(kind)
            for name, value in text.items():
                setattr(config.text_config, name, value)
            with torch.device(self.device), _of_dtype(torch.bfloat16):
                self.model = getattr(transformers, class_name)(config).eval()
            self.kind = (class_name, str(text))
        return self.model


@contextmanager
def _of_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class RandomVoice(LocalVoice):
    """With a random model in the place of its files."""

    def __init__(self, made: Models, batch: int) -> None:
        self.made = made
        super().__init__(
            str(made.folder), None, "bfloat16", made.device,
            batch=batch, min_pixels=56 * 56, max_pixels=1 << 20,
        )  # fmt: skip

    def _load(self, kind: str, path: str, revision: str | None, dtype: str) -> Any:
        return self.made.of(kind, CLASSES[kind])


class RandomHpsv3(hpsv3.Hpsv3):
    made: Models

    def _load(self, base: str, revision: str | None) -> tuple[Any, Any]:
        model = self.made.of("qwen2_vl", "Qwen2VLModel", vocab_size=len(self.words.tokenizer))
        width = self.made.shape.text["hidden_size"]
        return model, hpsv3.head_of(head_weights(width), width)


def judge(case: Case, made: Models) -> Reward:
    """The reward, with a random model."""
    made.config(case.model)
    folder = str(made.folder)
    section: dict[str, Any] = {"kind": case.judge, "role": "held_out", "batch": case.batch}
    if case.judge == "hpsv3":
        (made.folder / hpsv3.FILE).touch()
        section |= {"path": folder, "base": folder}
        settings = reward_sections({"judge": section}, "the campaign")["judge"]
        return type("Random", (RandomHpsv3,), {"made": made})(settings, made.device)
    section |= {"where": "openai:http://localhost:1", "model": "nobody"}  # whose place is taken
    if case.judge == "unifiedreward":
        section["max_tokens"] = ANSWERS if made.shape is FULL else 4
    found: Any = plugins.resolve("gardo.rewards", case.judge)
    asking = found(found.Settings(**section), made.device)
    asking.voice.close()
    asking.voice = RandomVoice(made, case.batch)
    return asking  # type: ignore[no-any-return]


def head_weights(width: int) -> dict[str, Tensor]:
    widths = {"0": (width, 1024), "3": (1024, 16), "5": (16, 2)}
    return {
        f"{hpsv3.HEAD}{n}.{name}": value
        for n, size in widths.items()
        for name, value in torch.nn.Linear(*size).state_dict().items()
    }


class Bench:
    """One model on the device at a time."""

    def __init__(self, shape: Shape, machine: Machine) -> None:
        self.shape, self.machine = shape, machine
        self._folder = tempfile.TemporaryDirectory()
        self.models = Models(shape, machine.device, Path(self._folder.name))

    def free(self) -> None:
        gc.collect()
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()

    def expected_s(self, case: Case) -> float:
        """By estimate, not yet by measurement."""
        return 30.0 if case.judge == "unifiedreward" else 20.0

    def measure(self, case: Case) -> list[Row]:
        reward, device = judge(case, self.models), self.machine.device
        draw = torch.Generator(device).manual_seed(0)
        images = torch.rand(
            case.batch, 3, case.side, case.side, generator=draw, device=device
        )  # fmt: skip
        prompts = [PROMPT] * case.batch
        ask = (
            partial(reward.compare, images, images.flip(0), prompts)
            if case.judge.endswith("_pair")
            else partial(reward.score, images, prompts)
        )
        cuda = device.type == "cuda"
        weights = torch.cuda.memory_allocated() if cuda else 0
        with torch.no_grad():
            ask()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = median(self._timed(ask) for _ in range(REPS))
        peak = torch.cuda.max_memory_allocated() - weights if cuda else 0
        costs = reward.costs() or {}
        asked = costs.get("questions", 0)
        tokens = costs["prompt_tokens"] / asked if asked else len(
            reward.turn(PROMPT, reward.pixels.tokens(case.side, case.side))  # type: ignore[attr-defined]
        )  # fmt: skip
        return [{
            "questions_per_second": number(case.batch / seconds), "ms": number(1e3 * seconds),
            "prompt_tokens": round(tokens), "weight_bytes": weights, "peak_bytes": peak,
        }]  # fmt: skip

    def _timed(self, ask: Any) -> float:
        began = time.perf_counter()
        ask()
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def report(table: Table) -> str:
    lines = [f"{'judge':16} {'side':>5} {'batch':>5} {'tokens':>7} {'a second':>9}  status"]
    for row in table.rows:
        rate, tokens = (str(row.get(n, "")) for n in ("questions_per_second", "prompt_tokens"))
        note = f"{row['status']} {row.get('note') or ''}"[:70]
        what = f"{row['judge']:16} {row['side']:>5} {row['batch']:>5}"
        lines.append(f"{what} {tokens:>7} {rate:>9}  {note}")
    return "\n".join([*lines, tally(table)])


def main(arguments: Sequence[str] | None = None) -> int:
    def start(options: argparse.Namespace) -> tuple[list[Case], Bench]:
        shape = SMALL if options.small else FULL
        return cases(shape), Bench(shape, this_place())

    return run_script(
        "judges", __doc__, arguments, columns=COLUMNS, seconds=200.0,
        small="tiny models, on any machine", start=start, report=report,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
