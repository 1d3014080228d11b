"""The miniature's painter: a small Stable Diffusion of diffusers' and transformers' own classes.

Its latents are the principal components of the pictures' 8x8 patches, found in closed form: at
this size they keep more of a picture than a convolutional encoder learns in an hour.
"""

# B pictures, C latent channels, H W height and width, F G height and width of the latents,
# P values of a patch

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PATCH_PX = 8
"""Side of a patch: the latents' factor."""
LATENT_CHANNELS = 16
CONTEXT_LENGTH = 48
"""Tokens of a prompt."""
VOCABULARY = 1536
"""Tokens known."""
NUM_COMMON_MERGES = 2000
"""Merges of CLIP's vocabulary whose words the tokenizer also learns from: common English."""
TEXT_WIDTH = 128
UNET_CHANNELS = (96, 128)
DECODER_WIDTH = 32
LATENT_SCALE = 2.0
"""The autoencoder's own latents times this have unit variance; AutoencoderTiny squeezes what is
beyond 3."""


@dataclass(frozen=True, kw_only=True)
class PatchBasis:
    """Principal components of patches, scaled so that latents have unit variance on average.

    Components keep the fourth root of their variance: between plain components, of which the first
    drowns the others, and white ones, by which a faint texture counts as much as light and dark.
    """

    mean_P: np.ndarray
    """float32 mean patch, values in -1..1, in the order (row, column, colour)."""
    analysis_PC: np.ndarray
    """float32: latents = (patch - mean) @ analysis."""
    synthesis_CP: np.ndarray
    """float32: patch = latents @ synthesis + mean."""

    @classmethod
    def of(cls, images_BHW3: np.ndarray, channels: int = LATENT_CHANNELS) -> PatchBasis:
        """The basis of uint8 pictures."""
        patches = patches_of(images_BHW3).reshape(-1, PATCH_PX * PATCH_PX * 3)
        mean_P = patches.mean(0)
        variances, vectors = np.linalg.eigh(np.cov((patches - mean_P).T))
        variances, vectors = variances[::-1][:channels], vectors[:, ::-1][:, :channels]
        # The sign of an eigenvector is the library's whim.
        vectors = vectors * np.where(vectors.sum(0) < 0, -1.0, 1.0)
        scales = variances**-0.25 / np.sqrt(np.sqrt(variances).mean())
        return cls(
            mean_P=mean_P.astype(np.float32),
            analysis_PC=(vectors * scales).astype(np.float32),
            synthesis_CP=(vectors / scales).T.astype(np.float32),
        )

    def encode(self, images_BHW3: np.ndarray) -> np.ndarray:
        """Latents [B, C, F, G] float32 of uint8 pictures."""
        return ((patches_of(images_BHW3) - self.mean_P) @ self.analysis_PC).transpose(0, 3, 1, 2)

    def decode(self, latents_BCFG: np.ndarray) -> np.ndarray:
        """The nearest pictures that the basis can say, uint8 [B, H, W, 3]."""
        patches = latents_BCFG.transpose(0, 2, 3, 1) @ self.synthesis_CP + self.mean_P
        count, rows, columns, _ = patches.shape
        values = patches.reshape(count, rows, columns, PATCH_PX, PATCH_PX, 3)
        values = values.transpose(0, 1, 3, 2, 4, 5)
        values = values.reshape(count, rows * PATCH_PX, columns * PATCH_PX, 3)
        return ((values.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def patches_of(images_BHW3: np.ndarray) -> np.ndarray:
    """uint8 pictures as patches [B, F, G, P] float32 with values in -1..1."""
    count, height, width, _ = images_BHW3.shape
    rows, columns = height // PATCH_PX, width // PATCH_PX
    values = images_BHW3.reshape(count, rows, PATCH_PX, columns, PATCH_PX, 3)
    values = values.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows, columns, -1)
    return values.astype(np.float32) / 127.5 - 1


def build_autoencoder(basis: PatchBasis) -> AutoencoderTiny:
    """An autoencoder whose encoder is the basis itself and whose decoder has fresh weights.

    AutoencoderTiny without blocks is a row of convolutions without activations. The first three
    strided ones gather 2x2, 4x4 and 8x8 pixels without loss, the third applies the basis.
    """
    pixels = PATCH_PX * PATCH_PX * 3
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(pixels // 4,) * 4,
        num_encoder_blocks=(0,) * 4,
        decoder_block_out_channels=(DECODER_WIDTH,) * 4,
        num_decoder_blocks=(3, 2, 1, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=LATENT_SCALE,
    )
    # The encoder is given values in 0..1: patch = 2 value - 1.
    analysis_PC = torch.from_numpy(basis.analysis_PC) / LATENT_SCALE
    offset_C = -(1 + torch.from_numpy(basis.mean_P)) @ analysis_PC
    colours, to_2px, to_4px, to_8px, last = autoencoder.encoder.layers
    with torch.no_grad():
        for layer in (colours, to_2px, to_4px, to_8px, last):
            layer.weight.zero_()
        colours.weight[:3, :, 1, 1] = torch.eye(3)
        colours.bias.zero_()
        _gather(to_2px.weight, torch.eye(12))
        _gather(to_4px.weight, torch.eye(48))
        _gather(to_8px.weight, _regrouped(2 * analysis_PC).T)
        last.weight[:, :LATENT_CHANNELS, 1, 1] = torch.eye(LATENT_CHANNELS)
        last.bias.copy_(offset_C)
    return autoencoder


def _gather(kernel: torch.Tensor, matrix_OI: torch.Tensor) -> None:
    """Let a strided 3x3 kernel apply a matrix to the channels of 2x2 neighbours.

    The matrix's columns are ordered (row, column, channel). Output i sees inputs 2i - 1 to 2i + 1,
    of which it uses the last two.
    """
    outputs, inputs = matrix_OI.shape
    blocks = matrix_OI.reshape(outputs, 2, 2, inputs // 4).permute(0, 3, 1, 2)
    kernel[:outputs, : inputs // 4, 1:, 1:] = blocks


def _regrouped(matrix_PC: torch.Tensor) -> torch.Tensor:
    """Rows of a basis from the order (row, column, colour) to that of three gatherings in turn."""
    split = matrix_PC.reshape(2, 2, 2, 2, 2, 2, 3, -1)  # rows by 4, 2, 1; columns by 4, 2, 1
    return split.permute(0, 3, 1, 4, 2, 5, 6, 7).reshape(matrix_PC.shape)


def assemble(
    *,
    autoencoder: AutoencoderTiny,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    """The pipeline as it ships."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_tokenizer(sentences: list[str], vocabulary: int = VOCABULARY) -> CLIPTokenizer:
    """CLIP's tokenizer with merges learned from sentences, and from common English words.

    Letters that end a word are named to the trainer as special tokens: left to itself it numbers
    them in the order of a hash table, and no two runs are the same.
    """
    merges = list(SimpleTokenizer().bpe_ranks)[:NUM_COMMON_MERGES]
    words = [left + right for left, right in merges]
    common = [word.removesuffix("</w>") for word in words if word.endswith("</w>")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = ["<|startoftext|>", "<|endoftext|>", *letters, *(x + "</w>" for x in letters)]
    letters_only = _tokenizer({symbol: number for number, symbol in enumerate(symbols)}, [])
    learned = letters_only.train_new_from_iterator(
        sentences + common, vocabulary, new_special_tokens=symbols[2:]
    )
    model = json.loads(learned.backend_tokenizer.to_str())["model"]
    return _tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])


def _tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text tower with fresh weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            projection_dim=TEXT_WIDTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """The denoiser with fresh weights, for latents of 8x16."""
    return UNet2DConditionModel(
        sample_size=(8, 16),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=UNET_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The times of the training, and the solver that paints."""
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        lambda_min_clipped=-5.1,
        steps_offset=1,
    )
