"""What `gardo rewards check` and `serve` do with the rewards of a recipe."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from gardo import plugins
from gardo.config import reward_file, reward_sections
from gardo.data import load_prompts
from gardo.files import write_atomically
from gardo.recipe_errors import RecipeError
from gardo.rewards._files import find_files
from gardo.rewards._loading import quiet_transformers
from gardo.rewards.assembly import (
    ScoringSettings,
    Workers,
    assemble,
    elsewhere,
    load_rewards,
)
from gardo.rewards.base import Reward, RewardSettings, provides
from gardo.rewards.serving.chat import OPENAI
from gardo.rewards.serving.wire import TOKEN, secret
from gardo.tiny import world
from gardo.types import Prompt

PICTURES, SIZE, SEED = 4, (256, 256), 20
TOLERANCE = 1e-3  # of a value, relative to its size or 1


def chosen_device(name: str | None) -> torch.device:
    """ValueError where there is none of that name."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; use cpu, or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no GPU is here; use cpu")
    return device


# ---- serve ---------------------------------------------------------------------------------------


def serve_rewards(
    path: Path,
    overrides: Sequence[str],
    *,
    only: Sequence[str] | None,
    device: str | None,
    host: str,
    port: int,
    **limits: Any,
) -> None:
    """Loads the rewards, says where they are served, and serves them until it is told to end."""
    from gardo.rewards.serving.server import ServeSettings, bound, check_address, make_app, serve

    quiet_transformers()
    token = secret(TOKEN, os.environ.get(TOKEN))
    if token is not None and len(token) < 16:
        raise ValueError(f"{TOKEN}: has {len(token)} characters; give it at least 16")
    settings = ServeSettings(host=host, port=port, token=token, **limits)
    check_address(settings)
    rewards = served_here(reward_file(path, overrides).rewards, str(path), only)
    try:
        listening = bound(settings)  # a port that is taken is known before anything loads
    except socket.gaierror:
        raise ValueError(f"--host {host}: no address of this machine") from None
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror}; give another, or 0") from None
    for name, its in rewards.items():
        find_files(its, f"{path}: rewards.{name}")
    loaded = load_rewards(rewards, chosen_device(device))
    name, number = listening.getsockname()[:2]
    shown = f"[{name}]" if ":" in name else name
    safe = "with a token" if token else f"without a token ({TOKEN} is not set)"
    print(f"serving {', '.join(loaded)} at http://{shown}:{number} {safe}", flush=True)
    serve(make_app(loaded, settings), listening)


def served_here(
    rewards: Mapping[str, RewardSettings], source: str, only: Sequence[str] | None
) -> dict[str, RewardSettings]:
    """The rewards and judges with a URL, or all rewards if none has one; as if they were here."""
    far = {n: r for n, r in elsewhere(rewards).items() if "://" in r.where}
    found = far or {n: r for n, r in rewards.items() if not r.where.startswith(OPENAI)}
    if not found:
        raise RecipeError(f"{source}: its rewards ask OpenAI-compatible endpoints; there is none "
                          "to serve")  # fmt: skip
    for name in only or ():
        if name not in found:
            raise RecipeError(f"--only {name}: {source} has no such reward to serve; it has "
                              f"{', '.join(found)}")  # fmt: skip
    return {
        name: _here(name, settings, source)
        for name, settings in found.items()
        if not only or name in only
    }


def _here(name: str, settings: RewardSettings, source: str) -> RewardSettings:
    """RecipeError where it says too little to be computed here."""
    of_the_client = RewardSettings.of_the_client
    said = settings.model_dump(mode="json", exclude=of_the_client, exclude_unset=True)
    return reward_sections({name: {**said, "kind": settings.kind}}, source)[name]


# ---- check ---------------------------------------------------------------------------------------


@dataclass
class Checked:
    """What a reward said of the sample pictures."""

    name: str
    kind: str
    where: str
    values: list[float]  # of features: their lengths
    load_seconds: float
    first_ms: float  # for an image, of the first call
    ms: float
    memory_mb: float
    trouble: str = ""
    pairs: bool = False  # values are verdicts on each picture against the one at the other end
    exchange: str = ""  # with a judge


def check_rewards(
    path: Path,
    overrides: Sequence[str],
    *,
    only: Sequence[str] | None,
    device: str | None,
    record: Path | None,
    golden: Path | None,
) -> bool:
    """Prints a block for each reward; whether one failed, or differs from the golden values."""
    quiet_transformers()
    found = reward_file(path, overrides)
    for name in only or ():
        if name not in found.rewards:
            raise RecipeError(f"--only {name}: {path} has no such reward; it has "
                              f"{', '.join(found.rewards)}")  # fmt: skip
    known = _golden(golden) if golden else None
    if record and not record.resolve().parent.is_dir():
        raise ValueError(f"--record {record}: no folder {record.parent}; make it first")
    here = chosen_device(device)
    chosen = {n: r for n, r in found.rewards.items() if not only or n in only}
    prompts = sample_prompts(found.prompts, chosen)
    said: dict[str, Any] = {}
    failed = False
    for name, settings in chosen.items():
        pictures = sample_pictures(found.size or SIZE)
        checked = _checked(name, settings, found.scoring, here, prompts, pictures)
        wrong = [checked.trouble] if checked.trouble else []
        if not wrong and known is not None:
            wrong = compared(checked.values, known.get(name, []))
        failed |= bool(wrong)
        print(_block(checked, settings, wrong, known is not None), flush=True)
        said[name] = {"kind": checked.kind, "values": checked.values,
                      "settings": settings.model_dump(mode="json")}  # fmt: skip
    if record:
        data = json.dumps({"prompts": prompts, "rewards": said}, indent=1)
        write_atomically(record, data.encode())
    return failed


def sample_pictures(size: tuple[int, int]) -> Tensor:
    """The same four pictures every time: of the tiny world, enlarged, and one of noise."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = world.draw(world.sample_scenes(PICTURES, generator))
    drawn[-1] = torch.rand(drawn[-1].shape, generator=generator)
    return F.interpolate(drawn, size, mode="nearest")


def sample_prompts(file: Path | None, rewards: Mapping[str, RewardSettings]) -> list[Prompt]:
    """The first of the recipe's prompts, or captions of the tiny world."""
    if file is None:
        found = [Prompt(text) for text in world.prompts()]
    else:
        found = load_prompts(file)
    return [found[i % len(found)] for i in range(PICTURES)]


def compared(values: Sequence[float], golden: Sequence[float]) -> list[str]:
    """What differs from the golden values by more than the tolerance."""
    if not golden:
        return ["not in the golden file"]
    if len(values) != len(golden):
        return [f"{len(values)} values, {len(golden)} in the golden file"]
    return [
        f"picture {i}: {value:.6g}, {wanted:.6g} in the golden file"
        for i, (value, wanted) in enumerate(zip(values, golden, strict=True), start=1)
        if not abs(value - wanted) <= TOLERANCE * max(1.0, abs(wanted))
    ]


def _checked(
    name: str,
    settings: RewardSettings,
    scoring: ScoringSettings,
    device: torch.device,
    prompts: Sequence[Prompt],
    pictures: Tensor,
) -> Checked:
    checked = Checked(name, settings.kind, settings.where, [], 0, 0, 0, 0)
    began, before = time.perf_counter(), _memory(device)
    try:
        find_files(settings, f"rewards.{name}")
        workers = Workers.start({name: settings}, scoring)
    except (OSError, ValueError) as error:
        checked.trouble = str(error)
        return checked
    try:
        panel = assemble(
            {name: settings}, scoring, device, workers.addresses(), prompt=prompts[0],
            size=(pictures.shape[-2], pictures.shape[-1]),
            token=secret(TOKEN, os.environ.get(TOKEN)),
        )  # fmt: skip
        checked.load_seconds = time.perf_counter() - began
        _measure(checked, panel.rewards[name], prompts, pictures)
        checked.memory_mb = max(0, _memory(device) - before) / 1e6
        panel.close()
    except Exception as error:  # whatever a reward does: the others are checked too
        checked.trouble = f"{type(error).__name__}: {error}"
    finally:
        workers.close()
    return checked


def _measure(checked: Checked, reward: Reward, prompts: Sequence[Prompt], pictures: Tensor) -> None:
    pictures = pictures.to(reward.device)
    checked.pairs = not (reward.scores_alone and provides(type(reward), "score"))
    comparer: Reward = getattr(reward, "reward", reward)  # a preference's judge

    def said() -> Tensor:
        with torch.no_grad(), reward.precision():
            if checked.pairs:
                return comparer.compare(pictures, pictures.flip(0), prompts).float().cpu()
            return reward.score(pictures, prompts).float().cpu()

    began = time.perf_counter()
    value = said()
    middle = time.perf_counter()
    said()
    checked.first_ms = 1e3 * (middle - began) / len(prompts)
    checked.ms = 1e3 * (time.perf_counter() - middle) / len(prompts)
    checked.values = (value.norm(dim=1) if value.dim() == 2 else value).tolist()
    low, high = comparer.limits  # of a preference's judge, whose own scores these are
    bad = [v for v in checked.values if not (low <= v <= high and math.isfinite(v))]
    if bad:
        checked.trouble = f"values that are not finite, or outside of [{low:g}, {high:g}]: {bad}"
        checked.trouble += f"; {reward.trouble}" if reward.trouble else ""
    checked.exchange = reward.exchange


def _memory(device: torch.device) -> int:
    """Bytes in use: of the GPU by this process, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _block(checked: Checked, settings: RewardSettings, wrong: list[str], known: bool) -> str:
    state = "FAILED" if wrong else "ok"
    lines = [f"{state:8}{checked.name} ({checked.kind}, {checked.where})"]
    lines += [f"        {text}" for text in wrong]
    if checked.values:
        what = "lengths" if settings.role == "features" else "values"
        what = "verdicts on 1 and 4, 2 and 3, 3 and 2, 4 and 1:" if checked.pairs else what
        lines.append(f"        {what} {' '.join(f'{v:.6g}' for v in checked.values)}")
        lines.append(
            f"        {checked.ms:.1f} ms an image (the first call {checked.first_ms:.1f}), "
            f"{checked.memory_mb:.0f} MB, ready after {checked.load_seconds:.1f} s"
        )
        if known and not wrong:
            lines.append("        as in the golden file")
        lines += [f"        {line}".rstrip() for line in checked.exchange.splitlines()]
    about = _about(settings)
    if about:
        weights = getattr(settings, "model", None) or getattr(settings, "path", "none")
        lines.append(f"        weights {weights}; licence: {about.licence}")
        lines.append(f"        verified: {about.verified}")
    return "\n".join(lines)


def _about(settings: RewardSettings) -> Any:
    return plugins.resolve("gardo.rewards", settings.kind).about


def _golden(path: Path) -> dict[str, list[float]]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return {name: list(map(float, its["values"])) for name, its in said["rewards"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--golden {path}: {error}; give a file written by --record") from None
