"""The miniature CLIP: open_clip's classes at a small size, with a small tokenizer.

A folder as open_clip's `local-dir:` wants it: `open_clip_config.json`,
`open_clip_model.safetensors`,
tokenizer files.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CONTEXT_LENGTH = 48

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 2, 1], "width": 24, "patch_size": None},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": 0,
            "hf_tokenizer_name": "miniature",
            "tokenizer_kwargs": {},
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
"""The shipped sizes; the vocabulary's size comes from the tokenizer."""

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"


def train_tokenizer(sentences: list[str], *, vocabulary: int = 768) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; its end token has the highest id, which open_clip pools by."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens(["<end>"])
    start, end = tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=CONTEXT_LENGTH,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, sentences: list[str]) -> torch.Tensor:
    """Token ids [N, context], as open_clip's HFTokenizer gives them."""
    return tokenizer(
        sentences,
        return_tensors="pt",
        max_length=CONTEXT_LENGTH,
        padding="max_length",
        truncation=True,
    ).input_ids


def sized_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The open_clip config with the tokenizer's vocabulary."""
    config = copy.deepcopy(CONFIG)
    config["model_cfg"]["text_cfg"]["vocab_size"] = len(tokenizer)
    return config


def build_clip(config: dict[str, Any]) -> CLIP:
    """open_clip's CLIP with fresh weights."""
    sizes = config["model_cfg"]
    return CLIP(sizes["embed_dim"], sizes["vision_cfg"], sizes["text_cfg"])


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `open_clip_config.json`."""
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
