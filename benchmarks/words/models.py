"""The models of the world of words: real diffusers and transformers classes in two sizes.

    full     a Flux of about 40 M parameters with the 16 latent channels of FLUX.1, for a GPU
    small    about 1 M, for trying the whole path on a CPU

T5's tokens are characters and the world's other words, so that a word can be spelt; both text
encoders are trained with the transformer, since nothing else tells it the order of characters (Flux
gives all text tokens the same position). Weights are random until make.py trains them; callers seed
torch beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from gardo.tiny.models import flux_scheduler
from words import world
from words.world import World

TEXT_TOKENS = 16  # of T5: five characters, two quotes, the looks, the end
CLIP_TOKENS = 40  # of CLIP, which spells every word
PATCH = 8  # pixels of DINOv3's patches


@dataclass(frozen=True)
class Budget:
    """Of a stage of pre-training."""

    steps: int
    batch: int  # pictures
    lr: float


@dataclass(frozen=True)
class Size:
    """How large the models are, and how long each stage trains."""

    name: str
    world: World
    levels: tuple[int, ...]  # channels of the VAE's levels
    latents: int  # channels
    text: int  # width of the text encoders
    heads: int
    axes: tuple[int, int, int]  # rotary widths, whose sum is that of a head
    double: int  # blocks
    single: int
    features: tuple[int, int]  # DINOv3's width and layers
    judge: int  # width of the held-out judge
    samples: int  # of trained words, and of held-out ones, that OCR reads at the end
    budgets: Mapping[str, Budget]


_SIZES = (
    Size(
        name="full",
        world=world.words_world(),
        levels=(64, 128, 128),
        latents=16,
        text=256,
        heads=6,
        axes=(16, 24, 24),
        double=4,
        single=8,
        features=(192, 6),
        judge=192,
        samples=96,
        budgets={
            "vae": Budget(6000, 128, 1e-3),
            "flux": Budget(8000, 512, 1e-3),
            "dinov3": Budget(2000, 256, 1e-3),
            "letters": Budget(2000, 256, 2e-3),
            "genuine": Budget(4000, 256, 1e-3),
        },
    ),
    Size(
        name="small",
        world=world.numbers_world(),
        levels=(8, 16, 32),
        latents=8,
        text=64,
        heads=6,
        axes=(4, 6, 6),
        double=2,
        single=2,
        features=(48, 3),
        judge=64,
        samples=18,
        budgets={
            "vae": Budget(400, 12, 4e-3),
            "flux": Budget(900, 24, 2e-3),
            "dinov3": Budget(100, 32, 2e-3),
            "letters": Budget(200, 32, 3e-3),
            "genuine": Budget(250, 32, 2e-3),
        },
    ),
)
SIZES = {size.name: size for size in _SIZES}


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding without a merge: a token a character."""
    pieces: dict[str, int] = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in (*world.CHARACTERS.lower(), '"'):
        pieces[character] = len(pieces)
        pieces[f"{character}</w>"] = len(pieces)
    return CLIPTokenizer(vocab=pieces, merges=[], model_max_length=CLIP_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: characters, quotes, and the words of a caption but the quoted one."""
    names = ("in", "on", "with", "a", *world.HUES, *world.GROUNDS, *world.DECORATIONS)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), ('"', -2.0), ('▁"', -2.0)]
    pieces += [(f"▁{name}", -2.0) for name in names]
    pieces += [(character, -8.0) for character in world.CHARACTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def clip_encoder(size: Size, vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=size.text,
            intermediate_size=2 * size.text,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def t5_encoder(size: Size, vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=size.text,
            d_kv=size.text // 4,
            d_ff=2 * size.text,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def autoencoder(size: Size) -> AutoencoderKL:
    """Two downsamplings: 64 x 64 pixels become 16 x 16 latents, 8 x 8 tokens of Flux."""
    levels = len(size.levels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=size.levels,
        layers_per_block=1,
        latent_channels=size.latents,
        norm_num_groups=8,
        sample_size=world.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def flux_pipeline(size: Size, vae: AutoencoderKL | None = None) -> FluxPipeline:
    """A FluxPipeline with guidance embedding, in the layout of FLUX.1-dev."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=flux_scheduler(),
        vae=vae or autoencoder(size),
        text_encoder=clip_encoder(size, len(clip)),
        tokenizer=clip,
        text_encoder_2=t5_encoder(size, len(t5)),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * size.latents,
            num_layers=size.double,
            num_single_layers=size.single,
            attention_head_dim=sum(size.axes),
            num_attention_heads=size.heads,
            joint_attention_dim=size.text,
            pooled_projection_dim=size.text,
            guidance_embeds=True,
            axes_dims_rope=size.axes,
        ),
    )


def dinov3(size: Size) -> DINOv3ViTModel:
    """One class token and one register beside the 64 patches."""
    width, layers = size.features
    return DINOv3ViTModel(
        DINOv3ViTConfig(
            image_size=world.SIZE,
            patch_size=PATCH,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_register_tokens=1,
            pos_embed_rescale=None,
        )
    )
