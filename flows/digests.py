"""Digests of values and of listings of files, and the keys made of them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY_CHARS = 20


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(ingredients: Mapping[str, Any]) -> str:
    """The key that a set of ingredients gives."""
    return digest_of(ingredients)[:KEY_CHARS]


def listing_digest(folders: list[Path], base: Path) -> str:
    """Digest of the names, sizes and times of all files below folders (not of their bytes)."""
    lines: list[str] = []
    for folder in folders:
        _list_into(lines, os.fspath(folder), os.fspath(base))
    lines.sort()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:KEY_CHARS]


def _list_into(
    lines: list[str], folder: str, base: str, inside: frozenset[str] = frozenset()
) -> None:
    """Add a line for every file; `inside` holds the real paths of the folders around this one."""
    real = os.path.realpath(folder)
    if real in inside:  # a link that leads back
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                _list_into(lines, entry.path, base, inside | {real})
                continue
            with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
                stat = entry.stat()
                name = os.path.relpath(entry.path, base)
                lines.append(f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}")
