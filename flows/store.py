"""Artifacts on disk: the only authority on what is done.

    artifacts/<instance>/<key>/            outputs and manifest.json, committed by one rename
    artifacts/<instance>/.staging-<key>/   work in progress; a restart continues in it
    artifacts/runs/*.json                  what each run did
    artifacts/latest/                      the newest report and model

A key is the digest of everything that can change the outputs; an artifact's digest is the digest of
its outputs. One writer per key, by `flock` (the kernel frees it when a process dies).
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.digests import KEY_CHARS, digest_of, listing_digest
from flows.filesystem import lacks
from flows.outputs import (
    MANIFEST,
    StoreError,
    describe_outputs,
    output_digest,
    read_json,
)
from stages.shards import bring_to_disk, file_digest, is_plain_name, write_json

LATEST = "latest"
SCRATCH = "state"
"""What a stage keeps for resuming: no output, and removed once the artifact is in place."""


class Store:
    """The artifacts folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._digests: dict[str, Any] | None = None

    # Places

    def folder(self, name: str, key: str) -> Path:
        """Where the artifact of an instance lies once it is committed."""
        return self.root / name / key

    def staging(self, name: str, key: str) -> Path:
        """Where it is being made."""
        return self.root / name / f".staging-{key}"

    def progress_file(self, name: str, key: str) -> Path:
        """Where its newest progress is told while it is being made."""
        return self.root / name / f".progress-{key}.json"

    def failure_file(self, name: str, key: str) -> Path:
        """Where the error of its last attempt is kept."""
        return self.root / name / f".failed-{key}.json"

    def open(self) -> None:
        """Make the folder, and try out what the store takes for granted of its file system.

        Raises:
            StoreError: it cannot be made or written to, or its file system will not do.
        """
        try:
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            problems = lacks(self.root / ".locks")
        except OSError as error:
            raise StoreError(
                f"artifacts folder {str(self.root)!r} cannot be written to ({error.strerror}): "
                f"choose another with --artifacts DIR."
            ) from error
        if problems:
            raise StoreError(
                f"artifacts folder {str(self.root)!r} lies on a file system that finished work "
                f"cannot be entrusted to: {'; '.join(problems)} (see flows/filesystem.py). Choose "
                f"another with --artifacts DIR."
            )

    def must_be_folder(self) -> None:
        """Refuse a root that is something else than a folder; it need not be there yet.

        Raises:
            StoreError: it is a file.
        """
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(
                f"artifacts folder {str(self.root)!r} is no folder: choose another with "
                f"--artifacts DIR."
            )

    # Reading

    def find(self, name: str, key: str) -> Path | None:
        """The committed artifact with this key: the instance's own, or that of another leg."""
        own = self.folder(name, key)
        if (own / MANIFEST).is_file():
            return own
        base = name.split("#")[0]
        for other in [self.root / base, *sorted(self.root.glob(f"{base}#*"))]:
            if (other / key / MANIFEST).is_file():
                return other / key
        return None

    def manifest(self, folder: Path) -> dict[str, Any]:
        """Read an artifact's manifest.

        Raises:
            StoreError: it is missing, no JSON, was altered, or is another artifact's.
        """
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            seal = manifest.pop("seal")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise StoreError(f"{path} is missing or unreadable.") from error
        if seal != digest_of(manifest):
            raise StoreError(f"{path} was altered since it was written.")
        if manifest.get("key") != folder.name:
            raise StoreError(f"{path} is that of another artifact (key {manifest.get('key')!r}).")
        return manifest

    def artifacts(self, name: str | None = None) -> Iterator[Path]:
        """Committed artifacts of one instance, or of all."""
        pattern = f"{name}/*/{MANIFEST}" if name else f"*/*/{MANIFEST}"
        for path in sorted(self.root.glob(pattern)):
            if not path.parent.name.startswith(".") and path.parent.parent.name != LATEST:
                yield path.parent

    def without_manifest(self) -> Iterator[Path]:
        """Folders that lie where artifacts do, under a key, and have lost their manifest."""
        for folder in sorted(self.root.glob("*/" + "[0-9a-f]" * KEY_CHARS)):
            if folder.is_dir() and not (folder / MANIFEST).exists():
                yield folder

    def newest(self, name: str) -> dict[str, Any] | None:
        """The manifest of the instance's most recently finished artifact, or None."""
        best: dict[str, Any] | None = None
        for folder in self.artifacts(name):
            with contextlib.suppress(StoreError):
                manifest = self.manifest(folder)
                if best is None or manifest["finished"] > best["finished"]:
                    best = manifest
        return best

    # Writing

    @contextlib.contextmanager
    def lock(self, name: str, key: str, *, waiting: Callable[[str], None]) -> Iterator[int]:
        """Be the only writer of a key; `waiting` is told who holds it, if anybody does.

        Yields:
            The lock's file descriptor: a child that inherits it holds the lock too.
        """
        path = self.root / ".locks" / f"{name}-{key}"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                waiting(file.read().strip() or "another process")
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield file.fileno()
            finally:
                file.truncate(0)

    def is_locked(self, name: str, key: str) -> str | None:
        """Who holds the lock of a key, or None."""
        path = self.root / ".locks" / f"{name}-{key}"
        with contextlib.suppress(FileNotFoundError), path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
        return None

    def commit(
        self, name: str, key: str, manifest: Mapping[str, Any]
    ) -> tuple[Path, dict[str, Any]]:
        """Seal the staging folder and rename it into place; an older one is moved away first.

        Returns:
            The artifact's folder and its whole manifest.

        Raises:
            StoreError: the stage left nothing, or a link that leads elsewhere.
        """
        staging, final = self.staging(name, key), self.folder(name, key)
        for leftover in [*staging.glob(".*"), *staging.glob("*.tmp")]:  # of interrupted attempts
            _remove(leftover)
        outputs = {
            path: entry
            for path, entry in describe_outputs(staging).items()
            if not path.startswith(f"{SCRATCH}/")
        }
        if not outputs:
            raise StoreError(f"{name} left no output in {staging}.")
        whole = _as_json({**manifest, "outputs": outputs})
        whole["digest"] = output_digest(whole)
        write_json(staging / MANIFEST, whole | {"seal": digest_of(whole)})
        bring_to_disk(staging)
        if final.exists():
            self.trash(final)
        staging.rename(final)
        shutil.rmtree(final / SCRATCH, ignore_errors=True)
        _fsync_folder(final.parent)
        self.progress_file(name, key).unlink(missing_ok=True)
        self.failure_file(name, key).unlink(missing_ok=True)
        return final, whole

    def trash(self, folder: Path) -> None:
        """Remove a folder so that a crash in the middle leaves no half of it under its name."""
        aside = folder.with_name(f".trash-{folder.name}-{os.getpid()}-{time.time_ns()}")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def write_run(self, run: Mapping[str, Any]) -> Path:
        """Record a run (again and again while it goes on)."""
        path = self.root / "runs" / f"{run['id']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
        return path

    def runs(self) -> list[Path]:
        """Run records, oldest first."""
        return sorted((self.root / "runs").glob("*.json"))

    def point_latest(self, name: str, target: Path) -> None:
        """Let `latest/<name>` point at a file or folder of an artifact."""
        link = self.root / LATEST / name
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}-{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target, link.parent))
        temporary.replace(link)

    # Adopted artifacts stand in for an instance whatever its key would be

    def pins(self) -> dict[str, str]:
        """Instance -> key of the adopted artifact that stands in for it.

        Raises:
            StoreError: a name or key is no folder of this store.
        """
        pins = read_json(self.root / "adopted.json") or {}
        for name, key in pins.items():
            if not (is_plain_name(name) and is_plain_name(key)):
                raise StoreError(
                    f"{self.root / 'adopted.json'} names {name!r} {key!r}, which is no artifact of "
                    f"this folder: remove that line."
                )
        return pins

    def pin(self, name: str, key: str | None) -> None:
        """Let an adopted artifact stand in for an instance; None: no longer."""
        with self.lock("adopted", "pins", waiting=lambda who: None):
            pins = self.pins()
            pins.pop(name, None)
            if key is not None:
                pins[name] = key
            write_json(self.root / "adopted.json", pins)

    # Digests of weights and other files outside, remembered by path, size and time

    def outside_digest(self, path: Path) -> str:
        """Digest of a file or folder outside the store."""
        if self._digests is None:
            self._digests = read_json(self.root / "outside.json") or {}
        stamp = _stamp(path)
        remembered = self._digests.get(str(path.resolve()))
        if remembered and remembered["stamp"] == stamp:
            return remembered["digest"]
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_data(p))
        names = {
            (p.name if path.is_file() else p.relative_to(path).as_posix()): file_digest(p)
            for p in files
        }
        digest = digest_of(list(names.values()) if path.is_file() else names)[:KEY_CHARS]
        self._digests[str(path.resolve())] = {"stamp": stamp, "digest": digest}
        with contextlib.suppress(OSError):
            write_json(self.root / "outside.json", self._digests)
        return digest


def _is_data(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")


def _stamp(path: Path) -> str:
    if path.is_file():
        stat = path.stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    return listing_digest([path], path)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
