"""Train the segmenter on the labelled sources: the source model, and teacher of the first round.

clouds --stage train_source --recipe camvid
"""

from pathlib import Path

from models.build import build_segmenter
from models.checkpoints import save_segmenter
from models.config import SegmenterConfig
from models.ema import Ema
from stages.batches import SourceBatches
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.devices import choose_device
from stages.labels import read_labelspace
from stages.objectives import SegmentationObjective, load_sources
from stages.shards import item_seed
from stages.training import Trainer
from stages.validation import segmenter_validation, told


def run(
    config: StageConfig,
    *,
    out: Path,
    progress: Progress,
    sources: Path,
    labelspace: Path,
    validation: Path | None = None,
) -> Summary:
    """Train on `sources` and leave a checkpoint in `out`; `validation` sets choose the step.

    Raises:
        ValueError: no labelled samples; a configuration that does not fit.
        TrainingError: a loss that is not finite.
    """
    section = config.train_source
    device = choose_device(config)
    progress.note(device.reason)

    # 1. What to learn, and from what.
    space = read_labelspace(labelspace)
    samples = load_sources(sources)
    batches = SourceBatches(
        samples,
        batch_size=section.batch_size,
        augment=section.augment,
        seed=item_seed(config.seed, "train_source"),
        rare_class_sampling=section.rare_class_sampling,
    )

    # 2. The segmenter.
    segmenter = build_segmenter(
        seeded(config.segmenter, config.seed), class_names=space.names, device=device.device
    ).train()
    ema = Ema(segmenter, section.ema.decay, section.ema.every) if section.ema else None

    chooser = segmenter_validation(
        section.validation, validation, segmenter, ema=ema, device=device
    )

    # 3. Train.
    trainer = Trainer(
        segmenter,
        groups=segmenter.parameter_groups(section.optimiser.lr, section.optimiser.weight_decay),
        objective=SegmentationObjective(
            segmenter,
            batches,
            steps=section.steps,
            device=device.device,
            workers=section.data_workers,
        ),
        steps=section.steps,
        optimiser=section.optimiser,
        ema=ema,
        validation=chooser,
        device=device,
        seed=item_seed(config.seed, "train_source"),
        out=out,
        batch_size=section.batch_size,
        checkpoint_every=section.checkpoint_every,
        log_every=section.log_every,
    )
    last = trainer.run(progress)

    # 4. Store.
    if trainer.is_main:
        save_segmenter(
            out,
            segmenter,
            label_space=space.name,
            step=trainer.kept_step,
            ema=ema.state_dict() if ema else None,
            extra={"validation": chooser.to_json()} if chooser else None,
        )
    kept, kept_numbers = told(chooser)
    return Summary(
        text=f"{section.steps} steps on {len(samples)} samples, loss {last['loss']:.3f}{kept}",
        numbers={
            "steps": section.steps,
            "samples": len(samples),
            "loss": last["loss"],
            "trained_parameters": sum(p.numel() for p in trainer.parameters),
            **kept_numbers,
        },
    )


def seeded(config: SegmenterConfig, seed: int) -> SegmenterConfig:
    """The config with the recipe's seed added to the seeds of its random weights."""
    encoder = config.encoder.model_copy(update={"seed": config.encoder.seed + seed})
    decoder = config.decoder.model_copy(update={"seed": config.decoder.seed + seed})
    return config.model_copy(update={"encoder": encoder, "decoder": decoder})
