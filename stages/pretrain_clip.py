"""Train the miniature's CLIP on rendered streets: crops against captions, words against patches.

python flows/miniature.py --stage pretrain_clip
"""

import random
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from models.miniature import clip_lessons as lessons
from models.miniature import clip_network
from models.miniature import materials as m
from models.miniature.captions import LAYOUT_WORDS, SKY_WORDS, TIME_WORDS
from models.miniature.clip_lessons import PatchHeads, View
from models.miniature.renderer import render
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.pretrain_config import PretrainClipConfig
from stages.pretraining import pretrain
from stages.shards import item_seed

TEMPLATES = ("{}", "a photo of a {}", "a photo of {}", "a picture of a {}", "a close view of {}")

SCALES = (1.0, 1.0, 1.0, 1.5, 2.0)
"""By how much whole views are enlarged, one draw per update: networks on top may do so too."""


def run(config: StageConfig, *, out: Path, progress: Progress) -> Summary:
    """Train, and leave a folder that open_clip loads by `local-dir:`.

    Args:
        config: section `pretrain_clip`.
        out: the artifact; an interrupted attempt goes on from its `state/`.
        progress: told every step.

    Raises:
        TrainingError: the training diverged.
    """
    section = config.pretrain_clip
    torch.manual_seed(config.seed)
    tokenizer = clip_network.train_tokenizer(sentences())
    sizes = clip_network.sized_config(tokenizer)
    clip = clip_network.build_clip(sizes)
    vision = sizes["model_cfg"]["vision_cfg"]
    heads = PatchHeads(vision["width"], sizes["model_cfg"]["embed_dim"])
    both = nn.ModuleDict({"clip": clip, "heads": heads})
    both.train()
    lesson = partial(
        _losses,
        clip,
        heads,
        tokenizer,
        sizes["preprocess_cfg"],
        section,
        seed=config.seed,
        bf16=config.precision == "bf16",
    )
    found = pretrain(both, lesson, section, seed=config.seed, out=out, progress=progress)
    save_clip(clip, tokenizer, sizes, out)
    pictures = int(found["steps"]) * section.batch_size
    return Summary(
        text=f"{found['steps']:.0f} steps, {pictures} pictures, "
        f"crop accuracy {found['accuracy']:.3f}",
        numbers={"pictures": pictures, **found},
    )


def save_clip(
    clip: CLIP, tokenizer: PreTrainedTokenizerFast, sizes: dict[str, object], folder: Path
) -> None:
    """Write config, fp16 weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.half().contiguous() if value.is_floating_point() else value.contiguous()
        for name, value in clip.state_dict().items()
    }
    save_file(state, folder / clip_network.WEIGHTS_NAME)
    clip_network.write_config(folder, sizes)
    tokenizer.save_pretrained(folder)


def sentences() -> list[str]:
    """What the tokenizer learns its words from: the captions' vocabulary and some plain English."""
    words = [word for options in m.WORDS.values() for word in options]
    phrases = [
        phrase
        for table in (LAYOUT_WORDS, TIME_WORDS, SKY_WORDS)
        for options in table.values()
        for phrase in options
    ]
    captions = [render("web", seed=seed).caption for seed in range(400)]
    extra = (
        "a photo of a", "a close view of", "a picture of", "in the rain", "on a rainy day",
        "in falling snow", "in a snowfall", "after the rain", "on wet ground", "in fog",
        "in the mist", "covered in snow", "in winter snow", "in autumn",
        "lane roadway footpath walkway skyscraper shop front brick concrete stone wire wooden",
        "street lamp utility stoplight signal hedge foliage lawn bare soil clouds man woman child",
        "sedan hatchback suv taxi delivery pickup coach streetcar railway scooter moped parked",
        "white black grey silver red blue green yellow bright dark sunny morning evening",
    )  # fmt: skip
    return sorted(words) * 20 + sorted(phrases) * 5 + captions + list(extra) * 5


def views_of_step(
    config: PretrainClipConfig, step: int, *, seed: int
) -> tuple[list[View], list[View], random.Random]:
    """Whole views and crops of an update, and a source for its other draws."""
    whole, crops = [], []
    for index in range(config.batch_size):
        picture_seed = item_seed(seed, "clip", step, index)
        picture = render("web", seed=picture_seed)
        rng = random.Random(picture_seed)
        whole.append(lessons.whole_view(picture, rng))
        crops += lessons.crop_views(picture, rng, config.crops_per_picture)
    return whole, crops, random.Random(item_seed(seed, "clip words", step))


def _losses(
    clip: CLIP,
    heads: PatchHeads,
    tokenizer: PreTrainedTokenizerFast,
    preprocess: dict[str, object],
    config: PretrainClipConfig,
    step: int,
    *,
    seed: int,
    bf16: bool,
) -> dict[str, torch.Tensor]:
    whole, crops, rng = views_of_step(config, step, seed=seed)
    words = [rng.choice(TEMPLATES).format(rng.choice(m.WORDS[label])) for label in lessons.LABELS]
    texts = clip_network.tokenize(tokenizer, [view.caption for view in crops] + words)
    # 1. Text: the crops' captions and one wording of every word.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        embeddings = clip.encode_text(texts)
    embeddings = F.normalize(embeddings.float(), dim=-1)
    captions_BD, words_LD = embeddings[: len(crops)], embeddings[len(crops) :]

    # 2. Crops: against their captions as wholes, against words patch by patch.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        features = lessons.tower_features(clip, lessons.images_tensor(crops, preprocess))
        pooled_BD = clip.visual.attnpool(features[-1])
        patches = lessons.patch_embeddings(clip, heads, features)
    scale = clip.logit_scale.clamp(max=4.6).exp()
    pooled_BD = F.normalize(pooled_BD.float(), dim=-1)
    contrast, accuracy = lessons.contrastive_loss(pooled_BD, captions_BD, scale, crops)
    found_c, chosen_c = lessons.word_losses(patches, words_LD, lessons.crop_words(crops), heads)

    # 3. Whole views, as large as a segmenter may see them: words of windows.
    images = lessons.images_tensor(whole, preprocess)
    enlarged = rng.choice(SCALES)
    if enlarged > 1:
        images = F.interpolate(images, scale_factor=enlarged, mode="bilinear")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        features = lessons.tower_features(clip, images)
        patches = lessons.patch_embeddings(clip, heads, features)
    found_w, chosen_w = lessons.word_losses(patches, words_LD, lessons.window_words(whole), heads)
    total = contrast + config.word_weight * (found_c + chosen_c + 2 * (found_w + chosen_w))
    return {
        "total": total,
        "contrast": contrast,
        "accuracy": accuracy,
        "crops_found": found_c,
        "crops_chosen": chosen_c,
        "windows_found": found_w,
        "windows_chosen": chosen_w,
    }
