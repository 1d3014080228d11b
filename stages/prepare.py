"""Index the data sets: list them, read every file once, count classes, refuse what is wrong.

    clouds --stage prepare --set data.root=FOLDER

Leaves `labelspace/labelspace.json` and, per role (sources, targets, validation, unlabelled), an
index, a card and the roots. The index does not depend on where the data sets lie.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.data_config import DataConfig, DatasetConfig, PrepareConfig
from stages.labels import IGNORE, IdMap, LabelSpace, load_labelspace
from stages.layouts import (
    WORLD_PREFIX,
    Listing,
    Pair,
    dataset_root,
    list_pairs,
    strays_told,
)
from stages.readers import CorruptFileError, read_image, read_label, resize_label
from stages.shards import Row, file_digest, read_jsonl, write_json, write_jsonl

ROLES = ("sources", "targets", "validation", "unlabelled")
CHUNK = 200
"""Samples that are checked, and remembered for resuming, together."""
PROBLEMS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One data set in one role."""

    role: str
    dataset: DatasetConfig
    root: Path
    listing: Listing
    id_map: IdMap | None

    @property
    def who(self) -> str:
        return f"data set {self.dataset.name!r} (data.{self.role})"


def run(
    config: StageConfig, *, out: Path, progress: Progress, world: Path | None = None
) -> Summary:
    """Index every data set of the recipe.

    Args:
        config: sections `prepare` and `data`.
        out: the artifact; finished chunks of an interrupted attempt are used.
        progress: told every sample.
        world: the `render_world` artifact, where roots begin with `@render_world`.

    Raises:
        FileNotFoundError: a folder or label is missing; names what was expected where.
        ValueError: names used twice, label values outside the map, unreadable files or sizes that
            differ where these are not allowed; names the files.
    """
    space = load_labelspace(config.data.labels)
    jobs = list(_jobs(config.data, space, world))
    state = out / "state"
    state.mkdir(parents=True, exist_ok=True)
    done = _samples_done(jobs, state)
    progress.start(sum(len(job.listing.pairs) for job in jobs), "samples", done=done)
    rows = {
        (job.role, job.dataset.name): _check_dataset(job, config.prepare, state, progress)
        for job in jobs
    }
    _refuse_targets_for_validation(rows)
    (out / "labelspace").mkdir(exist_ok=True)
    space.save(out / "labelspace")
    seen_in_sources = {
        row["image_digest"]
        for (role, _), checked in rows.items()
        for row in checked
        if role == "sources" and "image_digest" in row
    }
    cards = []
    for role in ROLES:
        part = out / role
        part.mkdir(exist_ok=True)
        mine = [job for job in jobs if job.role == role]
        for job in mine:
            cards.append(
                _write_dataset(part, job, rows[role, job.dataset.name], space, seen_in_sources)
            )
            _tell(job, cards[-1], progress)
        write_json(part / "roots.json", {job.dataset.name: _root_entry(job, part) for job in mine})
    shutil.rmtree(state)
    return _summary(cards)


def _refuse_targets_for_validation(rows: Mapping[tuple[str, str], Sequence[Row]]) -> None:
    """Choices made on a picture that is later judged as unseen would make that judgement void."""
    targets = {
        row["image_digest"]: row["id"]
        for (role, _), checked in rows.items()
        for row in checked
        if role == "targets" and "image_digest" in row
    }
    shared = [
        (row["id"], targets[row["image_digest"]])
        for (role, _), checked in rows.items()
        for row in checked
        if role == "validation" and row.get("image_digest") in targets
    ]
    if shared:
        first, target = shared[0]
        raise ValueError(
            f"{len(shared)} validation pictures are also targets (the first: {first} is {target}): "
            "choices must not be made on what is judged as unseen. Take another set for one of "
            "them."
        )


def _root_entry(job: _Job, part: Path) -> str:
    """Absolute, but relative to the part for a rendered world: artifacts may move together."""
    if job.dataset.root.startswith(WORLD_PREFIX):
        return os.path.relpath(job.root, part)
    return str(job.root.resolve())


def check_labels(dataset: DatasetConfig, data: DataConfig, *, role: str, num_samples: int) -> str:
    """Read a few samples of a data set as `prepare` would, evenly spaced.

    Returns:
        A line for people.

    Raises:
        FileNotFoundError: a folder or label is missing.
        ValueError: label values outside the map, unreadable files or sizes that differ.
    """
    few = dataset.model_copy(update={"limit": min(num_samples, dataset.limit or num_samples)})
    root = dataset_root(dataset, data.root)
    total = len(list_pairs(dataset, root, role=role, labelled=True).pairs)
    listing = list_pairs(few, root, role=role, labelled=True)
    id_map = _id_map(dataset, listing, load_labelspace(data.labels))
    job = _Job(role=role, dataset=dataset, root=root, listing=listing, id_map=id_map)
    _stop_on_errors(job, [_check_sample(job, pair, PrepareConfig()) for pair in listing.pairs])
    return f"read {len(listing.pairs)} of {total} samples, map {id_map.name}"


def _jobs(data: DataConfig, space: LabelSpace, world: Path | None) -> Iterator[_Job]:
    _refuse_same_names(data)
    for role in ROLES:
        for dataset in getattr(data, role):
            root = dataset_root(dataset, data.root, world)
            labelled = role != "unlabelled" or dataset.truth
            listing = list_pairs(dataset, root, role=role, labelled=labelled)
            yield _Job(
                role=role,
                dataset=dataset,
                root=root,
                listing=listing,
                id_map=_id_map(dataset, listing, space),
            )


def _refuse_same_names(data: DataConfig) -> None:
    """A name stands in ids and tables, so it must mean one folder and split in the whole recipe."""
    seen: dict[str, tuple[str, DatasetConfig]] = {}
    for role in ROLES:
        for dataset in getattr(data, role):
            first_role, first = seen.setdefault(dataset.name, (role, dataset))
            what = (dataset.layout, dataset.root, dataset.split)
            if first is not dataset and (
                first_role == role or what != (first.layout, first.root, first.split)
            ):
                raise ValueError(
                    f"two data sets are called {dataset.name!r} (data.{first_role} and "
                    f"data.{role}): rename one."
                )


def _id_map(dataset: DatasetConfig, listing: Listing, space: LabelSpace) -> IdMap | None:
    if listing.kind is None:
        return None
    fitting = [name for name in listing.kind.label_maps if name in space.maps]
    name = dataset.label_map or (fitting or listing.kind.label_maps)[0]
    return space.id_map(
        name, wanted_by=f"data set {dataset.name!r} ({dataset.layout}, {listing.kind.name})"
    )


def _chunk_file(job: _Job, number: int, state: Path) -> Path:
    return state / f"{job.role}-{job.dataset.name}-{number:05d}.jsonl"


def _chunks(job: _Job) -> Iterator[tuple[int, Sequence[Pair]]]:
    pairs = job.listing.pairs
    return enumerate(pairs[start : start + CHUNK] for start in range(0, len(pairs), CHUNK))


def _samples_done(jobs: Sequence[_Job], state: Path) -> int:
    return sum(
        len(pairs)
        for job in jobs
        for number, pairs in _chunks(job)
        if _chunk_file(job, number, state).is_file()
    )


def _check_dataset(job: _Job, config: PrepareConfig, state: Path, progress: Progress) -> list[Row]:
    """A row per sample: an index row, or {"id", "file", "refused": why}."""
    rows: list[Row] = []
    pool = ThreadPoolExecutor(max(1, config.workers), thread_name_prefix="prepare")
    try:
        for number, pairs in _chunks(job):
            file = _chunk_file(job, number, state)
            if not file.is_file():
                checked = []
                for row in pool.map(lambda pair: _check_sample(job, pair, config), pairs):
                    checked.append(row)
                    progress.advance()
                _stop_on_errors(job, checked)
                write_jsonl(file, checked)
            rows += read_jsonl(file)
    finally:
        pool.shutdown(cancel_futures=True)
    return rows


def _check_sample(job: _Job, pair: Pair, config: PrepareConfig) -> Row:
    """Read one picture and its label. Pillow and hashlib work outside the interpreter's lock."""
    row: Row = {
        "id": f"{job.dataset.name}/{pair.stem}",
        "image": pair.image.relative_to(job.root).as_posix(),
        "label": None,
        "label_digest": None,
    }
    try:
        row["height"], row["width"] = read_image(pair.image).shape[:2]
        row["image_digest"] = file_digest(pair.image)
        if pair.label is not None:
            row["label"] = pair.label.relative_to(job.root).as_posix()
            row["label_digest"] = file_digest(pair.label)
            _check_label(row, pair.label, job.id_map, config)
    except CorruptFileError as error:
        kind = "refused" if config.on_corrupt == "skip" else "error"
        return {"id": row["id"], kind: str(error), "kind": "corrupt"}
    except ValueError as error:
        return {"id": row["id"], "error": str(error), "kind": "labels"}
    return row


def _check_label(row: Row, path: Path, id_map: IdMap, config: PrepareConfig) -> None:
    """Add class counts to the row, or why the label is refused."""
    raw_HW = read_label(path)
    size = (row["height"], row["width"])
    if raw_HW.shape != size:
        text = (
            f"{path}: the label is {raw_HW.shape[0]}x{raw_HW.shape[1]}, its picture "
            f"{size[0]}x{size[1]} (height x width)"
        )
        if config.on_size_mismatch != "resize_label":
            row["refused" if config.on_size_mismatch == "skip" else "error"] = text
            row["kind"] = "size"
            return
        raw_HW = resize_label(raw_HW, size)
        row["label_resized"] = True
    counts = np.bincount(raw_HW.ravel(), minlength=1)
    unknown = np.flatnonzero(counts * ~id_map.known[: len(counts)])
    if len(unknown):
        values = ", ".join(map(str, unknown[:12])) + (", ..." if len(unknown) > 12 else "")
        raise ValueError(f"{path}: values {values} are not in label map {id_map.name!r}")
    trained = np.bincount(id_map.table[: len(counts)], weights=counts, minlength=256)
    row["classes"] = {str(c): int(trained[c]) for c in np.flatnonzero(trained[:IGNORE])}


_WAYS_OUT = {
    "corrupt": "Replace the files, or leave them out: prepare.on_corrupt=skip.",
    "size": (
        "Repair the files, or choose prepare.on_size_mismatch=skip (leave them out) or "
        "resize_label (nearest neighbour)."
    ),
    "labels": (
        "Choose the map that fits with the data set's `label_map`, or list the values in the label "
        "space file: under `ids` with their class, or under `ignored`."
    ),
}


def _stop_on_errors(job: _Job, rows: Sequence[Row]) -> None:
    bad = [row for row in rows if "error" in row]
    if not bad:
        return
    shown = "".join(f"\n  {row['error']}" for row in bad[:PROBLEMS_SHOWN])
    more = f"\n  and {len(bad) - PROBLEMS_SHOWN} more" if len(bad) > PROBLEMS_SHOWN else ""
    ways_out = "\n".join(_WAYS_OUT[kind] for kind in sorted({row["kind"] for row in bad}))
    raise ValueError(
        f"{job.who}: {len(bad)} of {len(rows)} samples cannot be used:{shown}{more}\n{ways_out}"
    )


def _write_dataset(
    part: Path, job: _Job, rows: Sequence[Row], space: LabelSpace, seen_in_sources: set[str]
) -> dict[str, Any]:
    """Write the index and the card of a data set; returns the card."""
    kept = [row for row in rows if "refused" not in row]
    if not kept:
        raise ValueError(
            f"{job.who}: all {len(rows)} samples were left out; the first: {rows[0]['refused']}"
        )
    pixels = Counter[int]()
    for row in kept:
        pixels.update({int(key): count for key, count in row.get("classes", {}).items()})
    if job.role == "sources" and not any(pixels.values()):
        raise ValueError(
            f"{job.who}: none of the {len(kept)} labels has a pixel with a class: label map "
            f"{job.id_map.name!r} ignores every value in them. Choose the map that fits with the "
            "data set's `label_map`."
        )
    leaked = [row["id"] for row in kept if row["image_digest"] in seen_in_sources]
    card = {
        "name": job.dataset.name,
        "role": job.role,
        "layout": job.dataset.layout,
        "split": job.listing.split,
        "label_kind": job.listing.kind.name if job.listing.kind else None,
        "label_map": job.id_map.to_json() if job.id_map else None,
        "num_samples": len(kept),
        "class_pixels": {name: pixels[number] for number, name in enumerate(space.names)},
        "total_pixels": sum(row["height"] * row["width"] for row in kept),
        "num_labels_resized": sum("label_resized" in row for row in kept),
        "refused": [
            {"id": row["id"], "why": row["refused"].replace(f"{job.root}/", "")}
            for row in rows
            if "refused" in row
        ],
        "also_in_sources": leaked if job.role in ("targets", "validation") else [],
    }
    write_jsonl(part / f"{job.dataset.name}.jsonl", kept)
    write_json(part / f"{job.dataset.name}.json", card)
    return card


def _tell(job: _Job, card: dict[str, Any], progress: Progress) -> None:
    if (strays := strays_told(job.listing, job.root)) is not None:
        progress.note(f"{job.who}: {strays}")
    if job.id_map and job.role != "sources" and not any(card["class_pixels"].values()):
        progress.note(
            f"{job.who}: no label has a pixel with a class (label map {job.id_map.name!r}): "
            "nothing can be judged on them"
        )
    if card["refused"]:
        first = card["refused"][0]["why"]
        progress.note(f"{job.who}: {len(card['refused'])} samples left out; the first: {first}")
    if card["num_labels_resized"]:
        progress.note(f"{job.who}: {card['num_labels_resized']} labels resized to their pictures")
    if card["also_in_sources"]:
        progress.note(
            f"{job.who}: {len(card['also_in_sources'])} pictures are also among the sources "
            f"(the first: {card['also_in_sources'][0]}): scores on them prove little"
        )


def _summary(cards: Sequence[dict[str, Any]]) -> Summary:
    counts = {role: 0 for role in ROLES}
    for card in cards:
        counts[card["role"]] += card["num_samples"]
    refused = sum(len(card["refused"]) for card in cards)
    text = ", ".join(f"{count} {role}" for role, count in counts.items() if count) or "no data sets"
    if refused:
        text += f", {refused} left out"
    numbers: dict[str, float | int | str] = {**counts, "datasets": len(cards)}
    if sources := [card for card in cards if card["role"] == "sources"]:
        labelled = sum(sum(card["class_pixels"].values()) for card in sources)
        share = labelled / sum(card["total_pixels"] for card in sources)
        numbers["labelled_share"] = round(share, 4)
        text += f"; {share:.1%} of the sources' pixels have a class"
    return Summary(text=f"{len(cards)} data sets: {text}", numbers=numbers)
