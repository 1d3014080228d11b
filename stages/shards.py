"""Shards: folders of at most 1000 items that are finished whole or not at all.

A stage with many items cuts them into shards by config alone (never by what is left), so that every
run composes the same shards and batches. A finished shard is renamed from `*.tmp` into place; a
restart
skips the shards it finds whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from stages.contracts import SHARD_ITEMS_MAX, Progress

Item = TypeVar("Item")
Row = dict[str, Any]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def item_seed(stage_seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one item, the same on every machine: digest of (stage seed, parts)."""
    text = "\x1f".join([str(stage_seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all: a temporary file in the same folder, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON object a line, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_jsonl(path: Path) -> list[Row]:
    """Read a file of one JSON object a line.

    Raises:
        ValueError: a line is no JSON object; the message names file and line.
    """
    rows = []
    for number, line in numbered_lines(path):
        try:
            rows.append(parse_row(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1.

    Raises:
        ValueError: it is no UTF-8; the message names file and line.
    """
    found = path.read_bytes()
    try:
        lines = found.decode().split("\n")  # splitlines() also cuts inside of texts
    except UnicodeDecodeError as error:
        number = found.count(b"\n", 0, error.start) + 1
        byte = found[error.start]
        raise ValueError(f"{path}, line {number}: not UTF-8 (byte {byte:#04x})") from error
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def parse_row(line: str) -> Row:
    """The JSON object on a line.

    Raises:
        ValueError: it is none.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}): {line[:80]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {line[:80]!r}")
    return row


def shard_problem(folder: Path) -> str | None:
    """Why a finished shard is not whole (a file is missing or has another size), or None."""
    try:
        files = json.loads((folder / "shard.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{folder.name}/shard.json is missing or unreadable"
    sizes = {
        entry.name: entry.stat().st_size for entry in os.scandir(folder) if not entry.is_symlink()
    }
    for name, expected in files.items():
        if sizes.get(name) != expected["bytes"]:
            state = "missing" if name not in sizes else "truncated or altered"
            return f"{folder.name}/{name} is {state}"
    return None


def write_shards(
    out: Path,
    items: Sequence[Item],
    *,
    shard_size: int,
    work: Callable[[Sequence[Item], Path], Sequence[Row]],
    progress: Progress,
    unit: str,
) -> int:
    """Run `work(items of one shard, folder)` for every shard that is not yet whole.

    Args:
        out: the stage's folder; shards become `out/shard-00000` and so on.
        items: all items, in the order that decides which shard each belongs to.
        shard_size: items per shard, 1..1000.
        work: writes its files into the folder it is given and returns one index row per file
        group; it
            calls `progress.advance` itself, as it goes.
        progress: told the total, and what was found finished.
        unit: what an item is called, in the plural ("pictures").

    Returns:
        The number of shards.

    Raises:
        ValueError: `shard_size` is out of range.
    """
    if not 1 <= shard_size <= SHARD_ITEMS_MAX:
        raise ValueError(f"shard_size is {shard_size}; a shard holds 1 to {SHARD_ITEMS_MAX} items.")
    chunks = [items[start : start + shard_size] for start in range(0, len(items), shard_size)]
    folders = [out / f"shard-{number:05d}" for number in range(len(chunks))]
    whole = [folder.is_dir() and shard_problem(folder) is None for folder in folders]
    done = sum(len(chunk) for chunk, finished in zip(chunks, whole, strict=True) if finished)
    progress.start(len(items), unit, done=done)
    for chunk, folder, finished in zip(chunks, folders, whole, strict=True):
        if not finished:
            _write_shard(folder, chunk, work)
    return len(chunks)


def _write_shard(
    folder: Path, chunk: Sequence[Item], work: Callable[[Sequence[Item], Path], Sequence[Row]]
) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    for leftover in (folder, temporary):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    write_jsonl(temporary / "index.jsonl", work(chunk, temporary))
    files = {
        path.name: {"bytes": path.stat().st_size, "digest": file_digest(path)}
        for path in sorted(temporary.iterdir())
    }
    write_json(temporary / "shard.json", {"num_items": len(chunk), "files": files})
    temporary.rename(folder)


FILE_FIELDS = frozenset({"file", "label", "confidence"})
"""Fields of an index row that name a file of its shard."""


def shard_folders(artifact: Path) -> list[Path]:
    """The finished shards of an artifact, in order."""
    return sorted(path for path in artifact.glob("shard-*") if path.suffix != ".tmp")


def read_index(artifact: Path) -> Iterator[Row]:
    """All index rows of a sharded artifact, in order; each has "folder": the Path of its shard.

    Raises:
        ValueError: a line is broken, or names a file that is not in its shard.
    """
    for folder in shard_folders(artifact):
        for row in read_jsonl(folder / "index.jsonl"):
            for field in FILE_FIELDS & row.keys():
                if not is_plain_name(row[field]):
                    raise ValueError(
                        f"{folder / 'index.jsonl'}: {field!r} of {row.get('id')!r} is "
                        f"{row[field]!r}, which is no file of its shard. The index was altered: "
                        f"remove the artifact and run its stage again."
                    )
            yield row | {"folder": folder}


def is_plain_name(name: object) -> bool:
    """Whether a name is that of a file in its own folder: no path, nothing that leads out."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {*name} & {*"/\\\0"}


def stays_inside(path: object) -> bool:
    """Whether a relative path of an index or manifest stays below its folder, links aside."""
    if not isinstance(path, str) or not path or {*path} & {*"\\\0"}:
        return False
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts
