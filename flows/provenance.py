"""Facts about this code and machine that a manifest records: versions, revision, host, device."""

import importlib.metadata
import os
import platform
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = (
    "clouds-pipeline",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "diffusers",
    "transformers",
    "segment-anything",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "prefect",
)


@cache
def facts() -> dict[str, Any]:
    """Versions of code and packages, git revision, host and machine."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "git_revision": _git_revision(),
        "host": socket.gethostname(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """Revision of the checkout this code runs from, "+" if it has changes.

    Outside of one that of the environment, which an image brings along, or None.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return os.environ.get("CLOUDS_REVISION") or None
    try:
        revision = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
