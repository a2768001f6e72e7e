"""A LLaVA of a few thousand random weights, with tokenizer and processor: a folder that any server
of transformers' models takes. What it says means nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

SIDE, PATCH = 28, 14
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}assistant:"
)


def save_tiny_vlm(folder: Path) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    letters_only = Tokenizer(models.BPE(vocabulary, []))
    letters_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters_only, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    shown = LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    LlavaProcessor(
        shown, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
             "num_hidden_layers": 2}  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                image_size=SIDE, patch_size=PATCH, projection_dim=16, **sizes
            ),
            text_config=LlamaConfig(
                vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=8192,
                bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes,
            ),
            image_token_index=3,
            image_seq_length=(SIDE // PATCH) ** 2,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder
