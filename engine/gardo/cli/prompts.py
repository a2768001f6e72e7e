"""`gardo prompts`: files of new prompts, the same ones for the same arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gardo.files import write_atomically

Objects = Sequence[dict[str, Any]]

prompts = typer.Typer(help="Write a file of new prompts.", no_args_is_help=True)

CountOption = Annotated[int, typer.Option(min=1, help="prompts of --out")]
OutOption = Annotated[Path, typer.Option(help="a file NAME.jsonl; written over")]
SeedOption = Annotated[int, typer.Option(help="other prompts for another")]
HeldOutOption = Annotated[
    Path | None,
    typer.Option(help="a second file of prompts for evaluations, none of them in --out"),
]
HeldOutCountOption = Annotated[
    int | None, typer.Option(min=1, help="prompts of --held-out; a tenth of --count if left out")
]


@prompts.command()
def ocr(
    count: CountOption,
    out: OutOption,
    seed: SeedOption = 0,
    held_out: HeldOutOption = None,
    held_out_count: HeldOutCountOption = None,
) -> None:
    """Prompts with a text to write, for the reward ocr; no text comes twice.

    gardo prompts ocr --count 1000 --out train.jsonl --held-out held_out.jsonl
    """
    from gardo.rewards import ocr_prompts

    _write(lambda kept: ocr_prompts.prompts(count, seed, kept), count, out, held_out,
           held_out_count)  # fmt: skip


@prompts.command()
def geneval(
    count: CountOption,
    out: OutOption,
    seed: SeedOption = 0,
    task: Annotated[
        list[str] | None, typer.Option(help="one of GenEval's six tasks, several times; all")
    ] = None,
    number: Annotated[
        list[int] | None, typer.Option(help="that counting asks for, several times; 2, 3 and 4")
    ] = None,
    held_out: HeldOutOption = None,
    held_out_count: HeldOutCountOption = None,
) -> None:
    """Prompts of GenEval's templates, as many of each task as it can ask, for the reward geneval.

    gardo prompts geneval --count 1000 --task counting --task position --out train.jsonl
    """
    from gardo.rewards import geneval_prompts

    def drawn(kept: int) -> tuple[Objects, Objects]:
        tasks, numbers = task or geneval_prompts.TASKS, number or (2, 3, 4)
        return geneval_prompts.files(count, seed, kept, tasks=tasks, numbers=numbers)

    _write(drawn, count, out, held_out, held_out_count)


@prompts.command()
def captions(
    count: CountOption,
    out: OutOption,
    seed: SeedOption = 0,
    held_out: HeldOutOption = None,
    held_out_count: HeldOutCountOption = None,
) -> None:
    """Captions of all kinds of pictures, for rewards that judge any; no two show the same thing."""
    from gardo.rewards import caption_prompts

    _write(lambda kept: caption_prompts.prompts(count, seed, kept), count, out, held_out,
           held_out_count)  # fmt: skip


def _write(
    drawn: Callable[[int], tuple[Objects, Objects]],
    count: int,
    out: Path,
    held_out: Path | None,
    held_out_count: int | None,
) -> None:
    """Writes what is drawn, with so many held out; ends with 2 where that cannot be."""
    try:
        if held_out is None and held_out_count is not None:
            raise ValueError(f"--held-out-count {held_out_count}: give --held-out FILE too")
        named = {"--out": out, "--held-out": held_out}
        for option, path in named.items():
            if path and path.suffix.lower() != ".jsonl":
                raise ValueError(f"{option} {path}: it holds JSON lines; call it {path.stem}.jsonl")
        if held_out and held_out.resolve() == out.resolve():
            raise ValueError(f"--held-out {held_out}: that is --out; give another file")
        kept = (held_out_count or max(1, count // 10)) if held_out else 0
        for (option, path), objects in zip(named.items(), drawn(kept), strict=True):
            if path:
                lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in objects)
                try:
                    write_atomically(path, "".join(lines).encode())
                except OSError as error:
                    raise ValueError(f"{option} {path}: {error.strerror}; give another") from error
                print(f"{path}: {len(objects)} prompts")
    except ValueError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
