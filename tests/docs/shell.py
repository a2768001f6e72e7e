"""The shell blocks of the documentation, and what may be done with them.

A block is marked in the Markdown, on the line above it:

    <!-- test: run -->                 its commands are run, in the order of the page
    <!-- test: run with a=1 b.c=2 -->  the same; the fields are appended as --set, to make it short
    <!-- test: skip WHY -->            nothing

Without a mark its commands are parsed: command, options, recipe and fields must exist.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

from tests import ROOT

FENCE = re.compile(
    r"(?:^<!-- test: (?P<mark>.*?) -->\n)?"
    r"^(?P<fence>`{3,})(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
INDENTED = re.compile(
    r"(?<=\n\n)(?:<!-- test: (?P<mark>.*?) -->\n\n)?(?P<text>(?:    [^\n]+\n)+)(?=\n|\Z)"
)
SHELL = {"sh", "bash", "shell"}
OURS = {"gardo", "./run", "deepspeed", "sbatch", "python"}
OTHERS = {  # programs that are not ours; that they are spelled so is all that is known of them
    "apt-get", "benchmarks/cluster_acceptance.sh", "cd", "conda", "docker", "export", "git", "hf",
    "pip", "pkill", "pre-commit", "touch", "transformers", "vllm",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    mark: str
    commands: tuple[tuple[str, ...], ...]

    @property
    def runs(self) -> bool:
        return self.mark.partition(" ")[0] == "run"

    @property
    def fields(self) -> list[str]:
        """What a `run with` appends."""
        return self.mark.removeprefix("run").removeprefix(" with ").split()

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


BESIDE = (
    "README.md", "CONTRIBUTING.md", "RELEASING.md", "benchmarks/README.md", "recipes/README.md",
    "recipes/prompts/README.md", "suites/README.md",
)  # fmt: skip


def pages() -> list[Path]:
    return [*(ROOT / page for page in BESIDE), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Those of a page that are commands: in a shell's language, or in none and one starts so."""
    text = page.read_text(encoding="utf-8")
    found = []
    fenced = [(match, match["language"]) for match in FENCE.finditer(text)]
    unfenced = FENCE.sub(lambda match: re.sub(r"[^\n]", "-", match[0]), text)  # as long
    indented = [(match, "") for match in INDENTED.finditer(unfenced)]
    for match, language in [*fenced, *indented]:
        commands = tuple(commands_of(match["text"])) if language in {"", *SHELL} else ()
        starts = {command[0] for command in commands}
        if language in SHELL or starts & (OURS | OTHERS):
            line = text.count("\n", 0, match.start("text"))
            found.append(Block(page, line, match["mark"] or "", commands))
    return found


def commands_of(text: str) -> list[tuple[str, ...]]:
    """Words of each line, a \\ at the end joined; without variables before a command, redirections,
    and comments, which three spaces set off too."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        try:
            words = shlex.split(re.split(r"(?<=\S)\s{3,}", line)[0], comments=True)
        except ValueError:  # no command: a quote that is an apostrophe
            continue
        words = words[: words.index(">")] if ">" in words else words
        words = list(dropwhile(re.compile(r"[A-Z_]+=").match, words))
        if words:
            found.append(tuple(words))
    return found
