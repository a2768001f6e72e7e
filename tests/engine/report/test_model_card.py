"""The model card: what the hub reads of it, what it says of a run, and what texts cannot do in it.

It is read back by the hub's own client, and by a parser of Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from gardo.licences import licence_of
from gardo.report.card_pictures import Shown
from gardo.report.markdown import code, escape, escape_line, fenced, table
from gardo.report.model_card import MARK, CardFacts, Scored, as_markdown, write_card
from gardo.report.pictures import save_grid
from tests.engine.report.records import EVIL, evaluation_record, step_record

LORA = {"kind": "lora", "rank": 16, "alpha": 32.0, "targets": None}
HOSTILE = [
    "a](http://evil.example) ![x](http://evil.example/x.png)",
    "<img src=x onerror=alert(1)> http://evil.example",
    "# a heading",
    "- a list",
    "1. a list",
    "> a quotation",
    "``` a fence",
    "*stars* _and_ __under__ ~~lines~~ `ticks`",
    "a | table | of | three",
    "--- \n***\n<!-- open",
    "&lt;b&gt; \\[x\\](y)",
]


def recipe(**train: Any) -> dict[str, Any]:
    return {
        "model": {"family": "flux", "size": [512, 768], "guidance": 3.5, "text_tokens": 512},
        "train": {"weights": LORA, "optimizer": {"name": "adamw", "lr": 3e-4}, **train},
        "data": {"prompts_per_step": 8, "images_per_prompt": 12, "held_out": 0.0},
        "sampler": {"steps": 10, "train_steps": 6},
        "algorithm": {
            "name": "gardo",
            "gate": {"fraction": 0.1, "limits": [0.02, 0.2]},
            "diversity": None,
            "reference": {"reset_kl": 1e-4, "reset_updates": 50, "reset_iterations": None},
        },
        "evaluate": {"images_per_prompt": 3, "steps": 28, "prompts": None},
        "run": {"name": "my-run", "steps": 40, "seed": 42, "folder": "runs"},
    }


def facts(path: str = "black-forest-labs/FLUX.1-dev", **changes: Any) -> CardFacts:
    said = CardFacts(
        name="my-run",
        base=path,
        hub_id=path if "/" in path else None,
        identity={"revision": "0ef5fff7"},
        licence=licence_of(path),
        family="flux",
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        precision="bfloat16",
        format="diffusers",
        average=False,
        evaluated_average=False,
        step=40,
        recipe=recipe(),
        processes=8,
        algorithms=[("gardo", "GARDO (arXiv 2512.24138)"), ("flow_grpo", "Flow-GRPO")],
        prompts="prompts.txt",
        prompt_count=54,
        rewards=[
            Scored("count", "proxy", "hpsv2 v2.1", "cos(image, prompt)",
                   ("xswu/HPSv2@abc", "laion/CLIP"), "Apache-2.0"),
            Scored("quality", "held_out", "pickscore"),
        ],
        evaluations=[evaluation_record(0), evaluation_record(40, proxy=0.2, held_out=-0.1)],
        steps=[step_record(1)],
        trained_with={"gardo": "0.1.0 (a76aed0)", "torch": "2.13.0"},
        exported_with={"gardo": "0.2.0"},
        devices="8 x NVIDIA H100 80GB HBM3",
    )  # fmt: skip
    return replace(said, **changes)


FULL = {**recipe(weights={"kind": "full"})}


def body(card: str) -> str:
    return str(ModelCard(card).text)


def tokens(text: str) -> Iterator[Token]:
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        yield token
        yield from token.children or ()


def words(text: str) -> str:
    """What a reader sees of Markdown, in one line."""
    return " ".join(" ".join(t.content for t in tokens(text) if t.type == "text").split())


# ---- what the hub reads --------------------------------------------------------------------------


def test_a_lora_of_flux_passes_its_licence_on() -> None:
    card = ModelCard(as_markdown(facts()))
    assert card.data.to_dict() == {
        "base_model": "black-forest-labs/FLUX.1-dev",
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "text-to-image", "flux", "gardo", "reinforcement-learning"],
    }
    assert "may not be used commercially" in card.text
    links = [t.attrs["href"] for t in tokens(card.text) if t.type == "link_open"]
    assert links == [card.data.license_link]


@pytest.mark.parametrize(
    ("path", "name", "said"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", "stabilityai-ai-community", "Stability AI"),
        ("builtin:flux", None, "Apache License 2.0"),
        ("somebody/model", None, "is not known here: look it up before you use or share"),
        ("my-folder", None, "is not known here: look it up before you use or share"),
    ],
)
def test_all_weights_of_other_models(path: str, name: str | None, said: str) -> None:
    card = ModelCard(as_markdown(facts(path, recipe=FULL, format="transformer")))
    data = card.data.to_dict()
    assert data.get("license_name") == name and said in words(card.text)
    known = licence_of(path).known
    assert ("license" in data) == known
    assert data.get("base_model") == (path if "/" in path else None)
    assert data.get("base_model_relation") == ("finetune" if "/" in path else None)
    assert "lora" not in data["tags"] and "All weights of the transformer" in card.text


def test_pictures_are_the_hubs_gallery() -> None:
    samples = [(EVIL, "sample-1.png"), ("- a: {list}\n---\n", "sample-2.png")]
    card = ModelCard(as_markdown(facts(), Shown(samples=samples)))
    assert card.data.to_dict()["widget"] == [
        {"text": text, "output": {"url": f"card/{file}"}} for text, file in samples
    ]
    assert "<Gallery />" in card.text and "<Gallery />" not in as_markdown(facts())


# ---- what it says --------------------------------------------------------------------------------


def test_it_says_what_came_of_the_run() -> None:
    said = words(body(as_markdown(facts())))
    assert "The proxy rose while a held-out reward fell: the sign of reward hacking." in said
    assert "0.800 [0.790, 0.810]" in said and "0.900 [0.890, 0.910]" in said
    assert "Held-out rewards fell since the start" in said
    assert "288 images of 36 prompts, on prompts of the training set" in said


def test_it_says_what_it_was_trained_with() -> None:
    text = body(as_markdown(facts()))
    said = words(text)
    for part in (
        "GARDO (arXiv 2512.24138)", "Flow-GRPO", "54 prompts; 8 an iteration, 12 images each",
        "0.1 at first and within 0.02 and 0.2", "Switched off: diversity",
        "where its KL passes 0.0001 or after 50 updates", "512 x 768 pixels, guidance 3.5",
        "cos(image, prompt)", "Apache-2.0", "40 of 40, seed 42",
        "Trained on 8 x NVIDIA H100 80GB HBM3 with gardo 0.1.0 (a76aed0), torch 2.13.0.",
        "Exported with gardo 0.2.0.",
        "The proxy is what was optimised. Held-out rewards were only measured.",
    ):  # fmt: skip
        assert part in said, part
    spans = [t.content for t in tokens(text) if t.type == "code_inline"]
    assert {"hpsv2 v2.1", "xswu/HPSv2@abc", "0ef5fff7", "prompts.txt"} <= {*spans}
    blocks = {t.info: t.content for t in tokens(text) if t.type == "fence"}
    assert blocks["bash"] == (
        "gardo train recipe.yaml --gpus 8\ngardo export runs/my-run --format diffusers --step 40\n"
    )
    assert yaml.safe_load(blocks["yaml"]) == recipe()


def test_it_says_what_is_not_known() -> None:
    said = words(body(as_markdown(facts(evaluations=[], rewards=[]))))
    assert "has no evaluation: nothing is known of what training changed" in said
    assert "No held-out reward was measured" in said
    said = words(body(as_markdown(facts(evaluations=[evaluation_record(0)], step=7))))
    assert "Only one evaluation: nothing to compare." in said
    assert "those after iteration 7, last evaluated after 0" in said
    assert "No held-out reward" not in said


@pytest.mark.parametrize("average", [False, True])
def test_it_says_which_weights_these_are(average: bool) -> None:
    said = words(body(as_markdown(facts(average=average, evaluated_average=True))))
    assert ("These are the exponential moving average" in said) == average
    assert ("drew with the average of the weights, not with" in said) == (not average)


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "transformer", "pipeline"])
def test_it_says_how_to_use_the_weights(format: str) -> None:
    text = body(as_markdown(facts(format=format)))
    (snippet,) = [t.content for t in tokens(text) if t.type == "fence" and t.info == "python"]
    compile(snippet, "card", "exec")
    assert ('"black-forest-labs/FLUX.1-dev"' in snippet) == (format != "pipeline")
    assert "height=512,\n    width=768,\n    num_inference_steps=28," in snippet
    other = {**recipe(), "model": {**recipe()["model"], "family": "sd3"}}
    sd3 = words(body(as_markdown(facts(format="kohya", recipe=other))))
    assert "In ComfyUI, or by sd-scripts" in sd3


def test_many_evaluations_are_thinned_to_a_table() -> None:
    many = [evaluation_record(step, proxy=step / 100) for step in range(50)]
    text = body(as_markdown(facts(evaluations=many, step=49)))
    rows = [line for line in text.splitlines() if line.startswith("| ") and "[" in line]
    assert 10 < len(rows) <= 12
    assert rows[0].startswith("| 0 |") and rows[-1].startswith("| 49 |")


# ---- what it writes ------------------------------------------------------------------------------


def test_the_card_and_its_pictures(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    for step, level in ((0, 0.25), (40, 0.75)):
        images = torch.full((6, 3, 8, 8), level)
        images[[0, 3]] /= 2  # the first of each row
        save_grid(images, run / f"samples/step-{step:05d}.png", columns=3)
    path = write_card(out, facts(), run)
    text = path.read_text()
    sources = {str(t.attrs["src"]) for t in tokens(body(text)) if t.type == "image"}
    widget = {one["output"]["url"] for one in ModelCard(text).data.to_dict()["widget"]}
    assert sources == {f"card/{n}" for n in ("curve-1.svg", "curve-2.svg", "before.png",
                                             "after.png")}  # fmt: skip
    assert widget == {"card/sample-1.png", "card/sample-2.png"}
    assert {f"card/{file.name}" for file in (out / "card").iterdir()} == sources | widget
    assert (out / "card/curve-1.svg").read_text().startswith("<svg ")
    again = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert write_card(out, facts(), run) == path
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == again


def test_a_picture_outside_of_the_run_is_not_taken(tmp_path: Path) -> None:
    save_grid(torch.zeros(6, 3, 8, 8), tmp_path / "private.png", columns=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "torn.png").write_bytes(b"\x89PNG\r\n")
    records = [evaluation_record(0), evaluation_record(40)]
    records[0]["images"], records[1]["images"] = "../private.png", "torn.png"
    path = write_card(tmp_path, facts(evaluations=records), tmp_path / "run")
    assert not list(tmp_path.glob("card/*.png")) and "widget" not in path.read_text()


def test_a_readme_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    path = write_card(tmp_path, facts(), tmp_path)
    assert path.name == "MODEL_CARD.md" and MARK in path.read_text()
    assert (tmp_path / "README.md").read_text() == "mine"


# ---- texts of others -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_stay_texts(text: str) -> None:
    seen = " ".join(text.split())
    for shown in (escape_line(text), f"1. {escape_line(text)}", f"It is {escape(text)}.",
                  table(["a"], [[escape(text)]])):  # fmt: skip
        kinds = {t.type for t in tokens(shown)}
        harmless = {"inline", "text", "paragraph_open", "paragraph_close", "text_special"}
        assert {k for k in kinds if not k.startswith(("table", "t", "ordered", "list"))} <= harmless
        read = "".join(t.content for t in tokens(shown) if t.type in ("text", "text_special"))
        assert seen in read
    (span,) = [t.content for t in tokens(code(text)) if t.type == "code_inline"]
    assert span == seen
    (block,) = [t.content for t in tokens(fenced(text, "yaml")) if t.type == "fence"]
    assert block == f"{text}\n"


def test_a_card_of_hostile_texts_has_no_link_of_theirs() -> None:
    for text in HOSTILE:
        record = evaluation_record(40)
        record["rewards"][text] = {"mean": 1.0, "low": 0.9, "high": 1.1, "role": text}
        record["prompts"] = [text]
        shown = Shown(((0, "before.png"), (40, "after.png")), [text], [(text, "sample-1.png")])
        card = as_markdown(
            facts(evaluations=[evaluation_record(0), record], prompts=text,
                  rewards=[Scored(text, text, text, text, (text,), text)]), shown,
        )  # fmt: skip
        assert ModelCard(card).data.to_dict()["widget"][0]["text"] == text
        found = list(tokens(body(card)))
        links = {t.attrs["href"] for t in found if t.type == "link_open"}
        images = {t.attrs["src"] for t in found if t.type == "image"}
        assert links == {licence_of("black-forest-labs/FLUX.1-dev").link}
        assert images == {"card/before.png", "card/after.png"}
        html = [t.content.strip() for t in found if t.type.startswith("html")]
        assert {h.split("\n")[0].split(":")[0] for h in html} <= {
            "<Gallery />", "<details><summary>The resolved recipe", "</details>", MARK,
        }  # fmt: skip
