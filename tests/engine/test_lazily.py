"""Modules that are put off: whole once something of them is used, and no copy of what is there."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import torch

from gardo.lazily import no_grad


def said_by(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_module_runs_at_its_first_use():
    assert said_by("""
        import sys
        from gardo.lazily import put_off
        put_off(["email", "wave"])
        import email, wave
        before = "email.message" in sys.modules, "chunk" in vars(wave)
        import email.mime.text                     # a module inside runs what it is in
        made = email.mime.text.MIMEText("text")
        print(*before, email.message_from_string(str(made)).get_payload(), wave.Wave_read.__name__)
        print(sys.modules["wave"] is wave, type(wave).__name__, email.__path__[0].endswith("email"))
    """) == "False False text Wave_read\nTrue module True"  # fmt: skip


def test_what_is_loaded_stays():
    assert said_by("""
        import json, sys
        from gardo.lazily import load_now, put_off
        put_off(["json", "wave", "not_there"])
        load_now(["json", "wave", "not_there"])
        print(sys.modules["json"] is json, "Wave_read" in vars(sys.modules["wave"]))
    """) == "True True"  # fmt: skip


def test_the_schema_and_the_catalogue_are_made_without_torch():
    assert said_by("""
        import sys
        from gardo.lazily import put_off
        put_off()
        from gardo.config import full_schema
        from gardo.rewards.catalogue import as_text
        from gardo.suite import load_suite
        from gardo.new.values import starts
        print(bool(full_schema() and as_text() and starts()), "torch._C" in sys.modules)
    """) == "True False"  # fmt: skip


def test_no_grad_is_torchs():
    weight = torch.ones(1, requires_grad=True)

    @no_grad
    def doubled(x: torch.Tensor, *, times: int = 2) -> torch.Tensor:
        """Says what."""
        return x * times

    assert not doubled(weight, times=3).requires_grad and (weight * 2).requires_grad
    assert doubled.__name__ == "doubled" and doubled.__doc__ == "Says what."
