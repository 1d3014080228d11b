"""What every stage promises: its name, version, needs, and what it leaves on disk. No torch here.

A stage is a verb: a module `stages/<name>.py` with

    def run(config: StageConfig, *, out: Path, progress: Progress, <role>: Path, ...) -> Summary

It gets folders (one keyword argument per `Need.role`), writes one folder (`out`, which may hold
the finished shards of an interrupted run) and returns a small summary. It knows no Prefect, no
store, no other stage. Files under `logs/`, and `roots.json`, are not part of an artifact's digest
(times, metrics and absolute paths live there); a stage's scratch state for resuming lives under
`state/`: it is no output, and goes once the artifact is in its place.

What the stages leave (paths relative to the artifact; a *part* is a top folder that others can
need alone):

`render_world`  `source/` (layout gta5), `targets/<name>/ web_val/ web/` (layout cityscapes): data
                sets of the miniature; `web/captions.jsonl`.
`prepare`       parts `labelspace/labelspace.json`; `sources/ targets/ validation/ unlabelled/`,
                each with `<dataset>.jsonl` (one sample a line: id "dataset/stem", image, label or
                null (paths relative to the data set's root), height, width, image_digest,
                label_digest, classes {train id: pixels}), `<dataset>.json` (layout, split,
                label_kind, label_map with its ids, num_samples, class_pixels, refused with why,
                also_in_sources) and `roots.json` (data set -> absolute root; not digested).
`train_source`  `model.safetensors checkpoint.json [ema.safetensors]` (of the step that validated
                best, where there is validation), `logs/metrics.jsonl` (one JSON a line with "step"
                and floats; judgements have "step" and "miou").
`write_prompts` `prompts.jsonl`: id, text, attributes, classes (asked for; of the bank's: named),
                model ("bank" for shipped ones), seed, untrained; `statistics.json` (replies asked,
                valid, refused by reason; from_bank; attributes; classes asked, named, weight).
`synthesize`    shards; files `<picture id>.png|jpg` ("/" in an id becomes "+"), which carry how
                they were made; index rows: id, file, prompt_id, prompt, seed, model, steps,
                guidance, negative_prompt, scheduler, untrained, [collected], [spare: painted for
                want of a better one], [batch_size where it was cut for want of memory], [tiled],
                [safety_checker: true where it was on], [flagged: true where it made it black],
                [truth_file: `<id>.truth.png` with its true train ids, where the collected data set
                has `truth`; only ever compared with].
`pseudo_label`  shards; files `<id>.label.png` (uint8 train ids, 255 none) and
                `<id>.confidence.png` (uint8, 0..255 = 0..1); index rows: id, label, confidence,
                mean_confidence, classes {train id: pixels}, [truth: counts], [batch_size where it
                was cut for want of memory]; `statistics.json` ([truth]: see `stages/truth.py`);
                `checkpoint.json` (the teacher's, so that class names travel with the labels).
`select`        `selection.jsonl`: id, kept, scores {}, reasons [], [twin], [replaces: the dropped
                picture that a spare one stands for]; `statistics.json`.
`refine`        shards; files `<id>.label.png`; index rows: id, label, counts, [truth], [batch_size
                as above]; `statistics.json` (num_pictures, num_fallback, components, mean_iou,
                untrained, [accepted, trusted, automatic], [truth: before, after], classes {train
                id: pixels before / after / kept / changed / dropped / gained, components});
                `checkpoint.json`.
`self_train`    as `train_source`; `model.safetensors` student, `ema.safetensors` EMA teacher.
`evaluate`      `results.json`: {"protocol": {"name", ...}, "classes": [...], "sets": {dataset:
                {"confusion": [[...]] (row truth), "iou": [...], "miou", "mean_accuracy",
                "pixel_accuracy", "num_images", "label_map", "layout", "split",
                [miou_by_classes {"19", "16", "13"}, of Cityscapes' classes],
                [conditions {"night": as a set}, miou_mean_of_conditions, of ACDC]}},
                "miou_mean", [training_domain, rpd]}
                (fractions; null where a class does not count); of a few samples per set
                `predictions/<dataset>/<stem>.png` (train ids), `<stem>.truth.png`,
                `<stem>.image.jpg`, `predictions/index.jsonl` (dataset, id, file, truth_file,
                image_file).
`report`        `report.html`, `results.json`.

A shard is a folder `shard-00000` of at most 1000 items with its own `index.jsonl` and `shard.json`
(`stages/shards.py` writes and reads them).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from stages.layouts import WORLD_PREFIX, dataset_root, watched

VOLATILE = ("logs/", "roots.json")
"""Outputs under these folders, or with these file names, do not count in an artifact's digest."""

SHARD_ITEMS_MAX = 1000


class Progress(Protocol):
    """What a stage tells while it works. Calls are cheap; the receiver decides what to show."""

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        """Announce `total` units of work, `done` of them found finished from an earlier attempt."""

    def advance(self, count: int = 1, **metrics: float) -> None:
        """Report `count` more units done (fewer, if work was lost), and the newest metrics."""

    def note(self, text: str) -> None:
        """Say one line worth keeping in the log."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished stage tells: one line for people, a few numbers for tables."""

    text: str
    """For example "240 pictures, 3 shards"; no path, no duration: the engine adds them."""
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    """Most resident memory of any other process that worked for the stage; 0: there was none, or it
    did not tell."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """One input of a stage: which stage makes it, and under which keyword `run` receives its
    folder."""

    role: str
    stage: str
    part: str | None = None
    """Top folder of the artifact that is needed; None: all of it. Only this part's digest
    counts."""
    round_offset: int = 0
    """0: the same round, -1: the round before."""
    at_round_0: str | None = None
    """Stage that stands in where the round would be 0 (the source model)."""
    when: Callable[[Any, int], bool] = lambda recipe, round_: True
    """Whether the need exists, given the resolved recipe and the round."""


@dataclass(frozen=True, kw_only=True)
class External:
    """Files outside the store that a stage reads."""

    base: Path
    """Names are relative to this folder; it counts in the key itself when files are listed."""
    paths: tuple[Path, ...]
    by: Literal["listing", "content"] = "content"
    """listing: names, sizes and times count (large data); content: the bytes count."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A stage as the engine sees it, without importing the stage."""

    name: str
    version: int
    """Raised by hand when the meaning of the output changes."""
    verb: str
    """Dotted name of the module with `run`."""
    does: str
    """One sentence for `--help`, plan and report."""
    sections: tuple[str, ...] = ()
    """Config sections that `run` may read; all of them count in the key."""
    needs: tuple[Need, ...] = ()
    helper: bool = False
    """What it makes is only for other stages: where none of them needs it, it is not run."""
    takes_everything: bool = False
    """`run` receives `artifacts: Mapping[instance name, Path]` of all other instances of the
    recipe."""
    rounds: Callable[[Any], bool] = lambda recipe: False
    """Whether the stage runs once per round (else once)."""
    first_round: int = 1
    legs: bool = False
    """Whether recipes with legs compare this stage leg by leg."""
    also_reads: Callable[[Any], tuple[str, ...]] = lambda recipe: ()
    """Sections that `run` may read besides, under this recipe."""
    also_loads: Callable[[Any], tuple[str, ...]] = lambda recipe: ()
    """Fields as in `weights` that count besides, under this recipe."""
    numeric: bool = False
    """Whether `precision` counts in the key."""
    weights: tuple[str, ...] = ()
    """Dotted config fields that name weights (a hub id, folder, file or builtin:NAME); identity
    counts in the key."""
    externals: Callable[[Any], Mapping[str, "External"]] = lambda recipe: {}
    """What the stage reads from outside the store; its state counts in the key."""
    units: Callable[[Any], int | None] = lambda recipe: None
    """Units of work that the recipe asks for (steps, pictures), for estimates."""
    exists: Callable[[Any], bool] = lambda recipe: True
    """Whether the recipe has this stage at all."""
    shared: Literal["", "updates", "shards"] = ""
    """What `run.processes` processes of a machine share, a GPU each: every update of a training, or
    whole shards; empty: one process does it all."""
    saves_memory: str = ""
    """What to change where memory does not suffice, for the error."""

    def sections_of(self, recipe: Any) -> tuple[str, ...]:
        """All sections that `run` may read under this recipe."""
        return self.sections + self.also_reads(recipe)

    def weights_of(self, recipe: Any) -> tuple[str, ...]:
        """All fields that name weights which `run` loads under this recipe."""
        return self.weights + self.also_loads(recipe)


def _paints(recipe: Any, _round: int) -> bool:
    return recipe.synthesize.mode == "paint"


def _collects(recipe: Any, _round: int) -> bool:
    return recipe.synthesize.mode == "collect"


def _num_pictures(recipe: Any) -> int:
    return recipe.synthesize.num_images + recipe.synthesize.num_spares


def _uses_pictures(recipe: Any, _round: int) -> bool:
    return recipe.self_train.labels != "none"


def _labels_online(recipe: Any) -> bool:
    return recipe.self_train.mode == "online" and recipe.self_train.labels != "none"


def _refines_online(recipe: Any) -> bool:
    return _labels_online(recipe) and recipe.self_train.labels == "refined"


def _online_sections(recipe: Any) -> tuple[str, ...]:
    refine = ("refine",) if _refines_online(recipe) else ()
    return ("pseudo_label", *refine) if _labels_online(recipe) else ()


def _uses_labels(recipe: Any, round_: int) -> bool:
    """Whether labels come from stages rather than being made in training."""
    return _uses_pictures(recipe, round_) and not _labels_online(recipe)


def _weighs_evidence(recipe: Any, round_: int) -> bool:
    section = recipe.self_train
    weighs = section.weighting != "none" or section.drop_noise is not None
    return weighs and _uses_labels(recipe, round_)


def _trains(recipe: Any, _round: int) -> bool:
    return bool(recipe.data.sources)


def _aims(recipe: Any, round_: int) -> bool:
    return recipe.rounds.fresh_pictures and recipe.write_prompts.aim > 0 and round_ > 1


def _in_rounds(recipe: Any) -> bool:
    return recipe.rounds.count > 0


def _fresh_pictures(recipe: Any) -> bool:
    return recipe.rounds.fresh_pictures


def _all_datasets(recipe: Any) -> list[Any]:
    data = recipe.data
    return [*data.sources, *data.targets, *data.validation, *data.unlabelled]


def uses_world(recipe: Any, _round: int = 0) -> bool:
    """Whether any data set of the recipe lies in the rendered miniature world."""
    return any(dataset.root.startswith(WORLD_PREFIX) for dataset in _all_datasets(recipe))


def labelspace_file(name: str) -> Path:
    """The YAML file of a label space: a shipped name, or a path."""
    shipped = Path(__file__).parent / "labelspaces" / f"{name}.yaml"
    return shipped if shipped.is_file() else Path(name).expanduser()


def _data_externals(recipe: Any) -> dict[str, External]:
    labels = labelspace_file(recipe.data.labels)
    # with a space: no data set can have this name
    found = {"label space": External(base=labels.parent, paths=(labels,))}
    for dataset in _all_datasets(recipe):
        if not dataset.root.startswith(WORLD_PREFIX):
            root = dataset_root(dataset, recipe.data.root).absolute()
            folders = tuple(watched(dataset, root))
            found[dataset.name] = External(base=root, paths=folders, by="listing")
    return found


def _prompt_files(_recipe: Any) -> dict[str, External]:
    folder = Path(__file__).resolve().parents[1] / "prompts"
    files = tuple(sorted(p for p in folder.iterdir() if p.suffix in {".yaml", ".jsonl", ".txt"}))
    return {"prompts": External(base=folder, paths=files)}


_LABELSPACE = Need(role="labelspace", stage="prepare", part="labelspace")
_SOURCES = Need(role="sources", stage="prepare", part="sources")


def _validated(stage: str) -> Need:
    """The validation sets, where the stage's training is judged on them."""
    return Need(
        role="validation",
        stage="prepare",
        part="validation",
        when=lambda recipe, _round: getattr(recipe, stage).validation is not None,
    )


_TEACHER = Need(role="teacher", stage="self_train", round_offset=-1, at_round_0="train_source")

CONTRACTS: tuple[Contract, ...] = (
    Contract(
        name="render_world",
        version=2,
        verb="stages.render_world",
        does="Render the miniature's streets in the real on-disk layouts.",
        sections=("world",),
        exists=uses_world,
    ),
    Contract(
        name="prepare",
        version=1,
        verb="stages.prepare",
        does="Index the data sets, check every file, count classes.",
        sections=("prepare", "data"),
        needs=(Need(role="world", stage="render_world", when=uses_world),),
        externals=_data_externals,
    ),
    Contract(
        name="train_source",
        version=1,
        verb="stages.train_source",
        shared="updates",
        units=lambda recipe: recipe.train_source.steps,
        does="Train the segmenter on the labelled sources.",
        sections=("segmenter", "train_source"),
        saves_memory="a higher train_source.optimiser.accumulate, or run.processes on more GPUs "
        "(the same batch in smaller pieces), a lower train_source.batch_size, a smaller "
        "train_source.augment.crop_height and crop_width, or precision=bf16",
        needs=(_SOURCES, _LABELSPACE, _validated("train_source")),
        numeric=True,
        weights=("segmenter.encoder.weights", "segmenter.encoder.name"),
    ),
    Contract(
        name="write_prompts",
        version=2,
        verb="stages.write_prompts",
        helper=True,
        does="Have a language model write scene descriptions.",
        sections=("write_prompts",),
        saves_memory="a lower write_prompts.batch_size, a smaller write_prompts.model, or "
        "precision=bf16",
        needs=(
            _LABELSPACE,
            Need(role="sources", stage="prepare", part="sources", when=_trains),
            Need(role="labelled", stage="pseudo_label", round_offset=-1, when=_aims),
        ),
        rounds=_fresh_pictures,
        numeric=True,
        weights=("write_prompts.model",),
        externals=_prompt_files,
        units=lambda recipe: recipe.write_prompts.num_prompts,
        exists=lambda recipe: _in_rounds(recipe) and recipe.synthesize.mode == "paint",
    ),
    Contract(
        name="synthesize",
        version=1,
        verb="stages.synthesize",
        shared="shards",
        helper=True,
        units=_num_pictures,
        does="Paint pictures from the prompts (or collect unlabelled ones).",
        sections=("synthesize",),
        saves_memory="a lower synthesize.batch_size, a smaller height and width, or precision=bf16",
        needs=(
            Need(role="prompts", stage="write_prompts", when=_paints),
            Need(role="unlabelled", stage="prepare", part="unlabelled", when=_collects),
        ),
        rounds=_fresh_pictures,
        numeric=True,
        weights=("synthesize.model",),
        exists=_in_rounds,
    ),
    Contract(
        name="pseudo_label",
        version=1,
        verb="stages.pseudo_label",
        shared="shards",
        helper=True,
        units=_num_pictures,
        does="Label the pictures with the teacher.",
        sections=("pseudo_label",),
        saves_memory="a lower pseudo_label.batch_size, smaller pictures, or precision=bf16",
        needs=(Need(role="pictures", stage="synthesize"), _TEACHER),
        rounds=lambda recipe: True,
        numeric=True,
        exists=_in_rounds,
    ),
    Contract(
        name="select",
        version=1,
        verb="stages.select",
        helper=True,
        units=_num_pictures,
        does="Choose which pictures are kept, with reasons.",
        sections=("select",),
        saves_memory="a smaller select.clip, or none",
        needs=(
            Need(role="pictures", stage="synthesize"),
            Need(role="labels", stage="pseudo_label"),
        ),
        rounds=lambda recipe: True,
        weights=("select.clip", "select.clip_weights"),
        exists=_in_rounds,
    ),
    Contract(
        name="refine",
        version=2,
        verb="stages.refine",
        shared="shards",
        helper=True,
        units=_num_pictures,
        does="Sharpen the labels with SAM.",
        sections=("refine",),
        saves_memory="a lower refine.batch_size or refine.prompt_batch, a smaller refine.model, or "
        "precision=bf16",
        needs=(
            Need(role="pictures", stage="synthesize"),
            Need(role="labels", stage="pseudo_label"),
            Need(role="selection", stage="select"),
        ),
        rounds=lambda recipe: True,
        numeric=True,
        weights=("refine.weights",),
        exists=_in_rounds,
    ),
    Contract(
        name="self_train",
        version=1,
        verb="stages.self_train",
        shared="updates",
        units=lambda recipe: recipe.self_train.steps,
        does="Train on source and painted pictures together.",
        sections=("self_train",),
        also_reads=_online_sections,
        also_loads=lambda recipe: ("refine.weights",) if _refines_online(recipe) else (),
        saves_memory="a higher self_train.optimiser.accumulate, or run.processes on more GPUs "
        "(the same batch in smaller pieces), a lower self_train.batch_size, smaller crops, or "
        "precision=bf16",
        needs=(
            _SOURCES,
            _LABELSPACE,
            _TEACHER,
            _validated("self_train"),
            Need(role="pictures", stage="synthesize", when=_uses_pictures),
            Need(role="selection", stage="select", when=_uses_labels),
            Need(role="evidence", stage="pseudo_label", when=_weighs_evidence),
            Need(
                role="labels",
                stage="refine",
                when=lambda recipe, round_: (
                    recipe.self_train.labels == "refined" and _uses_labels(recipe, round_)
                ),
            ),
            Need(
                role="labels",
                stage="pseudo_label",
                when=lambda recipe, round_: (
                    recipe.self_train.labels == "raw" and _uses_labels(recipe, round_)
                ),
            ),
        ),
        rounds=lambda recipe: True,
        legs=True,
        numeric=True,
        exists=_in_rounds,
    ),
    Contract(
        name="evaluate",
        version=2,
        verb="stages.evaluate",
        does="Judge a checkpoint on the unseen targets.",
        sections=("evaluate",),
        saves_memory="a lower evaluate.batch_size, a smaller evaluate.short_side, "
        "evaluate.mode=slide, or precision=bf16",
        needs=(
            Need(role="model", stage="self_train", at_round_0="train_source"),
            Need(role="targets", stage="prepare", part="targets"),
            _LABELSPACE,
        ),
        rounds=lambda recipe: True,
        first_round=0,
        legs=True,
        numeric=True,
        exists=lambda recipe: bool(recipe.data.targets),
    ),
    Contract(
        name="report",
        version=1,
        verb="stages.report",
        does="Make the page that shows what was done.",
        sections=("report",),
        takes_everything=True,
    ),
)
"""The stages of the main pipeline, each after everything it needs."""

STAGE_NAMES: tuple[str, ...] = tuple(contract.name for contract in CONTRACTS)
