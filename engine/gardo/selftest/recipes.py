"""Recipes that are wrong, hostile, or differ between ranks."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from gardo.selftest.case import Case, must
from gardo.selftest.forked import Ended, Launched, on_cpu
from gardo.selftest.trial import Trial, listing
from gardo.settings import BUILTIN

ZERO = {"engine": "zero", "stage": 1, "threads": 1}
SOON = 30.0  # seconds, with the start of what processes are forked from


def refused(trial: Trial, ended: Ended, *said: str) -> None:
    """Exit code 2, one message with all that must be `said`, no traceback, nothing written."""
    must(ended.code == 2, f"exit code {ended.code}: {ended.said}")
    must("Traceback" not in ended.said, ended.said)
    must(all(text in ended.said for text in said), f"{said} are not in: {ended.said}")
    written = [name for name in listing(trial.folder) if "/runs/" in name]
    must(not written, f"written: {written}")


def _there(folder: str, recipe: str) -> int:
    from gardo.train import main

    os.chdir(folder)
    return main([recipe])


def train_there(trial: Trial, recipe: Path) -> Ended:
    """Training by a process that runs in the trial's folder, where its plug-ins are."""
    (ended,) = Launched(0, _there, str(trial.folder), str(recipe)).ended(60)
    return ended


def refused_soon(trial: Trial, recipe: Path, *said: str) -> None:
    started = time.monotonic()
    refused(trial, train_there(trial, recipe), *said)
    must((took := time.monotonic() - started) < SOON, f"it took {took:.0f} s")


# ---- what stands in the file ---------------------------------------------------------------------

WRONG: tuple[tuple[str, Any], ...] = (
    ("run.name", "a/b"), ("run.seed", -1), ("run.seed", "1:30"), ("run.steps", 10**12),
    ("run.steps", float("nan")), ("run.deterministic", "yes"), ("run.colour", 1),
    ("model.path", "./nowhere"), ("model.path", "x" * 5000), ("model.size", [0, 16]),
    ("model.size", [7, 16]), ("model.size", [10**9, 16]), ("model.guidance", float("inf")),
    ("train.weights", []), ("train.weights.rank", 0), ("train.weights.targets", []),
    ("train.optimizer.lr", 0), ("train.optimizer.lr", float("nan")),
    ("train.optimizer.betas", [0.9, 1.0]), ("train.optimizer.eps", 0),
    ("train.optimizer.weight_decay", -1), ("train.micro_batch", 0), ("data.prompts", "nowhere.txt"),
    ("data.prompts", "\0"), ("data.prompts_per_step", 10**7), ("sampler.steps", 10**9),
    ("sampler.noise_level", -1), ("algorithm.name", "os:getcwd"), ("algorithm.name", "..:x"),
    ("algorithm.clip_range", 2), ("rewards", {}), ("rewards.tiny_shape", 3),
    ("rewards.tiny_shape.kind", "nothing"), ("rewards.tiny_shape.weight", float("inf")),
    ("evaluate.batch", 0), ("distributed.threads", 10**9), ("distributed.timeout", 0),
    ("kernels", "cuda"),
)  # fmt: skip


def wrong_values(trial: Trial) -> None:
    from gardo.config import load
    from gardo.recipe_errors import RecipeError

    for field, value in WRONG:
        sections = yaml.safe_load(trial.recipe().read_text(encoding="utf-8"))
        *parents, name = field.split(".")
        inside = sections
        for parent in parents:
            inside = inside[parent]
        inside[name] = value
        path = trial.folder / "wrong.yaml"
        path.write_text(yaml.safe_dump(sections), encoding="utf-8")
        said = ""
        try:
            load(path)
        except RecipeError as error:
            said = str(error)
        named = field in said or "not valid YAML" in said
        must(named and len(said) < 1000 and "\n" not in said, f"{field}: {value!r}: {said}")


def no_recipe(trial: Trial) -> None:
    laughs = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "\n".join(
        f"{this}: &{this} [{', '.join([f'*{before}'] * 9)}]"
        for before, this in zip("abcdef", "bcdefg", strict=True)
    )
    texts = {
        laughs: "more than 10000 values",
        "[" * 100_000: "nested more than 32 deep",
        "a: &a [*a]": "in itself",
        "run: !!int abc": "'abc' is no int",
        "run: !!timestamp 2020-99-99": "the tag",
        "run: !!python/object/apply:os.getcwd []": "the tag",
        "run: \0": "special characters",
        "# " + "x" * 2**24: "16 MiB",
    }
    path = trial.folder / "recipe.yaml"
    for text, said in texts.items():
        path.write_text(text, encoding="utf-8")
        refused_soon(trial, path, "recipe.yaml", said)


def one_anchor(trial: Trial) -> None:
    path = trial.recipe(rewards={}, run={"steps": 1})
    shared = "rewards:\n  tiny_shape: &of {role: proxy}\n  tiny_purity: *of\n"
    path.write_text(path.read_text(encoding="utf-8").replace("rewards: {}\n", shared))
    ended = trial.train(path)
    must(ended.code == 0, ended.said)
    rewards = yaml.safe_load((trial.run() / "recipe.yaml").read_text(encoding="utf-8"))["rewards"]
    kinds = {name: reward["kind"] for name, reward in rewards.items()}
    must(kinds == {"tiny_shape": "tiny_shape", "tiny_purity": "tiny_purity"}, kinds)


def refused_by_command(trial: Trial) -> None:
    """Measured by what cannot be left out: to check a recipe, torch is imported and little else."""
    features = {"role": "features", "path": "builtin:dinov3", "size": 16}
    trial.recipe(rewards={"tiny_shape": {"role": "proxy"}, "dinov3": features}, run={"steps": 0})
    before = _processor_seconds()
    refused(trial, trial.type("train", "recipe.yaml"), "recipe.yaml: run.steps: 0")
    used = _processor_seconds() - before
    subprocess.run([sys.executable, "-c", "import torch"], env=on_cpu(), check=True)
    torch = _processor_seconds() - before - used
    must(used < 2 * torch, f"{used:.1f} s of a processor, where torch takes {torch:.1f} s")


def _processor_seconds() -> float:
    """Of all processes that have been started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- what the file names -------------------------------------------------------------------------


def torn_model(trial: Trial) -> None:
    folder = Path(shutil.copytree(BUILTIN / "flux", trial.folder / "flux"))
    recipe = trial.recipe(model={"path": str(folder)})
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9000])
    refused_soon(trial, recipe, "model.path", weights.name)
    (folder / "vae/config.json").write_text("[]", encoding="utf-8")
    refused_soon(trial, recipe, "model", "vae/config.json")
    (folder / "model_index.json").write_text("{", encoding="utf-8")
    refused_soon(trial, recipe, "model.path", "model_index.json")


def no_folder(trial: Trial) -> None:
    (trial.folder / "file").touch()
    (trial.folder / "loop").symlink_to("loop")
    for name, field in (("file", "run.folder"), ("file/in", "run.folder"), ("loop", "run.folder")):
        refused_soon(trial, trial.recipe(run={"folder": name}), field)
    (trial.folder / "there").mkdir()
    (trial.folder / "there/tiny").symlink_to("tiny")
    refused_soon(trial, trial.recipe(run={"folder": "there"}), "run.name: 'tiny'")


BROKEN = {  # a module's own lines, and what is said of it
    "1 / 0": "ZeroDivisionError",
    "sys.exit(0)": "SystemExit",
    "class Mine: Settings = RewardSettings": "no subclass of",
    "class Mine(Reward): Settings = dict": "no subclass of",
    "class Mine(Reward): Settings = RewardSettings": "has no score",
}


def broken_rewards(trial: Trial) -> None:
    for number, (text, said) in enumerate(BROKEN.items()):
        refused_soon(trial, _own_reward(trial, f"broken_{number}", text), "rewards.mine.kind", said)
    text = (
        "class Mine(Reward):\n    Settings = RewardSettings\n"
        "    def score(self, images, prompts): return images.mean((1, 2, 3))[:, None]"
    )
    ended = train_there(trial, _own_reward(trial, "value", text))
    must(ended.code not in (0, None), f"exit code {ended.code}: {ended.said}")
    must("rewards.mine: Mine.score gave [" in ended.said, ended.said)


def _own_reward(trial: Trial, module: str, text: str) -> Path:
    """A recipe with a reward `mine` of a module, both in the trial's folder."""
    head = "import sys\nfrom gardo.rewards.base import Reward, RewardSettings\n"
    (trial.folder / f"{module}.py").write_text(head + text, encoding="utf-8")
    return trial.recipe(rewards={"mine": {"kind": f"{module}:Mine", "role": "proxy"}})


# ---- ranks that differ ---------------------------------------------------------------------------


def _of_its_own(recipes: list[str]) -> int:
    from gardo.train import main

    return main([recipes[int(os.environ["RANK"])]])


def each(trial: Trial, *recipes: Path, timeout: float = 60.0) -> list[Ended]:
    """One rank for each recipe, all in one launch."""
    return Launched(len(recipes), _of_its_own, [str(r) for r in recipes]).ended(timeout)


def other_seed(trial: Trial) -> None:
    one = trial.recipe("one.yaml", distributed=ZERO)
    other = trial.recipe("other.yaml", distributed=ZERO, run={"seed": 8})
    first, second = each(trial, one, other)
    must(second.code == 2, f"exit code {second.code}: {second.said}")
    refused(trial, first, "run.seed: 7 on rank 0, 8 on rank 1")


def other_prompts(trial: Trial) -> None:
    (trial.folder / "there").mkdir()
    (trial.folder / "there" / "prompts.txt").write_text("one blue circle\n", encoding="utf-8")
    one = trial.recipe("one.yaml", distributed=ZERO)
    other = trial.recipe("there/one.yaml", distributed=ZERO)
    first, second = each(trial, one, other)
    must(second.code == 2, f"exit code {second.code}: {second.said}")
    refused(trial, first, "data.prompts: 'a file with SHA-256", "on rank 1")


def one_refused(trial: Trial) -> None:
    good = trial.recipe("good.yaml", distributed=ZERO)
    bad = trial.recipe("bad.yaml", distributed=ZERO, run={"steps": 0})
    for recipes, who in (((good, bad), 1), ((bad, good), 0)):
        everyone = each(trial, *recipes)
        must([one.code for one in everyone] == [2, 2], everyone)
        refused(trial, everyone[0], "run.steps: 0: input should be greater")
        must(who == 0 or "rank 1 cannot run" in everyone[0].said, everyone[0].said)


def taken_port(trial: Trial) -> None:
    recipe = trial.recipe(distributed=ZERO)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for ranks in (1, 2):
            launched = Launched(ranks, _at_port, port, str(recipe))
            launched.processes[0].join(60)  # the others have nobody to meet
            launched.kill()
            refused(trial, launched.ended()[0], f"127.0.0.1:{port}", "MASTER_PORT")


def _at_port(port: str, recipe: str) -> int:
    from gardo.train import main

    os.environ["MASTER_PORT"] = port
    return main([recipe])


CASES = [
    Case(
        "wrong-values",
        "fields of a recipe get values of another type, out of their range, NaN, of no file",
        "each is refused in one line that names the field",
        wrong_values,
    ),
    Case(
        "no-recipe",
        "a recipe is a billion laughs, a hundred thousand brackets, code, of 16 MiB",
        "each is refused with 2 within seconds, in one line",
        no_recipe,
    ),
    Case(
        "one-anchor-for-two-rewards",
        "two rewards share their settings by a YAML anchor",
        "each is of the kind that its name says",
        one_anchor,
    ),
    Case(
        "refused-by-the-command",
        "`gardo train` is given a recipe with a wrong value",
        "it ends with 2, nothing is written, and the wait was for torch to be imported",
        refused_by_command,
    ),
    Case(
        "a-torn-model",
        "files of the model's folder are cut, or are of something else",
        "the file is named and the run ends with 2 before a model loads",
        torn_model,
    ),
    Case(
        "a-folder-that-cannot-be",
        "run.folder is a file, in a file, or a circle of links",
        "the field is named and the run ends with 2 before a model loads",
        no_folder,
    ),
    Case(
        "broken-rewards",
        "a reward of one's own raises or exits when it is imported, is no reward, or gives no "
        "tensor [B]",
        "the error names the reward, before a model loads where that can be known",
        broken_rewards,
    ),
    Case(
        "another-seed-on-a-rank",
        "two ranks start with recipes that differ in a seed",
        "both end with 2 before a model loads, and name the field and both values",
        other_seed,
    ),
    Case(
        "other-prompts-on-a-rank",
        "two ranks find files of the same name with other prompts in them",
        "both end with 2 before a model loads, and name the file's field",
        other_prompts,
    ),
    Case(
        "one-rank-refused",
        "the recipe of one of two ranks is refused",
        "the other one hears of it and ends with 2 as well, instead of waiting for it",
        one_refused,
    ),
    Case(
        "a-port-that-is-taken",
        "another program listens at MASTER_PORT",
        "the first rank ends with 2 before a model loads, and names the port",
        taken_port,
    ),
]
