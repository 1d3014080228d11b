"""Shards: folders of at most 1000 items that are finished whole or not at all.

A stage with many items cuts them into shards by config alone (never by what is left), so that every
run composes the same shards and batches. A finished shard is renamed from `.*.tmp` into place; a
restart skips the shards it finds whole.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from stages.contracts import SHARD_ITEMS_MAX, Progress

Row = dict[str, Any]

SYNC_EACH_MAX = 256
"""Files of a folder up to which each is brought to the disk by itself; beyond, all at once."""


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


def bring_to_disk(folder: Path) -> None:
    """Return when all that is below a folder has reached the disk: a power cut leaves it whole."""
    paths = [folder, *islice(folder.rglob("*"), SYNC_EACH_MAX)]
    if len(paths) > SYNC_EACH_MAX:
        os.sync()
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
        # an editor may have put a mark in front; splitlines() also cuts inside of texts
        lines = found.decode().removeprefix("\ufeff").split("\n")
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


Work = Callable[[Sequence[Any], Path], Sequence[Row]]
"""`work(items of one shard, folder)` writes its files into the folder and returns one index row per
item; it calls `progress.advance` itself, as it goes."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What a stage makes shard by shard, and how.

    A verb with a function `shards(config, *, progress, <role>, ...) -> ShardJob` can have whole
    shards made by other processes and machines (see `stages/launch.py`).
    """

    items: Sequence[Any]
    """All items, in the order that decides which shard each belongs to."""
    shard_size: int
    """Items per shard, 1..1000."""
    unit: str
    """What an item is called, in the plural ("pictures")."""
    open: Callable[[Progress], Work]
    """Loads what the work needs (networks), told its progress; called only if a shard is missing,
    and once per process."""

    def __post_init__(self) -> None:
        if not 1 <= self.shard_size <= SHARD_ITEMS_MAX:
            raise ValueError(
                f"shard_size is {self.shard_size}; a shard holds 1 to {SHARD_ITEMS_MAX} items."
            )

    @property
    def num_shards(self) -> int:
        """How many shards the items fill."""
        return -(-len(self.items) // self.shard_size)

    def chunk(self, number: int) -> Sequence[Any]:
        """The items of one shard."""
        return self.items[number * self.shard_size : (number + 1) * self.shard_size]


def write_shards(out: Path, job: ShardJob, *, progress: Progress) -> int:
    """Make every shard that is not yet whole.

    Args:
        out: the stage's folder; shards become `out/shard-00000` and so on.
        job: the items, and the work.
        progress: told the total, and what was found finished.

    Returns:
        The number of shards.
    """
    missing = missing_shards(out, job)
    work = job.open(progress) if missing else None
    left = sum(len(job.chunk(number)) for number in missing)
    progress.start(len(job.items), job.unit, done=len(job.items) - left)
    for number in missing:
        make_shard(out, number, job, work)
    return job.num_shards


def missing_shards(out: Path, job: ShardJob) -> list[int]:
    """Numbers of the shards that are not there, after removing halves and damaged ones.

    For the one process that holds the stage's folder, before work is given out.
    """
    for leftover in out.glob(".shard-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    missing = []
    for number in range(job.num_shards):
        folder = shard_folder(out, number)
        if folder.is_symlink():
            folder.unlink()
        if not folder.is_dir() or shard_problem(folder) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            missing.append(number)
    return missing


def shard_folder(out: Path, number: int) -> Path:
    """Where a finished shard lies."""
    return out / f"shard-{number:05d}"


def make_shard(out: Path, number: int, job: ShardJob, work: Work) -> None:
    """Make one shard in a folder of this process's own, then rename it into place.

    It gets its name when all of it is on the disk: after a power cut no half is taken as whole.
    Two processes may make the same shard (one of them was believed dead): they make the same bytes,
    the first to finish is kept, and neither ever sees a half of the other's.
    """
    folder, chunk = shard_folder(out, number), job.chunk(number)
    temporary = out / f".{folder.name}-{socket.gethostname()}-{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_jsonl(temporary / "index.jsonl", work(chunk, temporary))
    files = {
        entry.name: {"bytes": entry.stat().st_size, "digest": file_digest(Path(entry.path))}
        for entry in os.scandir(temporary)
    }
    write_json(temporary / "shard.json", {"num_items": len(chunk), "files": files})
    bring_to_disk(temporary)
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or shard_problem(folder) is not None:
            raise
        shutil.rmtree(temporary, ignore_errors=True)


FILE_FIELDS = frozenset({"file", "label", "confidence", "truth_file"})
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
