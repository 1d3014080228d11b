"""What refinement changed, class by class: measured on the label maps themselves.

How many components SAM was asked about, and how sure the teacher is, the stages have counted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.labels import IGNORE, LabelSpace
from stages.report_lineage import Instance, read_statistics
from stages.report_pictures import Chain, class_name, evenly, open_label, resized
from stages.shards import read_index

MEASURED_MAX = 400
"""Pictures that are measured at most; the page says how many of how many."""


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """One class before and after refinement, in pixels."""

    class_id: int
    name: str
    before: int
    after: int
    gained: int
    """Pixels that have this class only now."""
    moved: int
    """Pixels that have another class now."""
    dropped: int
    """Pixels that have no label now."""
    components: int | None = None
    """Components that SAM was asked about, in all refined pictures; None: not counted (automatic
    masks are asked for by no component)."""
    confidence: float | None = None
    """Mean confidence of the teacher in the class's pixels of all labelled pictures, 0..1; None:
    it labelled none so, or did not count."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Pixels that went from one class to another (255: no label)."""

    source: str
    target: str
    pixels: int
    share: float
    """Share of all changed pixels, 0..1."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """All classes, and the largest flows."""

    classes: tuple[ClassChange, ...]
    flows: tuple[Flow, ...]
    num_measured: int
    num_pictures: int
    changed_share: float
    """Share of all pixels whose label changed, 0..1."""
    labelled_before: float
    """Share of all pixels with a label, 0..1."""
    labelled_after: float


def measure(chain: Chain, space: LabelSpace) -> Changes | None:
    """Compare the teacher's labels with the refined ones; None where nothing was refined."""
    if not (chain.labels and chain.refined):
        return None
    before = {
        str(row["id"]): row["folder"] / row["label"] for row in read_index(chain.labels.folder)
    }
    pairs = [
        (before[str(row["id"])], row["folder"] / row["label"])
        for row in read_index(chain.refined.folder)
        if str(row["id"]) in before
    ]
    counts = np.zeros((256, 256), np.int64)
    shown = evenly(pairs, MEASURED_MAX)
    for raw_path, refined_path in shown:
        refined = open_label(refined_path)
        raw = resized(open_label(raw_path), (refined.shape[1], refined.shape[0]))
        codes = raw.astype(np.int64) * 256 + refined
        counts += np.bincount(codes.ravel(), minlength=65536).reshape(256, 256)
    return _changes(chain, counts, space, num_measured=len(shown), num_pictures=len(pairs))


def _changes(
    chain: Chain, counts: np.ndarray, space: LabelSpace, *, num_measured: int, num_pictures: int
) -> Changes | None:
    total = int(counts.sum())
    if not total:
        return None
    before, after, kept = counts.sum(axis=1), counts.sum(axis=0), counts.diagonal()
    components = _counted(chain.refined, "components")
    if not any(components.values()):
        components = {}
    confidences = _counted(chain.labels, "mean_confidence")
    classes = tuple(
        ClassChange(
            class_id=one,
            name=class_name(space, one),
            before=int(before[one]),
            after=int(after[one]),
            gained=int(after[one] - kept[one]),
            moved=int(before[one] - kept[one] - counts[one, IGNORE]),
            dropped=int(counts[one, IGNORE]),
            components=components.get(str(one)),
            confidence=confidences.get(str(one)),
        )
        for one in range(IGNORE)
        if before[one] or after[one]
    )
    return Changes(
        classes=classes,
        flows=_flows(counts, space),
        num_measured=num_measured,
        num_pictures=num_pictures,
        changed_share=1 - float(kept.sum()) / total,
        labelled_before=1 - float(before[IGNORE]) / total,
        labelled_after=1 - float(after[IGNORE]) / total,
    )


def _counted(instance: Instance | None, name: str) -> dict[str, Any]:
    """Train id -> what a stage counted of the class under this name; empty where it did not."""
    classes = read_statistics(instance).get("classes") or {}
    return {key: counts[name] for key, counts in classes.items() if name in counts}


def _flows(counts: np.ndarray, space: LabelSpace, most: int = 6) -> tuple[Flow, ...]:
    moved = counts * ~np.eye(256, dtype=bool)
    total = int(moved.sum())
    largest = np.argsort(-moved.ravel(), kind="stable")[:most]
    return tuple(
        Flow(
            source=_named(code // 256, space),
            target=_named(code % 256, space),
            pixels=int(moved.ravel()[code]),
            share=int(moved.ravel()[code]) / total,
        )
        for code in map(int, largest)
        if moved.ravel()[code]
    )


def _named(class_id: int, space: LabelSpace) -> str:
    return "no label" if class_id == IGNORE else class_name(space, class_id)
