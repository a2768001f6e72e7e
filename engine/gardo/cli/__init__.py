"""The `gardo` command: one file a command.

Heavy modules load when a command needs them: `--help` is torch-free.
"""

from __future__ import annotations

import typer

from gardo.cli import (
    doctor,
    evaluate,
    export,
    plan,
    prompts,
    report,
    rewards,
    sample,
    schema,
    selftest,
    train,
)

app = typer.Typer(
    help="Fine-tune Flux and SD3.5 with reinforcement learning that does not cheat its reward "
    "(GARDO).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command, name in (
    (train.train, "train"),
    (plan.plan, "plan"),
    (sample.sample, "sample"),
    (evaluate.eval_, "eval"),
    (report.report, "report"),
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
    app()
