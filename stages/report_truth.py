"""How good the pseudo-labels of the headline's chain are, where the truth of pictures is known."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.labels import LabelSpace
from stages.report_lineage import Instance, read_statistics
from stages.report_pictures import Chain, class_name
from stages.report_scores import Number, minus
from stages.truth import BOUNDARY_PX


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One number of the teacher's labels and of the refined ones, 0..1; None: does not count."""

    before: Number
    after: Number

    @property
    def difference(self) -> Number:
        """What refinement added."""
        return minus(self.after, self.before)


@dataclass(frozen=True, kw_only=True)
class ClassQuality:
    """One class, or all of them (`class_id` None)."""

    class_id: int | None
    name: str
    whole: Pair
    """IoU over all pixels; a pixel without label is a miss."""
    labelled: Pair
    """IoU over the pixels that have a label."""
    boundary: Pair
    """As `whole`, near boundaries of the truth only."""


@dataclass(frozen=True, kw_only=True)
class LabelQuality:
    """The table of one chain."""

    rows: tuple[ClassQuality, ...]
    """The mean over the classes first."""
    coverage: Pair
    """Share of the pixels that have a label."""
    num_pictures: int
    refined: bool
    boundary_px: int = BOUNDARY_PX


def read_quality(chain: Chain, space: LabelSpace) -> LabelQuality | None:
    """The quality of the chain's labels; None where no truth is known."""
    refined = _truth_of(chain.refined)
    before = refined.get("before") or _truth_of(chain.labels)
    after = refined.get("after") or {}
    if not before:
        return None
    rows = [_row(None, "mean", before, after, ("miou", "miou_labelled"))]
    for key in sorted(before["whole"]["classes"].keys() | _classes(after), key=int):
        rows.append(_row(int(key), class_name(space, int(key)), before, after, _OF_CLASS))
    return LabelQuality(
        rows=tuple(rows),
        coverage=Pair(
            before=before["whole"]["labelled"], after=_at(after, "whole", None, "labelled")
        ),
        num_pictures=before["num_pictures"],
        refined=bool(after),
    )


_OF_CLASS = ("iou", "iou_labelled")


def _truth_of(instance: Instance | None) -> Mapping[str, Any]:
    return read_statistics(instance).get("truth") or {}


def _classes(quality: Mapping[str, Any]) -> set[str]:
    return set(quality["whole"]["classes"]) if quality else set()


def _row(
    class_id: int | None,
    name: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    keys: tuple[str, str],
) -> ClassQuality:
    whole, labelled = keys

    def pair(region: str, key: str) -> Pair:
        values = [_at(quality, region, class_id, key) for quality in (before, after)]
        return Pair(before=values[0], after=values[1])

    return ClassQuality(
        class_id=class_id,
        name=name,
        whole=pair("whole", whole),
        labelled=pair("whole", labelled),
        boundary=pair("boundary", whole),
    )


def _at(quality: Mapping[str, Any], region: str, class_id: int | None, key: str) -> Number:
    if not quality:
        return None
    found = quality[region]
    if class_id is not None:
        found = found["classes"].get(str(class_id), {})
    return found.get(key)
