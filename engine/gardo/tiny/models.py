"""The tiny models of the built-in world: real diffusers and transformers classes, made small.

`flux_pipeline` and `sd3_pipeline` return complete pipelines (transformer, VAE, text encoders,
tokenizers, scheduler) which `save_pretrained` writes in the layout of FLUX.1-dev and
stable-diffusion-3.5; weights are random until make.py trains them. Callers seed torch beforehand.
"""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from gardo.settings import BUILTIN
from gardo.tiny import world

WEIGHTS = BUILTIN
TEXT_WIDTH = 32
TEXT_TOKENS = 8
_END = "</w>"


def _words() -> list[str]:
    plural = [f"{shape}s" for shape in world.SHAPES]
    return [*world.COUNTS, *world.COLOURS, *world.SHAPES, *plural]


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding in which each word of the world is one token; others fall to letters.

    A word's merges are added after those of the words before it, from what these leave of it.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces: dict[str, int] = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in letters:
        pieces.setdefault(letter, len(pieces))
        pieces.setdefault(letter + _END, len(pieces))
    merges: list[tuple[str, str]] = []
    for word in _words():
        left = [*word[:-1], word[-1] + _END]
        for merge in merges:
            left = _merged(left, merge)
        while len(left) > 1:
            merges.append((left[0], left[1]))
            left = _merged(left, merges[-1])
            pieces.setdefault(left[0], len(pieces))
    return CLIPTokenizer(vocab=pieces, merges=merges, model_max_length=TEXT_TOKENS)


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with each occurrence of the pair made one."""
    whole: list[str] = []
    for piece in pieces:
        if whole and (whole[-1], piece) == pair:
            whole[-1] += piece
        else:
            whole.append(piece)
    return whole


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: the words of the world, then letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in _words()]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def _clip_config(vocabulary: int, **more: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **more,
    )


def _t5_encoder(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def autoencoder() -> AutoencoderKL:
    """One downsampling, 4 latent channels: 32 x 32 pixels become 16 x 16 x 4."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        shift=3.0,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def flux_pipeline(vae: AutoencoderKL | None = None) -> FluxPipeline:
    """A FluxPipeline of about 1.1 M parameters, with guidance embedding.

    2 double and 2 single blocks, 6 heads of 16.
    """
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=flux_scheduler(),
        vae=vae or autoencoder(),
        text_encoder=CLIPTextModel(_clip_config(len(clip))),
        tokenizer=clip,
        text_encoder_2=_t5_encoder(len(t5)),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=6,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def sd3_pipeline(vae: AutoencoderKL | None = None) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline in the layout of SD3.5 Medium.

    QK RMS norms, dual attention in the first block.
    """
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    config = _clip_config(len(clip), projection_dim=TEXT_WIDTH)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=24,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae or autoencoder(),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=clip,
        text_encoder_3=_t5_encoder_wide(len(t5)),
        tokenizer_3=t5,
    )


def _t5_encoder_wide(vocabulary: int) -> T5EncoderModel:
    config = _t5_encoder(vocabulary).config
    config.d_model = 2 * TEXT_WIDTH
    return T5EncoderModel(config)


def dinov3() -> DINOv3ViTModel:
    """Patches of 4 pixels, 3 layers of width 48, one class token and one register."""
    return DINOv3ViTModel(
        DINOv3ViTConfig(
            image_size=world.SIZE,
            patch_size=4,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_register_tokens=1,
            pos_embed_rescale=None,
        )
    )
