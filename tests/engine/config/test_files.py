"""What is said of a recipe's file, and of its files of prompts, that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.config import load
from tests.engine.config.recipe import GOOD, refusal, written

NO_YAML = "not valid YAML: "
TEXTS = {  # ^ is where YAML's own message points at
    "empty": ("", "a recipe is a mapping of sections; this is NoneType"),
    "list": ("- one\n- two\n", "a recipe is a mapping of sections; this is list"),
    "text": ("a recipe\n", "a recipe is a mapping of sections; this is str"),
    "no YAML": (
        "model: [\n",
        f"{NO_YAML}while parsing a flow node expected the node content, but found '<stream end>' "
        'in "<unicode string>", line 2, column 1: ^',
    ),
    "key twice": (
        "run: {seed: 1, steps: 2, seed: 3}\n",
        f"{NO_YAML}the key 'seed' stands twice in \"<unicode string>\", line 1, column 26: "
        "run: {seed: 1, steps: 2, seed: 3} ^",
    ),
    "section twice": (
        "run: {}\ndata: {}\nrun: {}\n",
        f"{NO_YAML}the key 'run' stands twice in \"<unicode string>\", line 3, column 1: "
        "run: {} ^",
    ),
    "Python object": (
        "run: !!python/object/apply:os.getcwd []\n",
        f"{NO_YAML}could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.getcwd' in \"<unicode string>\", "
        "line 1, column 6: run: !!python/object/apply:os.getcwd [] ^",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_bad_texts(case: str, tmp_path: Path) -> None:
    text, expected = TEXTS[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert refusal(path) == f"{path}: {expected}"


def test_a_key_that_stands_twice_is_located(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace("seed: 42", "seed: 42, seed: 43"))
    assert refusal(path) == (
        f"{path}: {NO_YAML}the key 'seed' stands twice in \"<unicode string>\", line 27, column 44:"
        " ... good-run, steps: 80, seed: 42, seed: 43} ^"
    )


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"run: {name: caf\xe9}\n")
    assert refusal(path) == f"{path}: not UTF-8 (byte 15); save it as UTF-8"


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with open(path, "wb") as file:
        file.truncate(20 << 20)
    assert refusal(path) == f"{path}: 20 MiB; that is no recipe, which has a few kB"


def test_utf_16_is_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(GOOD.encode("utf-16"))
    assert refusal(path) == f"{path}: not UTF-8 (byte 0); save it as UTF-8"
    path.write_bytes(GOOD.encode("utf-16-le"))
    assert "special characters are not allowed" in refusal(path)


@pytest.mark.parametrize("name", ["no.yaml", "."])
def test_a_missing_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert refusal(path) == (
        f"{path}: no such recipe; give a YAML file, such as recipes/tiny_flux_gardo.yaml"
    )


# ---- the run's folder ----------------------------------------------------------------------------


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    long = "x" * 300
    said = {
        "file": f"run.folder: '{tmp_path}/file' is there, and no folder; give another",
        "file/in/it": f"run.folder: '{tmp_path}/file' is there, and no folder; give another",
        "loop": f"run.folder: '{tmp_path}/loop': Too many levels of symbolic links; give another",
        "dangling": f"run.folder: '{tmp_path}/dangling' is a link that leads nowhere; give another",
        long: f"run.folder: '{tmp_path}/{long}': File name too long; give another",
    }
    for folder, message in said.items():
        path = written(tmp_path, f"run: {{folder: '{tmp_path}/{folder}'}}")
        assert refusal(path) == f"{path}: {message}"
    (tmp_path / "good-run").symlink_to("good-run")
    path = written(tmp_path, f"run: {{folder: '{tmp_path}'}}")
    assert refusal(path) == (
        f"{path}: run.name: 'good-run': Too many levels of symbolic links; give another"
    )


def test_a_folder_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load(written(tmp_path, "run: {folder: ~/runs}"))
    assert recipe.run_folder == tmp_path / "runs" / "good-run"
    assert not recipe.run_folder.exists()


# ---- prompts -------------------------------------------------------------------------------------

PROMPTS = {
    "empty": (b"", "'HERE/bad.txt' is empty; write one prompt a line"),
    "blank": (b" \n\n\t\n", "'HERE/bad.txt' is empty; write one prompt a line"),
    "not UTF-8": (
        b"one red circle\ntwo caf\xe9 circles\n",
        "'HERE/bad.txt' is not UTF-8 (byte 22); save it as UTF-8, for example with iconv -t UTF-8",
    ),
    "unknown word": (
        b"one red circle\ntwo pink circles\n",
        "prompt 2: prompt 'two pink circles': 'pink' is none of red, yellow, green, cyan, blue, "
        "magenta (rewards.tiny_count)",
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("field", ["data.prompts", "evaluate.prompts"])
def test_bad_prompt_files(field: str, case: str, tmp_path: Path) -> None:
    content, expected = PROMPTS[case]
    (tmp_path / "bad.txt").write_bytes(content)
    path = written(tmp_path, "evaluate: {prompts: prompts.txt}")
    message = refusal(path, [f"{field}=bad.txt"])
    assert message.replace(str(tmp_path), "HERE") == f"--set {field}: {expected}"
    path = written(tmp_path, f"{field.removesuffix('.prompts')}: {{prompts: bad.txt}}")
    message = refusal(path)
    assert message.replace(str(tmp_path), "HERE") == f"HERE/recipe.yaml: {field}: {expected}"


def test_a_prompt_that_cannot_be_scored_names_the_reward(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "prompts.txt").write_text("one red circle\nfour red circles\n")
    assert refusal(path) == (
        f"{path}: data.prompts: prompt 2: prompt 'four red circles': 'four' is none of one, two, "
        "three (rewards.tiny_count)"
    )
