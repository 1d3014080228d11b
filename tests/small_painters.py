"""A tiny Stable Diffusion with a safety checker of the libraries' own classes, for tests."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from models.painter import save_random_painter

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def save_checked_painter(folder: Path, *, like: Path | None = None) -> Path:
    """Save a painter whose checker flags what looks like a picture; None: whatever it is shown.

    Cosines are at most 1 and at least -1; the thresholds stand beyond, but for the one concept
    that is the picture itself.
    """
    save_random_painter(folder, seed=0)
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=8))
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    with torch.no_grad():
        for parameter in checker.vision_model.parameters():
            if parameter.ndim > 1:  # as initialised, all pictures would look alike
                parameter.mul_(20)
        checker.special_care_embeds_weights.fill_(2.0)
        checker.concept_embeds_weights.fill_(-2.0 if like is None else 2.0)
        if like is not None:
            with Image.open(like) as picture:
                pixels = processor(picture, return_tensors="pt").pixel_values
            shown = checker.visual_projection(checker.vision_model(pixels)[1])
            checker.concept_embeds[5] = shown[0]
            checker.concept_embeds_weights[5] = 0.99
    small = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    parts = small.components | {"safety_checker": checker, "feature_extractor": processor}
    StableDiffusionPipeline(**parts, requires_safety_checker=True).save_pretrained(folder)
    return folder
