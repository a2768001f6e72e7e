"""HPSv3 (arXiv 2508.03789): how well people would like the picture for its prompt.

    rewards:
      liked: {kind: hpsv3, role: held_out}

    h         = Qwen2-VL-7B's last hidden state at the token <|Reward|> of a turn about the picture
    mu, log s = Linear(16, 2) ReLU Linear(1024, 16) ReLU Linear(D, 1024) h
    value     = mu

The value is about -2 to 12. The turn shows the picture, then BEFORE, the prompt and AFTER; log s,
how sure the authors' model is, is left aside.

As the published inference runs it:
- Positions are 0, 1, 2, ... on all three axes of the rope, whatever is a picture: the authors'
  wrapper hands embeddings to the language model, which cannot find a picture in them. Qwen2-VL's
  own positions would be others, and the values too.
- A picture is resized to about 200,704 pixels, 448 x 448 (Pixels of judging/qwen_vl.py): bicubic,
  on tensors, where the authors' Pillow rounds to 8 bits.
- The head is in float32, the rest in bfloat16.

A prompt is data: unlike in the release, no special token can be written in one. Others have the
published tokens.

`path` holds HPSv3.safetensors; the authors' names of the tensors are mapped onto transformers'
Qwen2VLModel (`lm_head` is not needed). `base` has the configuration and the tokenizer, to which
<|Reward|> is added. Differentiable. Not verified against the published weights yet.

Shapes: B images, P patches of a picture, V values of a patch, L tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from gardo.rewards._files import TOKENIZER_FILES, ConfigFolder, ModelRewardSettings, holding
from gardo.rewards._loading import check_type, frozen, model_of, read_weights
from gardo.rewards.base import About, Holds, Reward, weights_of
from gardo.rewards.judging.planned import embedded
from gardo.rewards.judging.qwen_vl import Pixels, load_words
from gardo.settings import model_path
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "HPSv3.safetensors"
PIXELS = 256 * 28 * 28  # of a picture once it is resized, as near as its sides allow
REWARD = "<|Reward|>"
SYSTEM = "You are a helpful assistant."
HEAD, NOT_NEEDED = "rm_head.", "lm_head.weight"
EMBEDDINGS = "language_model.embed_tokens.weight"
NAMES = (  # published, or as a later transformers saves it -> transformers' Qwen2VLModel
    (r"^model\.(visual|language_model)\.", r"\1."),
    (r"^model\.", "language_model."),
)
SIDE = 448  # for `gardo plan`: pixels

# The text that the model was trained on, its spaces at the ends of lines too.
BEFORE = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment "
    "and give a overall score to estimate the human preference. Please provide a rating from 0 to "
    "10, with 0 being the worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be "
    "considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical "
    "errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear "
    "and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and "
    "other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color "
    "scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene "
    "should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as "
    "political, violent, or adult material. If such content is present, the image quality and "
    "satisfaction score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, "
    "animal, object) align with the textual description. The subject should match the description "
    "in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, "
    "evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding "
    "elements in the image logically fit the scenario described in the prompt. The environment "
    "should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, "
    "clothing, accessories, expressions, actions) are faithfully represented in the image. Minor "
    "deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are "
    "captured in the image. The generated content should not introduce elements that conflict with "
    "or distort the original description.\n"
    "Textual prompt - "
)
AFTER = "\n\n\n\nPlease provide the overall ratings of this image: "
END = "\n\nEND\n"


def last_states(
    model: Any, ids_BL: Tensor, mask_BL: Tensor, patches_BPV: Tensor, grid_B3: Tensor
) -> Tensor:
    """Qwen2VLModel's last hidden states [B, L, D] of turns about a picture each."""
    seen = model.get_image_features(patches_BPV.flatten(0, 1), grid_B3).pooler_output
    embeddings_BLD = model.get_input_embeddings()(ids_BL)
    picture_BL1 = (ids_BL == model.config.image_token_id)[..., None]
    embeddings_BLD = embeddings_BLD.masked_scatter(
        picture_BL1, torch.cat([*seen]).to(embeddings_BLD.dtype)
    )
    return states_of(model, embeddings_BLD, mask_BL)


def states_of(model: Any, embeddings_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The language model's last hidden states, with positions 0, 1, 2, ... on all axes."""
    B, L = embeddings_BLD.shape[:2]
    hidden_BLD: Tensor = model.language_model(
        inputs_embeds=embeddings_BLD,
        attention_mask=mask_BL,
        position_ids=torch.arange(L, device=embeddings_BLD.device).expand(3, B, L),
        use_cache=False,
    ).last_hidden_state
    return hidden_BLD


def planned(model: Any, images_B3HW: Tensor) -> Tensor:
    """What `score` does with Qwen2VLModel, on fake tensors."""
    return states_of(model, embedded(model, images_B3HW, PIXELS), None)


class Hpsv3Settings(ModelRewardSettings):
    kind: Literal["hpsv3"] = "hpsv3"
    path: Annotated[str, holding(FILE)] = Field("MizzenAI/HPSv3", description="hub id or folder")
    base: Annotated[
        ConfigFolder,
        holding("tokenizer_config.json"),
        TOKENIZER_FILES,
        Holds("Qwen2VLModel", ("path", "revision", "base", "base_revision"), SIDE, planned),
    ] = Field("Qwen/Qwen2-VL-7B-Instruct", description="hub id or folder: config.json, tokenizer")
    base_revision: str | None = Field(None, description="of `base` on the hub")
    dtype: Literal["tf32", "float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="of the model, as published; the head is float32"
    )
    batch: int = Field(8, ge=1, description="images that the model sees at once")


def head_of(weights: Mapping[str, Tensor], width: int) -> nn.Module:
    """The published head on states `width` wide. ValueError unless its names and shapes are so."""
    head = torch.nn.Sequential(
        torch.nn.Linear(width, 1024),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.05),  # none when it runs; it has a number
        torch.nn.Linear(1024, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 2),
    )
    own = {f"{HEAD}{name}": value.shape for name, value in head.state_dict().items()}
    given = {name: weight.shape for name, weight in weights.items()}
    wrong = sorted(name for name in own | given if own.get(name) != given.get(name))
    if wrong:
        raise ValueError(f"{wrong[0]} is not the head's, on a model {width} wide")
    head.load_state_dict({name.removeprefix(HEAD): weight for name, weight in weights.items()})
    return head


def parts_of(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of Qwen2VLModel under its own names, and the head's."""
    model, head = {}, {}
    for name, weight in weights.items():
        if name.startswith(HEAD):
            head[name] = weight
        elif name != NOT_NEEDED:
            for pattern, replacement in NAMES:
                if re.match(pattern, name):
                    name = re.sub(pattern, replacement, name)
                    break
            model[name] = weight
    return model, head


class Hpsv3(Reward):
    Settings = Hpsv3Settings
    about = About("mu of the authors' Gaussian", "-2 to 12", "MIT (authors' repository)")
    differentiable = True

    def __init__(self, settings: Hpsv3Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        base, revision = settings.base, settings.base_revision
        check_type(f"base: {base!r}", base, revision, "qwen2_vl")
        self.words = load_words(base, revision, field="base", more=[REWARD])
        model, head = self._load(base, revision)
        rows = model.config.text_config.vocab_size
        if len(self.words.tokenizer) != rows:
            raise ValueError(
                f"base: {base!r} has {len(self.words.tokenizer)} tokens with {REWARD}, the model "
                f"of {settings.path!r} {rows}"
            )
        self.model = frozen(model, settings.dtype, device, weights_of(settings, "base"))
        self.head = frozen(head, "float32", device)
        self.pixels = Pixels.of(model.config.vision_config, PIXELS, PIXELS)

    def _load(self, base: str, revision: str | None) -> tuple[Any, nn.Module]:
        """Qwen2VLModel, and the head."""
        from transformers import Qwen2VLConfig, Qwen2VLModel

        settings = self.settings
        where = f"path: {FILE} of {settings.path!r}"
        weights, head = parts_of(read_weights(settings.path, FILE, settings.revision))
        if EMBEDDINGS not in weights:
            raise ValueError(f"{where} is not HPSv3's: no tensor model.embed_tokens.weight")
        config = Qwen2VLConfig.from_pretrained(model_path(base), revision=revision)
        config.text_config.vocab_size = len(weights[EMBEDDINGS])  # the tokenizer's, not the base's
        model = model_of(Qwen2VLModel, where, config, weights, dtype=settings.dtype)
        try:
            return model, head_of(head, config.text_config.hidden_size)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def turn(self, prompt: str, tokens: int) -> list[int]:
        """The ids of the turn about a picture of so many tokens; one of them is <|Reward|>."""
        words = self.words
        text = [f"{BEFORE}{prompt}{AFTER}", [words.id[REWARD]], END]
        return words.turn(SYSTEM, [words.picture(tokens), *text])

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        tokens = self.pixels.tokens(*images_B3HW.shape[-2:])
        turns = {prompt: self.turn(str(prompt), tokens) for prompt in dict.fromkeys(prompts)}
        values, size = [torch.empty(0, device=self.device)], self.settings.batch
        for at in range(0, len(prompts), size):
            part = [turns[prompt] for prompt in prompts[at : at + size]]
            values.append(self._values(images_B3HW[at : at + size], part))
        return torch.cat(values)

    def _values(self, images_B3HW: Tensor, turns: Sequence[Sequence[int]]) -> Tensor:
        """mu, fp32 [B]. Padding is on the right, after all that <|Reward|> sees."""
        ids_BL, mask_BL = (x.to(self.device) for x in self.words.rows(turns, left=False))
        patches = self.pixels.patches(images_B3HW.to(self.device).float())
        hidden_BLD = last_states(self.model, ids_BL, mask_BL, *patches)
        reward_BD = hidden_BLD[ids_BL == self.words.id[REWARD]]  # one a row, in their order
        mu_B: Tensor = self.head(reward_BD.float())[:, 0]
        return mu_B


PLUGIN = Hpsv3
