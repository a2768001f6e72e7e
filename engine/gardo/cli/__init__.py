"""The `gardo` command: one file a command.

Heavy modules load when a command needs them: `--help` is torch-free.
"""

from __future__ import annotations

import sys

import typer

from gardo import lazily
from gardo.cli import (
    compare,
    demo,
    doctor,
    evaluate,
    export,
    new,
    plan,
    prompts,
    report,
    rewards,
    sample,
    schema,
    selftest,
    train,
)
from gardo.cli.common import EXIT_CODES, spread

app = typer.Typer(
    help="Fine-tune Flux and SD3.5 with reinforcement learning that does not cheat its reward "
    "(GARDO).",
    epilog="Exit codes: " + "; ".join(f"{code}: {said}" for code, said in EXIT_CODES.items()),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

for command, name in (
    (demo.demo, "demo"),
    (demo.recipes, "recipes"),
    (new.new, "new"),
    (train.train, "train"),
    (plan.plan, "plan"),
    (sample.sample, "sample"),
    (evaluate.eval_, "eval"),
    (report.report, "report"),
    (compare.compare, "compare"),
    (export.export, "export"),
    (export.import_, "import"),
    (doctor.doctor, "doctor"),
    (schema.schema, "schema"),
    (selftest.selftest, "selftest"),
):
    app.command(name)(command)
app.add_typer(rewards.app, name="rewards")
app.add_typer(prompts.prompts, name="prompts")


def main() -> None:
    lazily.put_off()
    sys.argv[1:] = spread(sys.argv[1:])
    app()
