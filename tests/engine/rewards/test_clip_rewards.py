"""The rewards on CLIP, with tiny random models of the classes that hold the published weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gardo import plugins
from gardo.rewards import _pixels, hpsv2
from gardo.rewards._affine import collapse
from gardo.rewards.base import Reward
from gardo.settings import model_path

CPU = torch.device("cpu")
SIZE, LENGTH, WIDTH, HEADS, END = 28, 10, 32, 2, 1
PROMPTS = ["one red square", "two blue circles", "one red square"]
KINDS = ["pickscore", "clipscore", "hpsv2", "aesthetic"]


def to_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """A CLIPModel's weights as open_clip names and lays them out."""
    state = model.state_dict()
    text, vision = "text_model", "vision_model"
    out = {
        "logit_scale": state["logit_scale"],
        "positional_embedding": state[f"{text}.embeddings.position_embedding.weight"],
        "token_embedding.weight": state[f"{text}.embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "visual.class_embedding": state[f"{vision}.embeddings.class_embedding"],
        "visual.positional_embedding": state[f"{vision}.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state[f"{vision}.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    for leaf in ("weight", "bias"):
        out[f"ln_final.{leaf}"] = state[f"{text}.final_layer_norm.{leaf}"]
        out[f"visual.ln_pre.{leaf}"] = state[f"{vision}.pre_layrnorm.{leaf}"]
        out[f"visual.ln_post.{leaf}"] = state[f"{vision}.post_layernorm.{leaf}"]
        for tower, prefix in ((text, ""), (vision, "visual.")):
            for n in range(2):
                layer, block = f"{tower}.encoder.layers.{n}", f"{prefix}transformer.resblocks.{n}"
                attention = [state[f"{layer}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
                out[f"{block}.attn.in_proj_{leaf}"] = torch.cat(attention)
                out[f"{block}.attn.out_proj.{leaf}"] = state[f"{layer}.self_attn.out_proj.{leaf}"]
                out[f"{block}.ln_1.{leaf}"] = state[f"{layer}.layer_norm1.{leaf}"]
                out[f"{block}.ln_2.{leaf}"] = state[f"{layer}.layer_norm2.{leaf}"]
                out[f"{block}.mlp.c_fc.{leaf}"] = state[f"{layer}.mlp.fc1.{leaf}"]
                out[f"{block}.mlp.c_proj.{leaf}"] = state[f"{layer}.mlp.fc2.{leaf}"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def head_state() -> dict[str, Tensor]:
    """The published head's names and number of layers, on the tiny model's features."""
    torch.manual_seed(2)
    widths = {"0": (16, 24), "2": (24, 12), "4": (12, 8), "6": (8, 4), "7": (4, 1)}
    layers = nn.ModuleDict({number: nn.Linear(*size) for number, size in widths.items()})
    return {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP folder, the same weights in open_clip's names, and an aesthetic head."""
    path = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(model_path("builtin:flux/tokenizer"))
    tokenizer.save_pretrained(path)
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "projection_dim": 16,
        "hidden_act": "gelu",
        "initializer_factor": 4.0,  # features then differ between images
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    ends = {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": END}
    vision = {"image_size": SIZE, "patch_size": 7}
    torch.manual_seed(1)
    model = CLIPModel(
        CLIPConfig(
            text_config=shared | text | ends, vision_config=shared | vision, projection_dim=16
        )
    )
    for parameter in model.parameters():  # biases and norms too: a swap of two must show
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.logit_scale.data.fill_(math.log(97.0))
    model.save_pretrained(path)
    state = to_open_clip(model)
    torch.save({"epoch": 3, "state_dict": state}, path / hpsv2.FILES["v2.1"])
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, path / hpsv2.FILES["v2"])
    save_file(state, path / "hps.safetensors")
    torch.save(head_state(), path / "head.pth")
    return path


def build(kind: str, folder: Path, **settings: Any) -> Any:
    own: dict[str, Any] = {
        "pickscore": {"tokenizer": str(folder)},
        "clipscore": {},
        "hpsv2": {"base": str(folder)},
        "aesthetic": {"head": str(folder), "head_file": "head.pth"},
    }[kind]
    plugin = plugins.resolve("gardo.rewards", kind)
    fields = {"kind": kind, "role": "proxy", "path": str(folder)} | own | settings
    return plugin(plugin.Settings(**fields), CPU)


@pytest.fixture(scope="module")
def rewards(folder: Path) -> dict[str, Reward]:
    return {kind: build(kind, folder) for kind in KINDS}


def pictures(count: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """8-bit noise in [0.2, 0.8]: resizing it never reaches the clamp."""
    generator = torch.Generator().manual_seed(height + width)
    noise = torch.randint(51, 205, (count, 3, height, width), generator=generator)
    return noise.float() / 255


def pil(images: Tensor) -> list[Image.Image]:
    as_bytes = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(one.numpy()) for one in as_bytes]


def expected(kind: str, folder: Path, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """The score in float64, by the model's own forward on pixels that are ready."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    inputs = CLIPTokenizer.from_pretrained(folder)(
        list(prompts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(pixel_values=pixels, **inputs)
    cosine = (out.image_embeds * out.text_embeds).sum(-1)
    if kind == "aesthetic":
        hidden = out.image_embeds
        state = {name: tensor.double() for name, tensor in head_state().items()}
        for n in (0, 2, 4, 6, 7):
            hidden = F.linear(hidden, state[f"layers.{n}.weight"], state[f"layers.{n}.bias"])
        return hidden[:, 0]
    logit = out.logits_per_image.diagonal()
    return {"pickscore": logit / 26, "clipscore": cosine * 100 / 30, "hpsv2": cosine}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_that_of_the_models_own_forward(
    kind: str, folder: Path, rewards: dict[str, Reward]
) -> None:
    """Through transformers' image processor too; float32 rounding over 2 layers is ~1e-6 of 4."""
    images = pictures(3)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)(
        pil(images), return_tensors="pt"
    ).pixel_values
    value = rewards[kind].score(images, PROMPTS)
    assert value.dtype == torch.float32 and value.shape == (3,)
    wanted = expected(kind, folder, pixels.double(), PROMPTS)
    assert torch.allclose(value.double(), wanted, atol=2e-5, rtol=0)
    assert float(wanted.std()) > 1e-3  # or any constant would pass


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_pixels(kind: str, folder: Path, rewards: dict[str, Reward]) -> None:
    """float32 gradients through the resize, against central differences in float64."""
    images, fit = pictures(2, 40, 36), "pad" if kind == "hpsv2" else "crop"
    images.requires_grad_()
    value = rewards[kind].score(images, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert rewards[kind].differentiable

    def total(at: Tensor) -> float:
        pixels = _pixels.for_clip(at, SIZE, fit)  # type: ignore[arg-type]
        return float(expected(kind, folder, pixels, PROMPTS[:2]).sum())

    step = 1e-4  # third derivatives leave about step^2, rounding 1e-15 / step
    for place in [(0, 0, 20, 18), (1, 2, 7, 30), (1, 1, 33, 5)]:
        nudge = torch.zeros(images.shape, dtype=torch.float64)
        nudge[place] = step
        at = images.detach().double()
        slope = (total(at + nudge) - total(at - nudge)) / (2 * step)
        scale = float(gradient.abs().mean())
        assert abs(float(gradient[place]) - slope) < 1e-3 * max(scale, abs(slope))
        assert slope != 0


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_company_do_not_matter(kind: str, folder: Path) -> None:
    images, prompts = pictures(5), [*PROMPTS, "two", "one green triangle"]
    whole = build(kind, folder, batch=8).score(images, prompts)
    split = build(kind, folder, batch=2).score(images, prompts)
    alone = [build(kind, folder).score(images[i : i + 1], prompts[i : i + 1]) for i in range(5)]
    assert torch.allclose(whole, split, atol=2e-5)
    assert torch.allclose(whole, torch.cat(alone), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_has_no_value(kind: str, rewards: dict[str, Reward]) -> None:
    images = pictures(3)
    images[1, 0, 5, 5] = torch.nan
    assert rewards[kind].score(images, PROMPTS).isfinite().tolist() == [True, False, True]


def test_a_prompt_is_encoded_once(rewards: dict[str, Any]) -> None:
    model, rows = rewards["pickscore"].clip.model, []
    watch = model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    rewards["pickscore"].score(pictures(6), PROMPTS * 2)
    watch.remove()
    assert sum(rows) == 2


def test_a_long_prompt_is_cut_and_keeps_its_end(folder: Path, rewards: dict[str, Any]) -> None:
    prompt = "one two red blue green square circle triangle squares circles"
    ids = CLIPTokenizer.from_pretrained(folder)(prompt).input_ids
    assert len(ids) > LENGTH
    cut = torch.tensor([[*ids[: LENGTH - 1], END]])
    clip = rewards["clipscore"].clip
    with torch.no_grad():
        wanted = F.normalize(clip.model.get_text_features(cut).pooler_output, dim=-1)
    assert torch.allclose(clip.text_features([prompt]), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_encoders_give_float32_scores(
    kind: str, folder: Path, rewards: dict[str, Reward]
) -> None:
    images = pictures(3)
    exact = rewards[kind].score(images, PROMPTS)
    near = build(kind, folder, dtype="bfloat16").score(images, PROMPTS)
    assert near.dtype == torch.float32
    # Features of relative error 2^-6 at most (8 bits, a few roundings): cosines to 2^-5 at worst.
    scale = {"pickscore": 97 / 26, "clipscore": 100 / 30, "hpsv2": 1.0, "aesthetic": 1.0}[kind]
    assert torch.allclose(near, exact, atol=scale / 32)


def test_logit_scale_is_not_rounded(folder: Path) -> None:
    reward = build("pickscore", folder, dtype="bfloat16")
    assert reward.clip.scale == pytest.approx(97, rel=1e-6)


# ---- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 64), (61, 40), (33, 90), (20, 17)])
def test_crop_is_that_of_transformers_processor(height: int, width: int) -> None:
    """Up to Pillow's rounding to 8 bits: at most 0.5 / 255 a pass, two passes, over std .26."""
    images = pictures(2, height, width)
    wanted = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)(
        pil(images), return_tensors="pt"
    ).pixel_values
    out = _pixels.for_clip(images, SIZE)
    assert out.shape == (2, 3, SIZE, SIZE)
    assert float((out - wanted).abs().max()) < 2 / 255 / 0.26
    assert float((out - wanted).abs().mean()) < 0.5 / 255 / 0.26


@pytest.mark.parametrize(("height", "width"), [(64, 64), (61, 40), (33, 90), (20, 17)])
def test_pad_fits_the_whole_image_between_black_bars(height: int, width: int) -> None:
    images, longer = pictures(1, height, width), max(height, width)
    inner = (round(width * (SIZE / longer)), round(height * (SIZE / longer)))
    canvas = Image.new("RGB", (SIZE, SIZE))
    canvas.paste(
        pil(images)[0].resize(inner, Image.Resampling.BICUBIC),
        ((SIZE - inner[0]) // 2, (SIZE - inner[1]) // 2),
    )
    bytes_HW3 = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    wanted = bytes_HW3.view(SIZE, SIZE, 3).permute(2, 0, 1) / 255
    out = _pixels.for_clip(images, SIZE, "pad")[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in _pixels.CLIP)
    out = out * std + mean
    assert out.shape == wanted.shape
    assert float((out - wanted).abs().max()) < 2 / 255


def test_resizing_stays_within_the_colours() -> None:
    """Bicubic overshoots at an edge by some percent; Pillow's 8 bits clip it."""
    edge = torch.zeros(1, 3, 90, 90)
    edge[..., 45:] = 1
    out = _pixels.for_clip(edge, SIZE)
    black, white = (_pixels.for_clip(torch.full((1, 3, SIZE, SIZE), x), SIZE) for x in (0.0, 1.0))
    assert bool((out >= black).all()) and bool((out <= white).all())


# ---- HPSv2: open_clip's weights ------------------------------------------------------------------


def open_clip_cosine(state: dict[str, Tensor], pixels: Tensor, ids_BL: Tensor) -> Tensor:
    """open_clip's forward by hand, from its own names, with torch's MultiheadAttention."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x: Tensor, prefix: str, mask: Tensor | None) -> Tensor:
        for n in range(2):
            block = f"{prefix}transformer.resblocks.{n}"
            attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=x.dtype)
            own = f"{block}.attn."
            attention.load_state_dict(
                {k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}
            )
            y = norm(x, f"{block}.ln_1")
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = norm(x, f"{block}.ln_2")
            y = F.linear(y, state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"])
            y = F.gelu(y)
            y = F.linear(y, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
            x = x + y
        return x

    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=7).flatten(2).mT
    start = state["visual.class_embedding"].expand(len(pixels), 1, WIDTH)
    x = torch.cat([start, patches], 1) + state["visual.positional_embedding"]
    x = blocks(norm(x, "visual.ln_pre"), "visual.", None)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]

    x = state["token_embedding.weight"][ids_BL] + state["positional_embedding"]
    causal = torch.full((LENGTH, LENGTH), -torch.inf, dtype=x.dtype).triu(1)
    x = norm(blocks(x, "", causal), "ln_final")
    end_B = (ids_BL == END).int().argmax(-1)  # the end is the highest number in the real vocabulary
    text = x[torch.arange(len(x)), end_B] @ state["text_projection"]
    return F.cosine_similarity(image, text, dim=-1)


@pytest.mark.parametrize("settings", [{}, {"file": "hps.safetensors"}, {"version": "v2"}])
def test_hpsv2_is_open_clips_forward(folder: Path, settings: dict[str, Any]) -> None:
    """Zero padding behind the end token as open_clip has it. v2 is stored in float16 here."""
    reward = build("hpsv2", folder, **settings)
    stored = load_file(folder / "hps.safetensors")
    half = settings.get("version") == "v2"
    state = {name: (t.half() if half else t).double() for name, t in stored.items()}
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids_BL = torch.zeros(3, LENGTH, dtype=torch.int64)
    for row, ids in zip(ids_BL, tokenizer(PROMPTS).input_ids, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    images = pictures(3)
    pixels = _pixels.for_clip(images.double(), SIZE, "pad")
    wanted = open_clip_cosine(state, pixels, ids_BL)
    assert torch.allclose(reward.score(images, PROMPTS).double(), wanted, atol=2e-6)


def test_renaming_gives_back_every_weight(folder: Path, rewards: dict[str, Any]) -> None:
    original = CLIPModel.from_pretrained(folder).state_dict()
    renamed = hpsv2.from_open_clip(to_open_clip(CLIPModel.from_pretrained(folder)))
    assert renamed.keys() == original.keys()
    loaded = rewards["hpsv2"].clip.model.state_dict()
    for name, tensor in original.items():
        assert torch.equal(renamed[name], tensor), name
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    "extra", ["visual.attn_pool.q", "visual.transformer.resblocks.0.ls_1.gamma"]
)
def test_unknown_names_are_refused(folder: Path, tmp_path: Path, extra: str) -> None:
    state = load_file(folder / "hps.safetensors") | {extra: torch.zeros(2)}
    save_file(state, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=rf"path: more.safetensors of .*: {extra} is no name"):
        build("hpsv2", folder, path=str(tmp_path), file="more.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": None}, "lacks visual_projection.weight;"),
        (
            {"visual.transformer.resblocks.1.attn.in_proj_bias": None},
            r"lacks vision_model.encoder.layers.1.self_attn.k_proj.bias and 2 more;",
        ),
        ({"text_projection": torch.zeros(WIDTH, 8)}, "has another shape of text_projection.weight"),
        (
            {"transformer.resblocks.7.ln_1.bias": torch.zeros(WIDTH)},
            "also has text_model.encoder.layers.7.layer_norm1.bias",
        ),
    ],
)
def test_weights_must_be_exactly_the_models(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    state: dict[str, Any] = load_file(folder / "hps.safetensors") | change
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=message):
        build("hpsv2", folder, path=str(tmp_path), file="odd.safetensors")


# ---- the aesthetic head --------------------------------------------------------------------------


def test_head_is_one_affine_map() -> None:
    """float64 throughout: the two orders of summing 16 to 24 numbers differ by rounding only."""
    state = head_state()
    weight, bias = collapse(dict(reversed(state.items())))
    assert weight.dtype == bias.dtype == torch.float64
    features = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hidden = features
    for n in (0, 2, 4, 6, 7):
        layer = state[f"layers.{n}.weight"].double(), state[f"layers.{n}.bias"].double()
        hidden = F.linear(hidden, *layer)
    assert torch.allclose(features @ weight + bias, hidden[:, 0], atol=1e-13, rtol=0)


def test_layers_are_ordered_by_number_not_by_text() -> None:
    generator = torch.Generator().manual_seed(4)
    state = {}
    for n in (2, 10):
        state[f"layers.{n}.weight"] = torch.randn(1, 1, generator=generator)
        state[f"layers.{n}.bias"] = torch.randn(1, generator=generator)
    _, bias = collapse(state)
    last = state["layers.10.weight"].double() @ state["layers.2.bias"].double()
    assert float(bias) == pytest.approx(float(last + state["layers.10.bias"].double()))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.zeros(1, 16)}, "names are layers.N.weight and layers.N.bias"),
        ({"layers.0.weight": torch.zeros(1, 16)}, "names are layers.N.weight and layers.N.bias"),
        (
            {
                "layers.0.weight": torch.zeros(3, 16),
                "layers.0.bias": torch.zeros(3),
                "layers.1.weight": torch.zeros(1, 4),
                "layers.1.bias": torch.zeros(1),
            },
            "a layer of 4 inputs follows 3",
        ),
        (
            {"layers.0.weight": torch.zeros(3, 16), "layers.0.bias": torch.zeros(3)},
            "it gives 3 numbers",
        ),
        (
            {"layers.0.weight": torch.zeros(1, 9), "layers.0.bias": torch.zeros(1)},
            "takes 9 features, the model of .* has 16",
        ),
    ],
)
def test_other_heads_are_refused(
    folder: Path, tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=f"head: head.pth of .*{message}"):
        build("aesthetic", folder, head=str(tmp_path))


# ---- what does not load --------------------------------------------------------------------------


class Trap:
    """Touches a file if its pickle is ever run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["trap.pt", "text.pt", "text.safetensors"])
def test_a_file_of_something_else_is_refused_and_not_run(
    folder: Path, tmp_path: Path, file: str
) -> None:
    torch.save({"state_dict": {"x": Trap(tmp_path / "ran")}}, tmp_path / "trap.pt")
    for text in ("text.pt", "text.safetensors"):
        (tmp_path / text).write_text("not weights")
    with pytest.raises(ValueError, match=f"{file} cannot be read as tensors"):
        build("hpsv2", folder, path=str(tmp_path), file=file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"x": 3}}, {}, [torch.zeros(2)]])
def test_a_file_without_a_state_dict_is_refused(
    folder: Path, tmp_path: Path, content: object
) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd.pt holds no state dict"):
        build("hpsv2", folder, path=str(tmp_path), file="odd.pt")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("pickscore", {"path": "./none"}, "no folder with config.json: './none'"),
        ("clipscore", {"path": "./none"}, "no folder with config.json: './none'"),
        ("aesthetic", {"path": "./none"}, "no folder with config.json: './none'"),
        ("hpsv2", {"base": "./none"}, "no folder with config.json: './none'"),
        ("pickscore", {"tokenizer": "./none"}, "no folder with tokenizer_config.json"),
        ("hpsv2", {"path": "./none"}, "no folder with HPS_v2.1_compressed.pt: './none'"),
        ("hpsv2", {"path": "./none", "version": "v2"}, "no folder with HPS_v2_compressed.pt"),
        ("aesthetic", {"head": "./none"}, "no folder with head.pth: './none'"),
        ("clipscore", {"path": "builtin:dinov3"}, "holds a model of type 'dinov3_vit'"),
        ("aesthetic", {"path": "builtin:dinov3"}, "holds a model of type 'dinov3_vit'"),
        ("hpsv2", {"base": "builtin:dinov3"}, "base: .* a model of type 'dinov3_vit'"),
    ],
)
def test_a_wrong_folder_is_one_clear_error(
    folder: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, folder, **settings)


def test_a_folder_without_weights_or_with_half_of_them(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"path: .* holds no weights: .*no file named model"):
        build("pickscore", tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"], state["logit_scale"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks logit_scale and 1 more"):
        build("pickscore", tmp_path)


def test_a_tokenizer_of_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    CLIPTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 2 tokens, the model \d+"):
        build("pickscore", folder, tokenizer=str(tmp_path))
