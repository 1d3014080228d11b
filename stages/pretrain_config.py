"""Configuration of the miniature's pre-trainings. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from stages.run_config import RunConfig
from stages.section import NOT_IN_KEY, Section


class PretrainSection(Section):
    """What every pre-training is told."""

    steps: int = Field(gt=0)
    """Updates of the whole schedule."""
    stop_after: int | None = Field(None, gt=0)
    """End after so many updates of the schedule, with their average; None: after all."""
    lr: float = Field(gt=0)
    """Learning rate of AdamW after the warm-up."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay of matrices and kernels."""
    warmup_steps: int = Field(100, ge=0)
    """Linear warm-up."""
    decay_share: float = Field(0.4, gt=0, le=1)
    """Last share of the steps, over which the learning rate falls linearly to nought."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    ema_decay: float = Field(0.998, ge=0, lt=1)
    """Average of the weights that is shipped."""
    checkpoint_every: Annotated[int, NOT_IN_KEY] = Field(100, gt=0)
    """Steps between resumable checkpoints."""
    log_every: Annotated[int, NOT_IN_KEY] = Field(25, gt=0)
    """Steps between lines of `logs/metrics.jsonl`."""


class PretrainSamConfig(PretrainSection):
    """Train the miniature SAM on rendered web pictures."""

    steps: int = Field(6_000, gt=0)
    """Updates."""
    lr: float = Field(1.0e-3, gt=0)
    """Learning rate of AdamW after the warm-up."""
    warmup_steps: int = Field(60, ge=0)
    """Linear warm-up."""
    decay_share: float = Field(0.6, gt=0, le=1)
    """Last share of the steps, over which the learning rate falls linearly to nought."""
    batch_size: int = Field(8, gt=0)
    """Pictures per update."""
    num_prompts: int = Field(6, gt=0)
    """Regions asked for per picture."""
    kinds: int = Field(2, gt=0)
    """Prompt types per update; the pictures are shared out among them, and prompts of one type are
    decoded together."""
    padded: float = Field(0.1, ge=0, le=1)
    """Share of the updates that see the padding below the pictures, as `SamPredictor` will; the
    others leave it out, for half the work."""
    start: str | None = None
    """Folder of a SAM to begin with, or builtin:sam; tensors of other shapes begin fresh."""
    affinity_weight: float = Field(2.0, ge=0)
    """Weight of the dense lesson in boundaries (`AffinityHead`)."""
    second_round: float = Field(0.15, ge=0, le=1)
    """Share of the updates with a second decoding from the first one's mask and one more point."""


class PretrainClipConfig(PretrainSection):
    """Train the miniature CLIP on rendered web pictures with captions."""

    steps: int = Field(2_400, gt=0)
    """Updates."""
    lr: float = Field(1.2e-3, gt=0)
    """Learning rate of AdamW after the warm-up."""
    batch_size: int = Field(24, gt=0)
    """Pictures per update; each gives crops, and a whole view for words in windows."""
    crops_per_picture: int = Field(2, gt=0)
    """Crops with captions per picture, for the contrastive loss."""
    word_weight: float = Field(1.0, ge=0)
    """Weight of the losses between words and patches."""


class PretrainWriterConfig(PretrainSection):
    """Train the miniature's writer on requests and sentences put together by rule."""

    start: str | None = None
    """Folder of a writer to begin with, tokenizer included, or builtin:writer; None: from fresh
    weights."""
    steps: int = Field(2_400, gt=0)
    """Updates."""
    lr: float = Field(2.5e-3, gt=0)
    """Learning rate of AdamW after the warm-up."""
    decay_share: float = Field(0.6, gt=0, le=1)
    """Last share of the steps, over which the learning rate falls linearly to nought."""
    batch_size: int = Field(32, gt=0)
    """Sentences per update."""


class PainterDecoderConfig(PretrainSection):
    """Train the decoder of the painter's latents."""

    steps: int = Field(4_000, gt=0)
    """Updates."""
    lr: float = Field(2.0e-3, gt=0)
    """Learning rate of AdamW after the warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of kernels."""
    warmup_steps: int = Field(50, ge=0)
    """Linear warm-up."""
    checkpoint_every: Annotated[int, NOT_IN_KEY] = Field(1_000, gt=0)
    """Steps between resumable checkpoints."""
    batch_size: int = Field(16, gt=0)
    """Cuts of 32x64 pixels per update."""
    noise: float = Field(0.15, ge=0)
    """Largest standard deviation of noise on latents, so that small mistakes of the denoiser are
    forgiven."""
    edge_weight: float = Field(0.25, ge=0)
    """Weight of the error in differences of neighbouring pixels."""


class PretrainPainterConfig(PretrainSection):
    """Train the miniature's painter on rendered web pictures and sentences about them."""

    start: str | None = None
    """Folder of a painter to begin with, whose autoencoder and tokenizer are kept, or
    builtin:painter; None: from fresh weights."""
    steps: int = Field(4_200, gt=0)
    """Updates of the denoiser and its text tower."""
    lr: float = Field(1.0e-3, gt=0)
    """Learning rate of AdamW after the warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices and kernels."""
    warmup_steps: int = Field(150, ge=0)
    """Linear warm-up."""
    decay_share: float = Field(0.3, gt=0, le=1)
    """Last share of the steps, over which the learning rate falls linearly to nought."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Average of the weights that is shipped."""
    checkpoint_every: Annotated[int, NOT_IN_KEY] = Field(150, gt=0)
    """Steps between resumable checkpoints."""
    num_pictures: int = Field(24_000, gt=0)
    """Pictures rendered once; each is seen as it is and mirrored, with new sentences every time."""
    batch_size: int = Field(64, gt=0)
    """Pictures per update."""
    silent_share: float = Field(0.1, ge=0, le=1)
    """Share of the pictures that come with an empty sentence, for guidance."""
    decoder: PainterDecoderConfig = PainterDecoderConfig()
    """Training of the decoder, before that of the denoiser."""


class ProbeConfig(Section):
    """Train a light head by which networks are judged."""

    head_steps: int = Field(250, gt=0)
    """Updates of a head (and of the tower, where it learns from scratch)."""
    batch_size: int = Field(16, gt=0)
    """Pictures per update."""
    lr: float = Field(2e-3, gt=0)
    """Learning rate of heads and towers."""


class MeasureMiniatureConfig(ProbeConfig):
    """Measure the miniature's CLIP and SAM on web pictures that no training saw."""

    num_sam_pictures: int = Field(60, gt=0)
    """Pictures per style for SAM."""
    num_prompts: int = Field(6, gt=0)
    """Regions asked for per picture and prompt type."""
    num_source: int = Field(400, gt=0)
    """Labelled source pictures on which heads learn."""
    num_web_val: int = Field(120, gt=0)
    """Web pictures on which heads are judged."""
    num_seeds: int = Field(1, gt=0)
    """Heads trained per case."""
    more_cases: bool = False
    """Beside the two cases of the gate (frozen, from scratch): random frozen and fine-tuned."""
    mask_gain: float = 0.15
    """Least gain of masks over mask prompts, in IoU."""


class MeasureWriterConfig(Section):
    """Have the miniature's writer answer a plan, and judge every first reply."""

    num_prompts: int = Field(1_000, gt=0)
    """Requests per label space."""
    batch_size: int = Field(50, gt=0)
    """Requests at once."""
    max_new_tokens: int = Field(96, gt=0)
    """Longest reply."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature, as the recipe `miniature` has it."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus sampling, as the recipe `miniature` has it."""
    min_share: float = Field(0.95, ge=0, le=1)
    """Least share of first replies that are valid and distinct, for the miniature's classes."""


class MeasurePainterConfig(ProbeConfig):
    """Have the painter paint captions of web pictures that no training saw, and judge what a
    segmenter finds in the pictures."""

    clip: str = "builtin:clip"
    """Tower of the judging segmenter."""
    head_steps: int = Field(600, gt=0)
    """Updates of the judge's head."""
    num_train: int = Field(1_000, gt=0)
    """Labelled web pictures from which the judge learns."""
    num_prompts: int = Field(192, gt=1)
    """Captions to paint, of rendered pictures that serve for comparison."""
    paint_steps: int = Field(12, gt=0)
    """Denoising steps."""
    guidance: float = Field(3.0, ge=0)
    """Classifier-free guidance scale."""
    paint_batch_size: int = Field(32, gt=0)
    """Pictures painted at once."""
    share: float = Field(0.4, gt=0, le=1)
    """Gate: least part of rendered pictures' informedness that painted ones reach."""
    variety: float = Field(0.7, gt=0)
    """Gate: least part of rendered pictures' mean distance that painted ones keep."""
    psnr: float = 25.0
    """Gate: least PSNR of the autoencoder, dB."""


class PretrainRecipe(Section):
    """The miniature's pre-trainings, as `flows/miniature.py` runs them."""

    name: str = "pretraining"
    """Name of the recipe."""
    seed: int = Field(0, ge=0)
    """Seed of weights, pictures, prompts and heads."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast of the forward passes."""
    pretrain_clip: PretrainClipConfig = PretrainClipConfig()
    pretrain_sam: PretrainSamConfig = PretrainSamConfig()
    pretrain_writer: PretrainWriterConfig = PretrainWriterConfig()
    pretrain_painter: PretrainPainterConfig = PretrainPainterConfig()
    measure_miniature: MeasureMiniatureConfig = MeasureMiniatureConfig()
    measure_painter: MeasurePainterConfig = MeasurePainterConfig()
    measure_writer: MeasureWriterConfig = MeasureWriterConfig()
    run: Annotated[RunConfig, NOT_IN_KEY] = RunConfig()
