"""`gardo rewards`: which there are, whether a recipe's work here, a server for them, and a fit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from gardo.cli.common import JsonOption, SetOption, refuse

app = typer.Typer(
    help="Rewards: list them, check a recipe's, serve them to runs, fit one of your own.",
    no_args_is_help=True,
)

RecipeArgument = Annotated[
    Path, typer.Argument(help="a recipe, or a file that has nothing but `rewards`")
]
OnlyOption = Annotated[list[str] | None, typer.Option(help="this reward; may be given repeatedly")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, or a GPU such as cuda:0; a GPU where there is one")
]


@app.command("list")
def list_(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="the table of docs/rewards.md")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Every reward: formula, usual values, default weights, their licence, what was verified.

    gardo rewards list
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gardo.rewards.catalogue import as_data, as_markdown, as_text

    if as_json:
        print(json.dumps(as_data(), indent=1))
    else:
        print(as_markdown() if markdown else as_text())


@app.command()
def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    only: OnlyOption = None,
    device: DeviceOption = None,
    record: Annotated[
        Path | None, typer.Option(help="write the values to this file, to compare with later")
    ] = None,
    golden: Annotated[
        Path | None, typer.Option(help="compare with the values of such a file")
    ] = None,
) -> None:
    """Load or reach each reward of a recipe and score the same pictures; exit 1 where one fails.

    gardo rewards check recipes/tiny_flux_gardo.yaml --only tiny_count
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gardo.recipe_errors import RecipeError
    from gardo.reward_service import check_rewards

    try:
        failed = check_rewards(
            recipe, set_ or [], only=only, device=device, record=record, golden=golden
        )
    except (RecipeError, ValueError) as error:
        refuse(error)
    raise typer.Exit(int(failed))


@app.command()
def serve(
    recipe: RecipeArgument,
    set_: SetOption = None,
    only: OnlyOption = None,
    device: DeviceOption = None,
    host: Annotated[str, typer.Option(help="an address of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free")] = 8700,
    body_mb: Annotated[int, typer.Option(min=1, help="MiB that a request may have")] = 1024,
    queue: Annotated[int, typer.Option(min=1, help="images that may wait for a reward")] = 1024,
) -> None:
    """Serve a recipe's rewards over HTTP: those whose `where` is a URL, or all if none is.

    gardo rewards serve recipes/tiny_flux_gardo.yaml --host 0.0.0.0 --port 8700

    The token is the environment variable GARDO_REWARD_TOKEN, here and where runs ask.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gardo.recipe_errors import RecipeError
    from gardo.reward_service import serve_rewards

    try:
        serve_rewards(
            recipe, set_ or [], only=only, device=device, host=host, port=port,
            body_bytes=body_mb << 20, most_waiting=queue,
        )  # fmt: skip
    except (RecipeError, ValueError) as error:
        refuse(error)


@app.command()
def fit(
    pairs: Annotated[
        Path, typer.Argument(help="a .jsonl of pairs of pictures with who was preferred")
    ],
    features: Annotated[str, typer.Option(help="dinov3, dinov2 or clip (which sees the prompt)")],
    out: Annotated[Path, typer.Option(help="folder to write; new or empty")],
    path: Annotated[
        str | None, typer.Option(help="folder or hub id of the features' model; their default")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="of a hub id --path")] = None,
    size: Annotated[
        int | None, typer.Option(min=8, help="pixels a side that DINO sees; its default")
    ] = None,
    loss: Annotated[
        str, typer.Option(help="bradley_terry, ties, margin or uncertainty")
    ] = "bradley_terry",
    heads: Annotated[int, typer.Option(min=1, max=100, help="of the ensemble")] = 5,
    hidden: Annotated[
        int, typer.Option(min=0, max=4096, help="hidden units of a head; 0: linear")
    ] = 0,
    held_out: Annotated[
        float, typer.Option(help="share of the pairs that accuracy is measured on")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="of the split, the resamples, the start")] = 0,
    device: DeviceOption = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="pictures that the model sees at once")
    ] = None,
) -> None:
    """Fit a reward of your own to pairs of pictures: small heads on a frozen model's features.

    gardo rewards fit pairs.jsonl --features dinov3 --out my-reward
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from gardo.fitting.command import Wanted, fit_reward

    wanted = Wanted(
        features=features, out=out, path=path, revision=revision, size=size, loss=loss,
        heads=heads, hidden=hidden, held_out=held_out, seed=seed, device=device, batch=batch,
    )  # fmt: skip
    try:
        fit_reward(pairs, wanted)
    except ValueError as error:
        refuse(error)
