"""The numbers of a report: which model reached what on which target, against which reference."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stages.report_lineage import Instance, read_json
from stages.report_words import percent

Number = float | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on one target."""

    miou: Number
    """Mean IoU in 0..1; None: not computed."""
    iou: tuple[Number, ...]
    """IoU per class in 0..1; None: the class does not count here."""
    truth_share: tuple[Number, ...]
    """Share of each class among the labelled pixels of the truth; None: no confusion matrix."""
    num_images: int | None
    num_also_in_sources: int
    """Pictures that the training saw as well: such a score is no judgement."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One judged model."""

    instance: str
    """The `evaluate` instance."""
    label: str
    """What people call it: "source model", "round 1 · refined"."""
    round: int
    leg: str | None
    kind: Literal["source", "control", "trained"]
    labels: str | None
    """Labels of the pictures it was trained on (refined, raw, none); None: not recorded."""
    classes: tuple[str, ...]
    protocol: Mapping[str, Any]
    targets: Mapping[str, Score]
    mean: Number
    """Mean of the targets' mIoU, in 0..1."""
    details: tuple[str, ...] = ()
    """Finer numbers in words: means over fewer classes, conditions, rPD."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result in one breath."""

    model: Judged
    reference: Judged | None
    """The control of the same round; where there is none, the source model."""
    source: Judged | None

    @property
    def difference(self) -> Number:
        """Mean mIoU of the model less that of the reference."""
        return minus(self.model.mean, self.reference.mean) if self.reference else None


def minus(one: Number, other: Number) -> Number:
    """Difference, or None where either is unknown."""
    return None if one is None or other is None else one - other


def number(value: Any) -> Number:
    """A finite float, or None (JSON knows no NaN; some writers do)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read_scores(instances: Mapping[str, Instance]) -> list[Judged]:
    """All judged models: source first, then by round, the control first.

    Raises:
        ValueError: a `results.json` is not JSON.
    """
    judged = [_judged(one, instances) for one in instances.values() if one.stage == "evaluate"]
    return sorted(
        (one for one in judged if one),
        key=lambda one: (one.round, one.kind != "control", one.leg or "", one.instance),
    )


def _judged(one: Instance, instances: Mapping[str, Instance]) -> Judged | None:
    path = one.folder / "results.json"
    if not path.is_file():
        return None
    results = read_json(path)
    targets = {name: _score(entry) for name, entry in sorted((results.get("sets") or {}).items())}
    mean = number(results.get("miou_mean"))
    known = [score.miou for score in targets.values() if score.miou is not None]
    if mean is None and known:
        mean = sum(known) / len(known)
    labels = _labels(one, instances)
    kind = _kind(one, labels)
    return Judged(
        instance=one.name,
        label=_label(one, kind),
        round=one.round or 0,
        leg=one.leg,
        kind=kind,
        labels=labels,
        classes=tuple(_class_name(entry) for entry in results.get("classes") or ()),
        protocol=results.get("protocol") or {},
        targets=targets,
        mean=mean,
        details=tuple(_details(results)),
    )


def _details(results: Mapping[str, Any]) -> Iterator[str]:
    """What `evaluate` stores beside the mIoU of each target, one line each."""
    sets = sorted((results.get("sets") or {}).items())
    for name, entry in sets:
        by_classes = entry.get("miou_by_classes") or {}
        if by_classes:
            values = ", ".join(
                f"{count}: {percent(number(by_classes[count]))}"
                for count in sorted(by_classes, key=int, reverse=True)
            )
            yield f"{name}, mean over so many classes: {values}"
    for name, entry in sets:
        conditions = entry.get("conditions") or {}
        if conditions:
            values = ", ".join(
                f"{condition} {percent(number(part.get('miou')))}"
                for condition, part in sorted(conditions.items())
            )
            together, apart = entry.get("miou"), entry.get("miou_mean_of_conditions")
            yield (
                f"{name}, by condition: {values}; together (one matrix) {percent(number(together))}"
                f", mean of the conditions {percent(number(apart))}"
            )
    if number(results.get("rpd")) is not None:
        yield (
            f"relative performance under domain shift (rPD): {percent(number(results['rpd']))} % "
            f"of the mIoU on {results.get('training_domain')} is kept on the unseen targets"
        )


def _class_name(entry: Any) -> str:
    return str(entry.get("name", entry)) if isinstance(entry, Mapping) else str(entry)


def _score(entry: Mapping[str, Any]) -> Score:
    rows = entry.get("confusion") or []
    sums = [sum(row) for row in rows]
    total = sum(sums)
    num_images = entry.get("num_images")
    return Score(
        miou=number(entry.get("miou")),
        iou=tuple(number(value) for value in entry.get("iou") or ()),
        truth_share=tuple(value / total if total else None for value in sums),
        num_images=int(num_images) if isinstance(num_images, int | float) else None,
        num_also_in_sources=int(entry.get("num_also_in_sources") or 0),
    )


def _labels(one: Instance, instances: Mapping[str, Instance]) -> str | None:
    maker = instances.get(one.made_from("model") or "")
    return maker.section("self_train").get("labels") if maker else None


def _kind(one: Instance, labels: str | None) -> Literal["source", "control", "trained"]:
    if not one.round:
        return "source"
    return "control" if labels == "none" or one.leg == "control" else "trained"


def _label(one: Instance, kind: str) -> str:
    leg = f" · {one.leg}" if one.leg else ""
    return f"source model{leg}" if kind == "source" else f"round {one.round}{leg}"


def judge(models: Sequence[Judged]) -> Verdict | None:
    """The model the page speaks of first: the last round's, trained on refined labels if any was.

    None where nothing was judged.
    """
    if not models:
        return None
    model = max(models, key=lambda one: (one.round, _preference(one)))
    source = source_of(model, models) if model.kind != "source" else None
    control = next(
        (one for one in models if one.kind == "control" and one.round == model.round), None
    )
    reference = control if control and control is not model else source
    return Verdict(model=model, reference=reference, source=source)


def source_of(model: Judged, models: Sequence[Judged]) -> Judged | None:
    """The source model of the same leg, or the one that all legs share."""
    sources = [one for one in models if one.kind == "source"]
    return next((one for one in sources if one.leg == model.leg), sources[0] if sources else None)


def _preference(one: Judged) -> int:
    if one.kind == "control":
        return 0
    return {"raw": 1, None: 2, "refined": 3}.get(one.leg if one.labels is None else one.labels, 2)
