"""What an artifact's outputs are, and whether they are still as its manifest says."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from flows.digests import KEY_CHARS, digest_of
from stages.contracts import VOLATILE
from stages.shards import file_digest, is_plain_name, stays_inside, write_json

MANIFEST = "manifest.json"
_TIMES = ".times.json"
_OWN_FILES = {MANIFEST, _TIMES}


class StoreError(ValueError):
    """An artifact or the store's folder is not as it must be; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One output that is not as the manifest says."""

    path: str
    state: str
    """missing, truncated, altered, unreadable, or unsafe."""

    def __str__(self) -> str:
        return f"{self.path} is {self.state}"


def counts(path: str) -> bool:
    """Whether an output counts in the artifact's digest (not logs, not absolute roots)."""
    return not any(
        path.startswith(entry) if entry.endswith("/") else PurePosixPath(path).name == entry
        for entry in VOLATILE
    )


def output_digest(manifest: Mapping[str, Any], part: str | None = None) -> str:
    """Digest of an artifact's outputs, or of those below the top folder `part`."""
    prefix = f"{part}/" if part else ""
    found = {
        path: entry["digest"]
        for path, entry in manifest["outputs"].items()
        if path.startswith(prefix) and counts(path)
    }
    return digest_of(found)[:KEY_CHARS]


def describe_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below a folder with size, time and digest; a shard counts as one entry.

    Raises:
        StoreError: a link is among them.
    """
    outputs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise StoreError(f"{path} is a link: artifacts hold files only.")
        if path.is_dir() and (path / "shard.json").is_file():
            num_files, num_bytes, newest = _shard_stat(path)
            outputs[path.name] = {
                "bytes": num_bytes,
                "num_files": num_files,
                "digest": file_digest(path / "shard.json"),
                "mtime_ns": newest,
            }
        elif path.is_dir():
            for name, entry in describe_outputs(path).items():
                outputs[f"{path.name}/{name}"] = entry
        elif path.name not in _OWN_FILES:
            stat = path.stat()
            outputs[path.name] = {
                "bytes": stat.st_size,
                "digest": file_digest(path),
                "mtime_ns": stat.st_mtime_ns,
            }
    return outputs


def problems_of(folder: Path, manifest: Mapping[str, Any], *, full: bool = False) -> list[Problem]:
    """Outputs that are missing, truncated or altered.

    By default sizes and times are compared, and only what looks touched is read; `full` reads
    and digests everything.
    """
    times = read_json(folder / _TIMES) or {}
    found: list[Problem] = []
    healed: dict[str, int] = {}
    for path, entry in manifest["outputs"].items():
        if not _is_inside(folder, path):
            found.append(Problem(path=path, state="unsafe"))
        elif "num_files" in entry:
            _check_shard(folder, path, entry, times, full, found, healed)
        else:
            _check_file(folder, path, entry, times, full, found, healed)
    if healed:
        with contextlib.suppress(OSError):
            write_json(folder / _TIMES, times | healed)
    return found


def _check_file(
    folder: Path,
    path: str,
    entry: Mapping[str, Any],
    times: Mapping[str, int],
    full: bool,
    found: list[Problem],
    healed: dict[str, int],
) -> None:
    try:
        stat = os.stat(os.path.join(folder, path))
    except OSError:
        found.append(Problem(path=path, state="missing"))
        return
    if stat.st_size != entry["bytes"]:
        state = "truncated" if stat.st_size < entry["bytes"] else "altered"
        found.append(Problem(path=path, state=state))
    elif full or stat.st_mtime_ns != times.get(path, entry["mtime_ns"]):
        if file_digest(folder / path) != entry["digest"]:
            found.append(Problem(path=path, state="altered"))
        else:
            healed[path] = stat.st_mtime_ns


def _check_shard(
    folder: Path,
    path: str,
    entry: Mapping[str, Any],
    times: Mapping[str, int],
    full: bool,
    found: list[Problem],
    healed: dict[str, int],
) -> None:
    try:
        num_files, num_bytes, newest = _shard_stat(os.path.join(folder, path))
    except OSError:
        found.append(Problem(path=path, state="missing"))
        return
    except StoreError:
        found.append(Problem(path=path, state="unsafe (a link is in it)"))
        return
    same = (num_files, num_bytes) == (entry["num_files"], entry["bytes"])
    if same and not full and newest == times.get(path, entry["mtime_ns"]):
        return
    bad = list(_shard_problems(folder / path, path, entry))
    found.extend(bad)
    if not bad:
        healed[path] = newest


def _shard_stat(folder: Path | str) -> tuple[int, int, int]:
    """Files, bytes and newest time of a shard's folder.

    Raises:
        StoreError: a link is among them.
    """
    num_files = num_bytes = newest = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise StoreError(f"{entry.path} is a link: artifacts hold files only.")
            stat = entry.stat(follow_symlinks=False)
            num_files += 1
            num_bytes += stat.st_size
            newest = max(newest, stat.st_mtime_ns)
    return num_files, num_bytes, newest


def _shard_problems(folder: Path, name: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    index = folder / "shard.json"
    if not index.is_file():
        yield Problem(path=f"{name}/shard.json", state="missing")
        return
    if file_digest(index) != entry["digest"]:
        yield Problem(path=f"{name}/shard.json", state="altered")
        return
    files = json.loads(index.read_bytes())["files"]
    for extra in sorted({path.name for path in folder.iterdir()} - {*files, "shard.json"}):
        yield Problem(path=f"{name}/{extra}", state="altered (it does not belong here)")
    for file, expected in files.items():
        path = folder / file
        if not is_plain_name(file) or path.is_symlink():
            yield Problem(path=f"{name}/{file}", state="unsafe")
        elif not path.is_file():
            yield Problem(path=f"{name}/{file}", state="missing")
        elif path.stat().st_size < expected["bytes"]:
            yield Problem(path=f"{name}/{file}", state="truncated")
        elif file_digest(path) != expected["digest"]:
            yield Problem(path=f"{name}/{file}", state="altered")


def _is_inside(folder: Path, path: str) -> bool:
    """Whether a manifest's path stays below the folder, and no link is on the way to it."""
    if not stays_inside(path):
        return False
    steps = [PurePosixPath(path), *PurePosixPath(path).parents][:-1]
    return not any((folder / step).is_symlink() for step in steps)


def read_json(path: Path) -> Any:
    """A file's JSON, or None where it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
