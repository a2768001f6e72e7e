"""The `gardo` command. Heavy modules load when a command needs them: `--help` is torch-free."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gardo import cli_rewards
from gardo.cli_common import RecipeArgument, SetOption, refuse
from gardo.prompt_commands import prompts

app = typer.Typer(
    help="Fine-tune Flux and SD3.5 with reinforcement learning that does not cheat its reward "
    "(GARDO).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(cli_rewards.app, name="rewards")
app.add_typer(prompts, name="prompts")

SuiteSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="override a field of the suite"),
]


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="go on from the run's newest checkpoint; without one, start"),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="a torch.profiler trace of one step, in the run's folder, for Perfetto",
        ),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="ranks here: GPUs, or CPU processes where there is none; 1"),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="ranks on several machines, by ssh: a line `NAME slots=GPUS` each"),
    ] = None,
    include: Annotated[
        str | None,
        typer.Option(help="which GPUs: localhost:4,5, or of a hostfile: node-1@node-2:0,1"),
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="where ranks meet, of a hostfile; else asked of the first")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="where ranks meet; one that is free if left out"),
    ] = None,
    ignore_plan: Annotated[
        bool, typer.Option("--ignore-plan", help="train even what will not fit, by the plan")
    ] = False,
) -> None:
    """Train a recipe; with engine zero through the deepspeed launcher on as many ranks."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _read(recipe)
    import torch

    from gardo import launch
    from gardo.config import load
    from gardo.machine import check_accelerator
    from gardo.planner import geometry
    from gardo.recipe import reward_settings
    from gardo.recipe_errors import RecipeError
    from gardo.rewards.assembly import reach_endpoints

    overrides = set_ or []
    here = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    try:
        if master_addr and not hostfile:
            raise ValueError(f"--master-addr {master_addr}: for a --hostfile; leave it out")
        if port and not (hostfile or launch.is_free(port)):
            raise ValueError(f"--port {port}: another program has it; leave it out")
        where = launch.places(gpus=gpus, hostfile=hostfile, include=include, here=here)
        checked = load(recipe, overrides)
        geometry(checked, rank=0, world=where.ranks, source=str(recipe))
        if not hostfile:  # a login node may start what runs elsewhere
            check_accelerator(checked, str(recipe))
            reach_endpoints(reward_settings(checked), f"{recipe}: rewards.")
        zero = checked.distributed.engine == "zero"
        if not zero and where.ranks > 1:
            raise RecipeError(
                f"{recipe}: distributed.engine: local runs in one process; drop {where.option}, "
                "or use engine zero"
            )
        if here or not hostfile:  # else the GPUs are elsewhere: `gardo plan` can be told of them
            _say_plan(checked, str(recipe), where.ranks, on_gpu=here > 0, ignore=ignore_plan)
        arguments = [str(recipe), *(part for o in overrides for part in ("--set", o))]
        arguments += ["--resume"] if resume else []
        arguments += ["--profile"] if profile else []
        command = launch.command(where, arguments, master=master_addr, port=port, launched=zero)
    except (RecipeError, ValueError) as error:
        refuse(error)
    raise typer.Exit(launch.run(where, command, on_cpu=not here))


def _read(recipe: Path) -> None:
    """Refuses what is no recipe at all before torch is imported, which takes seconds."""
    from gardo.recipe_errors import RecipeError
    from gardo.recipe_text import read

    try:
        read(recipe)
    except RecipeError as error:
        refuse(error)


def _say_plan(recipe: Any, source: str, world: int, *, on_gpu: bool, ignore: bool) -> None:
    """Prints the plan's verdict. RecipeError where the recipe does not fit, unless `ignore`.

    The built-in models are too small to ask. Any other error means that there is no plan, which
    must not keep a run from starting.
    """
    if recipe.model.path.startswith("builtin:"):
        return
    import torch

    from gardo.distributed.base import host_memory
    from gardo.planner.verdict import verdict
    from gardo.recipe_errors import RecipeError

    here = range(torch.cuda.device_count() if on_gpu else 0)
    rooms = [torch.cuda.get_device_properties(i).total_memory for i in here]
    try:
        said = verdict(
            recipe, world=world, room=min(rooms, default=host_memory(world)), source=source
        )
    except RecipeError as error:
        if not ignore:
            raise
        said = str(error)
    except Exception as error:  # a model of one's own may do what no plan foresees
        said = f"no plan: {type(error).__name__}: {error}"
    print(said, flush=True)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all")] = 8,
    gpu_memory: Annotated[str, typer.Option(help="of each: 80GB, 79GiB")] = "80GB",
    nodes: Annotated[int, typer.Option(min=1, help="machines that they are in")] = 1,
) -> None:
    """Say what a recipe takes of GPUs that need not be here; exit 1 where it does not fit."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gardo.config import load
    from gardo.planner.page import bytes_of, plan_page
    from gardo.recipe_errors import RecipeError

    try:
        room = bytes_of(gpu_memory)
        checked = load(recipe, set_ or [], prompts=False)
        lines, fits = plan_page(checked, world=gpus, room=room, nodes=nodes, source=str(recipe))
    except (RecipeError, ValueError) as error:
        refuse(error)
    print("\n".join(lines))
    raise typer.Exit(int(not fits))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="of a LoRA: diffusers, peft, kohya; of all weights: transformer, pipeline",
        ),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="the average of the weights (train.ema)")
    ] = False,
    step: Annotated[
        int | None, typer.Option(help="which checkpoint; the newest if left out")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where to write; RUN/export if left out")] = None,
    shard_size: Annotated[str, typer.Option(help="most that a file of all weights holds")] = "5GB",
    universal: Annotated[
        bool,
        typer.Option("--universal", help="DeepSpeed's universal checkpoint instead, with moments"),
    ] = False,
) -> None:
    """Write a run's trained weights for other programs: docs/files.md."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gardo.export import export_run, export_universal
    from gardo.planner.page import bytes_of
    from gardo.recipe_errors import RecipeError

    try:
        if universal and (format_ or ema):
            raise RecipeError("--universal: a format of its own, of the live weights; leave out "
                              "--format and --ema")  # fmt: skip
        if universal:
            print(export_universal(run, out=out, step=step))
        else:
            shard = bytes_of(shard_size)
            print(export_run(run, format=format_, average=ema, out=out, step=step,
                             shard_bytes=shard))  # fmt: skip
    except (RecipeError, ValueError) as error:
        refuse(error)


@app.command("eval")
def eval_(
    suite: Annotated[Path, typer.Option(help="what is asked and who judges: suites/README.md")],
    model: Annotated[
        str | None,
        typer.Argument(
            help="builtin:flux, a diffusers folder, or a hub id (ID@REVISION); of a --run its own "
            "base if left out"
        ),
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="a LoRA on the model: PEFT's folder, or a file of diffusers")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="the folder of a run, whose checkpoint's weights are taken")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="which checkpoint of --run; the newest if left out")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="the average of the run's weights (train.ema)")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="where to write; evaluations/SUITE/NAME if left out")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="the folder of another evaluation on this suite, to compare with"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="ranks: GPUs, or CPU processes where there is none; 1")
    ] = None,
    set_: SuiteSetOption = None,
) -> None:
    """Evaluate a model on a suite, with intervals: result.json, result.md, result.html, grid.png.

    All models get the same noise. The same command again goes on where it was cut; a finished one
    draws nothing again, with --against only compares.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    from gardo import launch
    from gardo.evaluate import arguments_of, check_here, main, task
    from gardo.recipe_errors import RecipeError

    here = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    try:
        where = launch.places(gpus=gpus, hostfile=None, include=None, here=here)
        options: dict[str, Any] = {"lora": lora, "run": run, "step": step, "out": out}
        options["against"] = against
        asked = task(model=model, suite=suite, average=ema, sets=set_ or [], **options)
        check_here(asked)
        # the run may go on meanwhile: all ranks take the checkpoint that is the newest now
        options["step"] = asked.contender.run.step if asked.contender.run else None
        arguments = arguments_of(model=model, suite=suite, average=ema, sets=set_ or [], **options)
        command = launch.command(where, arguments, master=None, port=None, launched=True,
                                 module="gardo.evaluate")  # fmt: skip
    except (RecipeError, ValueError) as error:
        refuse(error)
    if where.ranks == 1:
        raise typer.Exit(main(arguments))
    raise typer.Exit(launch.run(where, command, on_cpu=not here))


@app.command("import")
def import_(
    lora: Annotated[Path, typer.Argument(help="a LoRA: PEFT's folder, or a file of diffusers")],
    out: Annotated[Path, typer.Option(help="the folder to write to")],
) -> None:
    """Make another program's LoRA a diffusers LoRA with all that a recipe must say of it."""
    import yaml

    from gardo.files import made_folder
    from gardo.policies.lora_files import DIFFUSERS_FILE, lora_config, open_lora, save_diffusers

    try:
        found = open_lora(lora)
    except ValueError as error:
        refuse(error)
    if (out / DIFFUSERS_FILE).resolve() == found.path.resolve():
        refuse(f"--out {out}: {found.path} is read from there; give another folder")
    said: dict[str, Any] = {
        "rank": found.rank,
        "alpha": found.alpha,
        "targets": list(found.targets),
    }
    try:
        file = save_diffusers(found.read(), lora_config(**said), made_folder(out))
    except ValueError as error:
        refuse(error)
    weights = {"kind": "lora", "path": str(file.absolute()), **said}
    print(yaml.safe_dump({"train": {"weights": weights}}, sort_keys=False), end="")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="the folder of a run")]) -> None:
    """Write a run's report.html again from its metrics.jsonl."""
    from gardo.report.html import write_report
    from gardo.report.metrics_log import missing

    if not (run / "metrics.jsonl").is_file():
        refuse(f"{run}: no metrics.jsonl; name the folder of a run, such as runs/tiny-flux-gardo")
    try:
        written = write_report(run)
        for trouble in missing(run / "metrics.jsonl"):
            print(trouble, file=sys.stderr)
        print(written)
    except (OSError, ValueError) as error:
        refuse(f"{run}: no report can be made of it: {error}")


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="a recipe whose settings are to be used")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Say what this machine can run, and which kernels; exit 1 where something is missing."""
    from gardo.config import load
    from gardo.doctor import examine
    from gardo.recipe_errors import RecipeError

    try:
        findings = examine(load(recipe, set_ or []).kernels if recipe else "auto")
        worst = 0
        for finding in findings:
            worst = max(worst, finding.state == "problem")
            print(f"{finding.state:8} {finding.name:22} {finding.detail}", flush=True)
    except RecipeError as error:
        refuse(error)
    raise typer.Exit(int(worst))


@app.command()
def selftest(
    subject: Annotated[str, typer.Argument(help="reliability")] = "reliability",
    quick: Annotated[bool, typer.Option("--quick", help="the cases that take seconds")] = False,
    only: Annotated[str, typer.Option(help="the cases whose name has this in it")] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print the table and run nothing")
    ] = False,
) -> None:
    """Do to small runs what can go wrong with real ones; exit 1 where something does not hold."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gardo.selftest import reliability

    if subject != "reliability":
        refuse(f"{subject}: there is no such self-test; give reliability")
    if markdown:
        print(reliability.markdown())
        return
    cases = reliability.chosen(quick=quick, only=only)
    if not cases:
        refuse(f"--only {only}: no case has that in its name; --markdown shows them")
    broken = 0
    for subject_, of in cases.items():
        print(f"{subject_}", flush=True)
        for outcome in reliability.tried(of):
            case, broken = outcome.case, broken + bool(outcome.problem)
            state = "BROKEN" if outcome.problem else "holds"
            print(f"  {state:7} {outcome.seconds:6.1f} s  {case.name:28} {case.holds}", flush=True)
            if outcome.problem:
                print(f"          {outcome.problem}", flush=True)
    raise typer.Exit(int(broken > 0))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from gardo.config import full_schema

    print(json.dumps(full_schema(), indent=2))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
