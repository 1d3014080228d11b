"""Train the student on source and painted pictures together; its average is the next teacher.

clouds --stage self_train --round 1 --recipe miniature
"""

from pathlib import Path

from models.checkpoints import describe_checkpoint, load_segmenter, save_segmenter
from models.ema import Ema
from models.segmenter import Segmenter
from stages.batches import Batches, Labelling, MixedBatches, SourceBatches
from stages.config import SelfTrainConfig, StageConfig
from stages.contracts import Progress, Summary
from stages.devices import choose_device
from stages.labels import LabelSpace, read_labelspace
from stages.objectives import SegmentationObjective, load_sources
from stages.online import OnlineTeacher
from stages.readers import Sample, load_painted
from stages.shards import item_seed, read_index
from stages.training import Trainer
from stages.trust import trusted
from stages.validation import segmenter_validation, told


def run(
    config: StageConfig,
    *,
    out: Path,
    progress: Progress,
    sources: Path,
    labelspace: Path,
    teacher: Path,
    pictures: Path | None = None,
    selection: Path | None = None,
    labels: Path | None = None,
    validation: Path | None = None,
    evidence: Path | None = None,
) -> Summary:
    """Train on `sources` and the painted `pictures` with their `labels`, from the `teacher` on.

    With `self_train.labels` "none" (the control) pictures and labels are not used: as many steps
    on the source alone. With `self_train.mode` "online" labels are made in training instead of
    being read (`stages/online.py`). `validation` sets choose the step, and the pseudo-labels' own
    confidences (`evidence`) weigh pictures and pixels, where that is asked for.

    Raises:
        ValueError: samples or pictures are missing or do not pair; the teacher, the labels and the
            label space have other classes.
        TrainingError: a loss that is not finite.
    """
    section = config.self_train
    device = choose_device(config)
    progress.note(device.reason)

    # 1. What to learn, and from what.
    space = read_labelspace(labelspace)
    origin = describe_checkpoint(teacher)
    _require_classes(origin["class_names"], space, whose=f"the teacher in {teacher}")
    samples = load_sources(sources)
    painted = _painted(section, space, pictures, labels, selection, evidence)
    seed = item_seed(config.seed, "self_train", origin["step"])

    # 2. The student, and the average that will teach the next round.
    student = _student(section, teacher, progress).to(device.device).train()
    ema = Ema(student, section.ema.decay, section.ema.every) if section.ema else None
    labelling = None
    if section.mode == "online" and painted:
        labelling = OnlineTeacher(config, student, ema, device=device)
        if labelling.refinement and labelling.refinement.refiner.untrained:
            progress.note("SAM has seeded random weights: its masks mean nothing")
    batches = _batches(section, samples, painted, seed=seed, labelling=labelling)
    chooser = segmenter_validation(section.validation, validation, student, ema=ema, device=device)

    # 3. Train.
    trainer = Trainer(
        student,
        groups=student.parameter_groups(section.optimiser.lr, section.optimiser.weight_decay),
        objective=SegmentationObjective(
            student,
            batches,
            steps=section.steps,
            device=device.device,
            workers=section.data_workers,
            painted_weight=section.painted_weight,
            weighted=section.weighting != "none",
            ignore_painted=section.unlabelled == "ignore",
        ),
        steps=section.steps,
        optimiser=section.optimiser,
        ema=ema,
        validation=chooser,
        device=device,
        seed=seed,
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
            student,
            label_space=space.name,
            step=origin["step"] + trainer.kept_step,
            ema=ema.state_dict() if ema else None,
            extra={"validation": chooser.to_json()} if chooser else None,
        )
    with_painted = _told_of(section, len(painted))
    kept, kept_numbers = told(chooser)
    return Summary(
        text=f"{section.steps} steps on {len(samples)} source samples{with_painted}, "
        f"loss {last['loss']:.3f}{kept}",
        numbers={
            "steps": section.steps,
            "samples": len(samples),
            "painted": len(painted),
            "loss": last["loss"],
            "trained_parameters": sum(p.numel() for p in trainer.parameters),
            **kept_numbers,
        },
    )


def _told_of(section: SelfTrainConfig, num_painted: int) -> str:
    if not num_painted:
        return ""
    online = ", made online" if section.mode == "online" else ""
    return f" and {num_painted} painted ({section.labels} labels{online})"


def _require_classes(names: list[str], space: LabelSpace, *, whose: str) -> None:
    if list(names) != list(space.names):
        differing = sorted(set(names) ^ set(space.names)) or ["their order"]
        raise ValueError(
            f"{whose} has {len(names)} classes, the label space {space.name!r} has "
            f"{space.num_classes}; they differ in {', '.join(differing)}. Train the source model "
            f"anew with this label space (clouds --stage train_source), or set data.labels back."
        )


def _painted(
    section: SelfTrainConfig,
    space: LabelSpace,
    pictures: Path | None,
    labels: Path | None,
    selection: Path | None,
    evidence: Path | None,
) -> list[Sample]:
    """The kept pictures with their labels (online: all, without labels); none for the control."""
    if section.labels == "none":
        return []
    if section.mode == "online" and pictures is not None:
        return load_painted(pictures, None)
    if pictures is None or labels is None:
        raise ValueError(
            f"self_train.labels={section.labels} needs pictures and their labels; run the stages "
            f"before it (clouds --until self_train), or train the control (self_train.labels=none)."
        )
    names = describe_checkpoint(labels)["class_names"]
    _require_classes(names, space, whose=f"the network that made the labels in {labels}")
    _require_known_ids(labels, space)
    samples = load_painted(pictures, labels, selection)
    return trusted(samples, evidence, section) if evidence is not None else samples


def _require_known_ids(labels: Path, space: LabelSpace) -> None:
    """Refuse label maps whose index counts train ids that the label space does not have."""
    for row in read_index(labels):
        counted = row.get("classes") or row.get("counts", {}).get("classes", {})
        unknown = sorted(int(key) for key in counted if int(key) >= space.num_classes)
        if unknown:
            raise ValueError(
                f"the label map of picture {row['id']} in {labels} holds train id {unknown[0]}, "
                f"but label space {space.name!r} has {space.num_classes} classes: it was made for "
                f"another label space. Run `clouds --from pseudo_label`."
            )


def _batches(
    section: SelfTrainConfig,
    samples: list[Sample],
    painted: list[Sample],
    *,
    seed: int,
    labelling: Labelling | None,
) -> Batches:
    if section.labels == "none":
        return SourceBatches(
            samples,
            batch_size=section.batch_size,
            augment=section.augment,
            seed=seed,
            rare_class_sampling=section.rare_class_sampling,
        )
    return MixedBatches(
        samples,
        painted,
        batch_size=section.batch_size,
        painted_share=section.painted_share,
        augment=section.augment,
        painted_augment=section.painted_augment,
        seed=seed,
        rare_class_sampling=section.rare_class_sampling,
        mixing=section.mixing == "classmix",
        labelling=labelling,
    )


def _student(section: SelfTrainConfig, teacher: Path, progress: Progress) -> Segmenter:
    which = section.start_from
    if which == "ema" and not (teacher / "ema.safetensors").is_file():
        progress.note("the teacher has no average: the student starts from its weights")
        which = "model"
    return load_segmenter(teacher, which=which)
