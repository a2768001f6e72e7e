"""Ctrl-C at a terminal: one line now, one at the end with what to type; a second ends at once."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from gardo.distributed.saved import committed
from gardo.selftest.forked import on_cpu
from tests.integration.cases import Case
from tests.integration.recipes import recipe

RUN = Case("flow_grpo", "lora", "stage1", steps=400)


class Terminal:
    """A command in the foreground of a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.said, self.read = "", 0
        self.pid, self.screen = pty.fork()
        if not self.pid:
            os.execve(sys.executable, [sys.executable, "-m", "gardo.cli", *arguments], on_cpu())

    def until(self, text: str, seconds: float = 90) -> None:
        """Waits until the screen shows a text that it has not waited for yet."""
        end = time.monotonic() + seconds
        while text not in self.said[self.read :]:
            assert time.monotonic() < end and self._more(), self.said
        self.read = len(self.said)

    def _more(self) -> bool:
        """Reads on, for a fifth of a second; False at the end."""
        if select.select([self.screen], [], [], 0.2)[0]:
            with suppress(OSError):  # all who wrote are gone
                part = os.read(self.screen, 65536)
                self.said += part.decode(errors="replace")
                return bool(part)
            return False
        return True

    def ctrl_c(self) -> None:
        os.write(self.screen, b"\x03")

    def end(self) -> tuple[int, str]:
        """The exit code, and what was said since the last wait, without the bar's lines."""
        while self._more():
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.screen)
        lines = [re.sub(r".*\x1b\[2?K|\^C|\x1b\[[\d?;]*[a-zA-Z]", "", line)
                 for line in self.said[self.read :].splitlines()]  # fmt: skip
        return code, "\n".join(line.strip() for line in lines if line.strip() and "━" not in line)


def written(folder: Path) -> str:
    raw: dict[str, Any] = recipe(RUN, folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "recipe.yaml")


def test_a_run_stops_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    terminal = Terminal("train", written(tmp_path), "--gpus", "2")
    terminal.until("ratio")
    terminal.ctrl_c()
    code, said = terminal.end()
    now, *steps, ended, command = said.splitlines()  # those which had begun already
    assert code == 0 and len(steps) < 12 and "Traceback" not in terminal.said, said
    assert now.startswith("stopping") and "Ctrl-C again" in now
    (saved,) = committed(tmp_path / RUN.run / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    assert f"not finished: step {step} of {RUN.steps} is saved; to go on:" in ended
    gardo, *arguments = shlex.split(command)
    assert gardo == "gardo" and arguments[-3:] == ["--resume", "--gpus", "2"]

    again = Terminal(*arguments)
    again.until(f"resumed after step {step}")
    again.until("ratio")
    again.ctrl_c()
    again.until("Ctrl-C again")
    began = time.monotonic()
    again.ctrl_c()
    code, said = again.end()
    assert (code, time.monotonic() - began < 5) == (128 + signal.SIGINT, True), said
    assert "ended at once; what was saved before is as it was" in said
    assert "Traceback" not in again.said and committed(tmp_path / RUN.run / "checkpoints")


def test_while_it_loads_it_ends_in_two_lines(tmp_path: Path) -> None:
    terminal = Terminal("train", written(tmp_path), "--gpus", "1")
    terminal.until("load")
    terminal.ctrl_c()
    code, said = terminal.end()
    assert code == 128 + signal.SIGINT and "Traceback" not in terminal.said
    assert [line.split(";")[0] for line in said.splitlines()] == [
        "stopping at the next place where it can be gone on from",
        "ended at once",
    ]
