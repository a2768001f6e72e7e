"""`gardo rewards fit`: checks the pairs, computes features once, fits the heads, says how good.

Nothing is written before all is computed; the folder has `fitted.json` last, so a folder with one
is whole.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from gardo.files import made_folder, write_atomically
from gardo.fitting.accuracy import Accuracy, measured
from gardo.fitting.losses import LOSSES, Verdicts
from gardo.fitting.pairs import Pair, Split, load_pairs, split
from gardo.fitting.training import Ensemble, fit
from gardo.reward_service import chosen_device
from gardo.rewards._files import ModelRewardSettings, find_files
from gardo.rewards._head_features import FEATURES
from gardo.rewards._loading import quiet_transformers
from gardo.rewards.fitted import CONFIG, WEIGHTS, Fit
from gardo.settings import is_hub_id
from gardo.types import Prompt

Row = tuple[Path, str]  # a picture and its prompt


@dataclass(frozen=True)
class Wanted:
    """What the command was given; None is the default of the features' reward."""

    features: str
    out: Path
    path: str | None = None
    revision: str | None = None
    size: int | None = None
    loss: str = "bradley_terry"
    heads: int = 5
    hidden: int = 0
    held_out: float = 0.2
    seed: int = 0
    device: str | None = None
    batch: int | None = None


def fit_reward(file: Path, wanted: Wanted) -> Accuracy:
    """Writes the folder; what is returned is of the held-out pairs. ValueError for bad input."""
    quiet_transformers()
    settings = _model_settings(wanted)
    device = chosen_device(wanted.device)
    if wanted.out.exists() and (not wanted.out.is_dir() or any(wanted.out.iterdir())):
        raise ValueError(f"--out {wanted.out}: is there and not empty; give another folder")
    pairs, sizes = load_pairs(file)
    _loss_fits(file, pairs, wanted.loss)
    _say_pairs(file, pairs, sizes)
    try:
        find_files(settings, "features")
    except ValueError as error:
        raise ValueError(str(error).replace("features.path", "--path", 1)) from None
    rows = list(dict.fromkeys(row for pair in pairs for row in rows_of(pair)))
    features_MW = _features(wanted.features, settings, rows, sizes, pairs, device)
    made_folder(wanted.out)
    found, parts = _fitted(features_MW, rows, pairs, wanted)
    _write(found, parts, settings, pairs, wanted)
    return parts["held_out"]


def rows_of(pair: Pair) -> tuple[Row, Row]:
    return (pair.first, pair.prompt), (pair.second, pair.prompt)


def _model_settings(wanted: Wanted) -> ModelRewardSettings:
    """Of the reward with the features' model. ValueError, opening with the option."""
    if wanted.features not in FEATURES:
        raise ValueError(f"--features {wanted.features}: it is none of {', '.join(FEATURES)}")
    if wanted.loss not in LOSSES:
        raise ValueError(f"--loss {wanted.loss}: it is none of {', '.join(LOSSES)}")
    if not 0 < wanted.held_out < 1:
        raise ValueError(f"--held-out {wanted.held_out:g}: a share of the pairs between 0 and 1")
    path = wanted.path
    if path and not is_hub_id(path) and not path.startswith("builtin:"):
        path = os.path.abspath(os.path.expanduser(path))  # the reward may be used from elsewhere
    of = FEATURES[wanted.features]
    if wanted.size and "size" not in of.plugin.Settings.model_fields:
        raise ValueError(f"--size {wanted.size}: {wanted.features} has the size of its model")
    try:
        return of.settings(
            path=path, revision=wanted.revision, size=wanted.size, batch=wanted.batch
        )
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"--{first['loc'][0]} {first['input']}: {message}") from None


def _loss_fits(file: Path, pairs: Sequence[Pair], loss: str) -> None:
    if loss == "ties" and not any(pair.tied for pair in pairs):
        raise ValueError(
            f'--loss ties: no pair of {str(file)!r} has "preferred": "tie"; take bradley_terry'
        )
    if loss == "margin" and not any(pair.margin for pair in pairs):
        raise ValueError(
            f'--loss margin: no pair of {str(file)!r} has a "margin"; take bradley_terry'
        )


def _say_pairs(file: Path, pairs: Sequence[Pair], sizes: Mapping[Path, tuple[int, int]]) -> None:
    prompts, ties = len({pair.prompt for pair in pairs}), sum(pair.tied for pair in pairs)
    print(
        f"{file}: {len(pairs)} pairs ({ties} ties) of {prompts} prompts and {len(sizes)} pictures",
        flush=True,
    )


# ---- features ------------------------------------------------------------------------------------


def _features(
    name: str,
    settings: ModelRewardSettings,
    rows: Sequence[Row],
    sizes: Mapping[Path, tuple[int, int]],
    pairs: Sequence[Pair],
    device: torch.device,
) -> Tensor:
    """fp32 [M, W], on the host. ValueError for a picture that cannot be read, or has none."""
    began, of = time.perf_counter(), FEATURES[name]
    try:
        reward = of.plugin(settings, device)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    features_MW = torch.empty(len(rows), of.width(reward))
    lines = {row: pair.line for pair in reversed(pairs) for row in rows_of(pair)}
    for part in batches(rows, sizes, settings.batch):
        images_B3HW = torch.stack([picture(rows[i][0], lines[rows[i]]) for i in part])
        with torch.no_grad(), reward.precision():
            said = of.of(reward, images_B3HW.to(device), [Prompt(rows[i][1]) for i in part])
        features_MW[part] = said.cpu()
    finite_M = features_MW.isfinite().all(1)
    if not finite_M.all():
        bad = rows[int((~finite_M).nonzero()[0, 0])]
        raise ValueError(f"line {lines[bad]}: {str(bad[0])!r} has features that are not finite")
    taken = time.perf_counter() - began
    print(f"features: {name} of {settings.path}, {features_MW.shape[1]} wide, of "  # type: ignore[attr-defined]
          f"{len(rows)} pictures with their prompts, in {taken:.1f} s", flush=True)  # fmt: skip
    return features_MW


def batches(
    rows: Sequence[Row], sizes: Mapping[Path, tuple[int, int]], batch: int
) -> Iterator[list[int]]:
    """Places of rows whose pictures have one size, so many at a time."""
    of_size: dict[tuple[int, int], list[int]] = {}
    for at, (path, _) in enumerate(rows):
        of_size.setdefault(sizes[path], []).append(at)
    for places in of_size.values():
        yield from (places[i : i + batch] for i in range(0, len(places), batch))


def picture(path: Path, line: int) -> Tensor:
    """fp32 [3, H, W] in [0, 1]. ValueError names the line where it cannot be read to its end."""
    try:
        with Image.open(path) as found:
            bytes_HW3 = np.array(found.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"line {line}: {str(path)!r} cannot be read: {error}") from None
    return torch.from_numpy(bytes_HW3).permute(2, 0, 1).float() / 255


# ---- the fit -------------------------------------------------------------------------------------


def _fitted(
    features_MW: Tensor, rows: Sequence[Row], pairs: Sequence[Pair], wanted: Wanted
) -> tuple[Ensemble, dict[str, Accuracy]]:
    """The heads, and how good they are on the pairs of the fit and on those held out."""
    began = time.perf_counter()
    parts = split(pairs, wanted.held_out, wanted.seed)
    at = {row: i for i, row in enumerate(rows)}
    first_N = torch.tensor([at[rows_of(pair)[0]] for pair in pairs])
    second_N = torch.tensor([at[rows_of(pair)[1]] for pair in pairs])
    verdicts = Verdicts(
        torch.tensor([pair.preferred for pair in pairs], dtype=torch.float64),
        torch.tensor([pair.tied for pair in pairs]),
        torch.tensor([pair.margin or 0.0 for pair in pairs], dtype=torch.float64),
    )
    loss, train = LOSSES[wanted.loss], torch.tensor(parts.train)
    found = fit(
        features_MW,
        first_N[train],
        second_N[train],
        verdicts.of(train),
        [pairs[i].prompt for i in parts.train],
        loss,
        heads=wanted.heads,
        hidden=wanted.hidden,
        outputs=2 if wanted.loss == "uncertainty" else 1,
        seed=wanted.seed,
    )
    _say_fit(parts, wanted, time.perf_counter() - began)
    found.heads.float()  # what is written is what is measured
    known_MW = found.heads.standardised(features_MW)
    accuracies = {}
    for name, places in {"train": parts.train, "held_out": parts.held_out}.items():
        own = torch.tensor(places)
        said = found.said(known_MW, first_N[own], second_N[own]).mean()
        accuracies[name] = measured(
            (said.first - said.second)[0, 0].double(),
            loss.first(said)[0].double(),
            verdicts.preferred_N[own],
            [pairs[i].prompt for i in places],
        )
        print(f"{name.replace('_', ' ')}: {accuracies[name]}", flush=True)
    if accuracies["held_out"].knows_nothing:
        print(
            "held-out accuracy is not shown to be above 0.5: nothing says that this reward knows "
            "what is preferred; train nothing with it, give more pairs, or other features"
        )
    return found, accuracies


def _say_fit(parts: Split, wanted: Wanted, seconds: float) -> None:
    what = f"of {wanted.hidden} hidden units" if wanted.hidden else "linear"
    of = "whole prompts" if parts.by == "prompt" else "pairs of the one prompt, no new prompt"
    print(
        f"fit: {wanted.heads} heads, {what}, {wanted.loss}, on {len(parts.train)} pairs in "
        f"{seconds:.1f} s; held out: {len(parts.held_out)} pairs, {of}",
        flush=True,
    )


def _write(
    found: Ensemble,
    accuracies: Mapping[str, Accuracy],
    settings: ModelRewardSettings,
    pairs: Sequence[Pair],
    wanted: Wanted,
) -> None:
    heads = found.heads
    state = {name: value.detach().contiguous() for name, value in heads.state_dict().items()}
    report = {name: accuracy.as_json() for name, accuracy in accuracies.items()}
    said = Fit.model_validate(
        {
            "features": wanted.features,
            "path": settings.path,  # type: ignore[attr-defined]
            "revision": settings.revision,
            "size": getattr(settings, "size", None),
            "width": heads.width,
            "heads": wanted.heads,
            "hidden": wanted.hidden,
            "loss": wanted.loss,
            "seed": wanted.seed,
            "pairs": len(pairs),
            "report": report,
        }
    )
    write_atomically(wanted.out / WEIGHTS, save(state))
    text = json.dumps(said.model_dump(mode="json"), indent=1)
    write_atomically(wanted.out / CONFIG, text.encode())
    print(f"wrote {wanted.out}; in a recipe: {{kind: fitted, role: proxy, path: {wanted.out}}}")
