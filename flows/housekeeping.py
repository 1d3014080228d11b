"""What lies in the store and nothing refers to any more, and how it is removed.

clouds gc                       what could go, and how large it is
clouds gc --delete              remove it

An artifact stays if a recorded run, `latest/`, an adoption or a study's table refers to it, or to
anything made from it. What a live process writes is locked and stays; what is younger than the
asked-for days stays too, so that work can be resumed and runs that just begin are safe.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.outputs import MANIFEST, StoreError, read_json
from flows.store import LATEST, Store

DAY_S = 86_400
_RUN_MAX_S = 30 * DAY_S
"""A record that says "running" and was not touched for so long is of a killed run."""
Kind = Literal["artifact", "unfinished work", "removed earlier", "kept error", "run record"]


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One thing that could go."""

    kind: Kind
    path: Path
    num_bytes: int
    age_s: float
    """Since anything in it was written last."""
    lock: tuple[str, str] | None = None
    """(instance, key) whose lock must be free."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was found."""

    leftovers: tuple[Leftover, ...]
    num_kept: int
    """Artifacts that something refers to."""
    num_young: int
    """Things that nothing refers to and that are too young."""
    num_locked: int
    """Things that a live process works on."""


def look(store: Store, *, older_days: float = 1.0, keep_runs: int | None = None) -> Sweep:
    """Find what nothing refers to. Removes nothing.

    Args:
        store: the artifacts folder.
        older_days: only what was not written to for so many days.
        keep_runs: only the newest so many run records count, and the others may go; None: all
            count. A run that still goes on counts always.

    Raises:
        StoreError: there is no artifacts folder.
    """
    if not store.root.is_dir():
        raise StoreError(f"no artifacts folder {str(store.root)!r}: nothing ran yet, or name it.")
    spare_runs = _spare_runs(store, keep_runs)
    referenced = _referenced(store, set(store.runs()) - {run for run, _ in spare_runs})
    folders = list(store.artifacts())
    found = [*_artifacts(store, folders, referenced), *_scraps(store)]
    found += [
        Leftover(kind="run record", path=path, num_bytes=path.stat().st_size, age_s=age)
        for path, age in spare_runs
    ]
    free = [one for one in found if not (one.lock and store.is_locked(*one.lock))]
    old = [one for one in free if one.age_s >= older_days * DAY_S]
    return Sweep(
        leftovers=tuple(old),
        num_kept=sum(folder.name in referenced for folder in folders),
        num_young=len(free) - len(old),
        num_locked=len(found) - len(free),
    )


def remove(store: Store, leftover: Leftover) -> bool:
    """Remove it, unless a process has begun to work on it; returns whether it went."""
    if leftover.lock is None:
        _remove(store, leftover.path)
        return True
    name, key = leftover.lock
    with _free_lock(store, name, key) as is_free:
        if is_free:
            _remove(store, leftover.path)
        return is_free


def _remove(store: Store, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        store.trash(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _free_lock(store: Store, name: str, key: str) -> Iterator[bool]:
    """Hold the lock of a key if it is free; does not wait."""
    store.open()
    with (store.root / ".locks" / f"{name}-{key}").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


# What is referred to


def _spare_runs(store: Store, keep: int | None) -> list[tuple[Path, float]]:
    """Run records beyond the newest `keep`, with their age; never of a run that goes on."""
    if keep is None:
        return []
    runs = store.runs()
    older = runs[: max(0, len(runs) - keep)]
    spare = []
    for path in older:
        record = read_json(path) or {}
        age = _age_s(path)
        if record.get("status") != "running" or age > _RUN_MAX_S:
            spare.append((path, age))
    return spare


def _referenced(store: Store, runs: set[Path]) -> set[str]:
    """Keys of all artifacts that are referred to, and of all that those were made from."""
    waiting = set(store.pins().values())
    for path in runs:
        record = read_json(path) or {}
        waiting.update(entry["key"] for entry in record.get("instances", {}).values())
        waiting.update(record.get("uses", ()))
    for link in (store.root / LATEST).glob("*"):
        with contextlib.suppress(ValueError):
            waiting.add(link.resolve().relative_to(store.root.resolve()).parts[1])
    for table in store.root.glob("studies/*/*/table.json"):
        for row in (read_json(table) or {}).get("rows", ()):
            waiting.update(one["key"] for one in row.get("artifacts", ()))
    made_from = {folder.name: _inputs(store, folder) for folder in store.artifacts()}
    found: set[str] = set()
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting |= made_from.get(key, set())
    return found


def _inputs(store: Store, folder: Path) -> set[str]:
    """Keys of what an artifact was made from; a damaged manifest tells of none: it runs again."""
    try:
        manifest: Mapping[str, Any] = store.manifest(folder)
    except StoreError:
        return set()
    return {entry["key"] for entry in manifest.get("inputs", {}).values()}


# What lies there


def _artifacts(store: Store, folders: list[Path], referenced: set[str]) -> Iterator[Leftover]:
    damaged = [folder for folder in store.without_manifest() if folder.name not in referenced]
    for folder in [*folders, *damaged]:
        if folder.name not in referenced:
            written = folder / MANIFEST
            yield Leftover(
                kind="artifact",
                path=folder,
                num_bytes=_num_bytes(folder),
                age_s=_age_s(written if written.exists() else folder),
                lock=(folder.parent.name, folder.name),
            )


def _scraps(store: Store) -> Iterator[Leftover]:
    kinds: dict[str, Kind] = {
        ".staging-": "unfinished work",
        ".progress-": "unfinished work",
        ".failed-": "kept error",
        ".trash-": "removed earlier",
    }
    for prefix, kind in kinds.items():
        for path in sorted(store.root.glob(f"*/{prefix}*")):
            key = path.name.removeprefix(prefix).removesuffix(".json")
            yield Leftover(
                kind=kind,
                path=path,
                num_bytes=_num_bytes(path),
                age_s=_newest_age_s(path),
                lock=None if kind == "removed earlier" else (path.parent.name, key),
            )


def _num_bytes(path: Path) -> int:
    """Of a file, or of all files below a folder (which may be going away meanwhile)."""
    total = 0
    for file in [path, *path.rglob("*")]:
        with contextlib.suppress(OSError):
            if not file.is_dir():
                total += file.lstat().st_size
    return total


def _newest_age_s(path: Path) -> float:
    ages = []
    for file in [path, *path.rglob("*")]:
        with contextlib.suppress(OSError):
            ages.append(_age_s(file))
    return min(ages, default=0.0)


def _age_s(path: Path) -> float:
    return max(0.0, time.time() - os.lstat(path).st_mtime)
