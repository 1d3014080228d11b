"""Arithmetic of the networks: operations of convolutions, matrix products and attention.

Counted by torch's FlopCounterMode on the meta device where nothing need be computed. An operation
is a multiplication or an addition.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from segment_anything import sam_model_registry
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_segmenter
from models.config import SegmenterConfig
from models.refiner import Refiner


def flops_of(work: Callable[[], object]) -> float:
    """Operations of convolutions, matrix products and attention in a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def training_flops(
    config: SegmenterConfig, size: tuple[int, int], batch: int, names: tuple[str, ...]
) -> float:
    """Of one update, forward and backward, counted on the meta device."""
    segmenter = build_segmenter(config, class_names=names, device="meta").train()
    images = torch.empty(batch, 3, *size, device="meta")

    def update() -> None:
        output = segmenter(images)
        if output.pixel_logits_BKHW is not None:
            output.pixel_logits_BKHW.sum().backward()
        else:
            sum(part.sum() for pair in output.predictions for part in pair).backward()

    return flops_of(update)


def inference_flops(
    config: SegmenterConfig, size: tuple[int, int], names: tuple[str, ...]
) -> float:
    """Of one picture, counted on the meta device."""
    segmenter = build_segmenter(config, class_names=names, device="meta").eval()
    segmenter.requires_grad_(False)
    return flops_of(lambda: segmenter(torch.empty(1, 3, *size, device="meta")))


def painting_flops(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    size: tuple[int, int],
    steps: int,
    guidance: float,
) -> float:
    """Of one picture: UNet in every step (twice with guidance), then the decoder."""
    unet.requires_grad_(False)
    vae.requires_grad_(False)
    device, dtype = unet.device, unet.dtype
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    small = size[0] // factor, size[1] // factor
    latents = torch.zeros(1, unet.config.in_channels, *small, device=device, dtype=dtype)
    text = torch.zeros(1, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)
    time_step = torch.zeros(1, device=device)
    step = flops_of(lambda: unet(latents, time_step, encoder_hidden_states=text))
    decoded = flops_of(lambda: vae.decode(latents))
    return steps * (2 if guidance > 1 else 1) * step + decoded


def encoder_flops(refiner: Refiner) -> float:
    """Of SAM's image encoder for one picture."""
    encoder, side = refiner.sam.image_encoder, refiner.image_size
    image = torch.zeros(1, 3, side, side, device=encoder.pos_embed.device)
    return flops_of(lambda: encoder(image))


def official_flops(model: str) -> float:
    """Of an official SAM's image encoder for one picture, counted on the meta device."""
    with torch.device("meta"):
        return encoder_flops(Refiner(sam_model_registry[model]()))
