"""Looking into the store: status of the last run, lineage of an artifact, verification."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.outputs import Problem, StoreError, problems_of, read_json
from flows.recipes import ConfigError, nearest
from flows.store import Store

_MANY = 12


@dataclass(frozen=True, kw_only=True)
class Status:
    """What `status` tells."""

    last_run: Mapping[str, Any] | None
    artifacts: list[Mapping[str, Any]]
    """Newest artifact of each instance: instance, key, finished, seconds, bytes, text."""
    unfinished: list[Mapping[str, Any]]
    """Work in progress or left by a stop: instance, key, progress, held_by."""
    failures: list[Mapping[str, Any]]
    """Errors of last attempts: instance, key, error, message, when, file."""


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where an artifact comes from, and what was made of it."""

    up: list[tuple[int, str]]
    """(depth, "role: instance key") of everything it was made from."""
    down: list[str]
    """ "instance key" of everything made directly from it."""


def status(store: Store) -> Status:
    """What is there, what runs, what failed.

    Raises:
        StoreError: there is no artifacts folder.
    """
    _must_exist(store)
    newest: dict[str, dict[str, Any]] = {}
    for manifest in _manifests(store):
        name = manifest["instance"]
        if name not in newest or manifest["finished"] > newest[name]["finished"]:
            newest[name] = manifest
    artifacts = [
        {
            "instance": manifest["instance"],
            "key": manifest["key"],
            "finished": manifest["finished"],
            "seconds": manifest["seconds"],
            "bytes": sum(entry["bytes"] for entry in manifest["outputs"].values()),
            "text": manifest["summary"]["text"],
        }
        for manifest in sorted(newest.values(), key=lambda manifest: manifest["finished"])
    ]
    unfinished = list(_unfinished(store))
    return Status(
        last_run=_last_run(store, busy=any(entry["held_by"] for entry in unfinished)),
        artifacts=artifacts,
        unfinished=unfinished,
        failures=list(_failures(store)),
    )


def _last_run(store: Store, *, busy: bool) -> dict[str, Any] | None:
    """The newest run's record. A killed run could not write its end: nobody works for it."""
    runs = store.runs()
    run = read_json(runs[-1]) if runs else None
    if run and run["status"] == "running" and not busy:
        run["status"] = "stopped (killed; the same command goes on)"
    return run


def _unfinished(store: Store) -> Iterator[dict[str, Any]]:
    for staging in sorted(store.root.glob("*/.staging-*")):
        name, key = staging.parent.name, staging.name.removeprefix(".staging-")
        told = read_json(store.progress_file(name, key))
        progress = f"{told['done']}/{told['total']} {told['unit']}" if told else "started"
        held_by = store.is_locked(name, key)
        yield {"instance": name, "key": key, "progress": progress, "held_by": held_by}


def _failures(store: Store) -> Iterator[dict[str, Any]]:
    for path in sorted(store.root.glob("*/.failed-*.json")):
        record = read_json(path)
        if record:
            yield {**record, "file": str(path)}


def locate(store: Store, what: str) -> tuple[Path, dict[str, Any]]:
    """The artifact with a key (or its beginning), or the newest of an instance or stage.

    Raises:
        ConfigError: nothing, or more than one key or instance, matches.
    """
    _must_exist(store)
    found = [folder for folder in store.artifacts() if folder.name.startswith(what)]
    if len(found) == 1:
        return found[0], store.manifest(found[0])
    if len(found) > 1:
        names = ", ".join(f"{folder.parent.name} {folder.name}" for folder in found[:_MANY])
        raise ConfigError(f"{what!r} is the beginning of several keys: {names}.")
    names = {folder.parent.name for folder in store.artifacts()}
    meant = [what] if what in names else sorted(name for name in names if _is_of(name, what))
    if len(meant) > 1:
        raise ConfigError(f"{what!r} may be {', '.join(meant)}: name one.")
    newest = store.newest(meant[0]) if meant else None
    if newest is None:
        raise ConfigError(f"no artifact {what!r} in {store.root}{nearest(what, names)}")
    return store.folder(meant[0], newest["key"]), newest


def _is_of(name: str, what: str) -> bool:
    """Whether an instance (stage@round#leg) is one of a stage, or of a stage's round."""
    return what in (name.split("@")[0].split("#")[0], name.split("#")[0])


def lineage(store: Store, manifest: Mapping[str, Any]) -> Lineage:
    """Where an artifact comes from (all the way up) and what was made of it (one step)."""
    everything = {entry["key"]: entry for entry in _manifests(store)}
    up: list[tuple[int, str]] = []
    told: set[str] = set()

    def climb(entry: Mapping[str, Any], depth: int) -> None:
        for role, source in entry.get("inputs", {}).items():
            key = source["key"]
            again = " (above)" if key in told and everything.get(key, {}).get("inputs") else ""
            up.append((depth, f"{role}: {source['instance']} {key}{again}"))
            if key in everything and key not in told:
                told.add(key)
                climb(everything[key], depth + 1)

    climb(manifest, 0)
    down = [
        f"{entry['instance']} {entry['key']}"
        for entry in everything.values()
        if any(source["key"] == manifest["key"] for source in entry.get("inputs", {}).values())
    ]
    return Lineage(up=up, down=sorted(down))


def verify(
    store: Store, *, full: bool
) -> Iterator[tuple[Path, Mapping[str, Any] | None, list[Problem]]]:
    """Every artifact with what is wrong with it; a manifest that cannot be trusted is None.

    Raises:
        StoreError: there is no artifacts folder.
    """
    _must_exist(store)
    for folder in store.artifacts():
        try:
            manifest = store.manifest(folder)
        except StoreError:
            yield folder, None, [Problem(path="manifest.json", state="altered")]
            continue
        yield folder, manifest, problems_of(folder, manifest, full=full)
    for folder in store.without_manifest():
        yield folder, None, [Problem(path="manifest.json", state="missing")]


def _manifests(store: Store) -> Iterator[dict[str, Any]]:
    for folder in store.artifacts():
        try:
            yield store.manifest(folder)
        except StoreError:
            continue


def _must_exist(store: Store) -> None:
    if not store.root.is_dir():
        raise StoreError(
            f"no artifacts folder {str(store.root)!r}: nothing ran yet, or name another."
        )
