"""How exported weights are used, by their format: the section of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IN_DIFFUSERS = ("flux",)  # families whose LoRAs of kohya's layout diffusers reads, at full size

LOADS = {  # how the pipeline gets the weights
    "diffusers": """\
pipeline = {pipeline}.from_pretrained({base}, dtype=torch.{precision})
pipeline.load_lora_weights(weights)
""",
    "kohya": """\
pipeline = {pipeline}.from_pretrained({base}, dtype=torch.{precision})
pipeline.load_lora_weights(weights, weight_name="kohya_lora.safetensors")
""",
    "peft": """\
pipeline = {pipeline}.from_pretrained({base}, dtype=torch.{precision})
pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, weights)
""",
    "transformer": """\
transformer = {transformer}.from_pretrained(weights, dtype=torch.{precision})
pipeline = {pipeline}.from_pretrained(
    {base}, transformer=transformer, dtype=torch.{precision}
)
""",
    "pipeline": """\
pipeline = {pipeline}.from_pretrained(weights, dtype=torch.{precision})
""",
}
DRAWS = """\
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
picture = pipeline(
    "{prompt}",
    height={height},
    width={width},
    num_inference_steps={steps},
    guidance_scale={guidance},
    max_sequence_length={text_tokens},
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]
picture.save("picture.png")"""


def usage(
    format: str, *, base: str, findable: str | None, pipeline: str, transformer: str,
    precision: str, model: Mapping[str, Any], steps: int,
) -> str:  # fmt: skip
    """Markdown. `findable` is what anyone can load the base by: a hub id, or builtin:NAME."""
    builtin = bool(findable) and str(findable).startswith("builtin:")
    if format == "kohya" and (builtin or model["family"] not in IN_DIFFUSERS):
        return "In ComfyUI, or by sd-scripts: `kohya_lora.safetensors`."
    where = f"model_path({findable!r})" if builtin else repr(findable or "path/to/the/base/model")
    where = where.replace("'", '"')
    classes = [pipeline, *([transformer] if format == "transformer" else [])]
    lines = ["import torch", f"from diffusers import {', '.join(sorted(classes))}"]
    lines += ["from peft import PeftModel"] if format == "peft" else []
    lines += ["from gardo.settings import model_path"] if builtin and format != "pipeline" else []
    height, width = model["size"]
    load = LOADS[format].format(
        pipeline=pipeline, transformer=transformer, base=where, precision=precision
    )
    draw = DRAWS.format(
        prompt="two red circles" if builtin else "a photo of two red apples on a table",
        height=height, width=width, steps=steps,
        guidance=model["guidance"], text_tokens=model["text_tokens"],
    )  # fmt: skip
    code = "\n".join([*lines, "", 'weights = "."  # this folder, or the hub id that it gets'])
    beside = " ComfyUI and sd-scripts read the same file." if format == "kohya" else ""
    said = f"With diffusers 0.42 or newer, as the run's evaluations drew.{beside}"
    if not findable and format != "pipeline":
        said += f" The base is {base}, a folder of who trained this."
    return f"{said}\n\n```python\n{code}\n{load}{draw}\n```"
