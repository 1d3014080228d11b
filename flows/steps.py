"""What passes between the engine and its users: artifacts, steps, results, errors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from flows.pipeline import Instance
from stages.contracts import Progress, Summary

Action = Literal["run", "skip", "may run", "blocked"]
"""blocked: an input is not there, and not part of what was selected."""


class MissingNeedError(ValueError):
    """A stage's input is not there; the message names the command that makes it."""


class StageError(Exception):
    """A stage failed. `user` says whether it is a user's mistake (then the message suffices)."""

    def __init__(self, instance: str, error: BaseException, kept: Path) -> None:
        self.instance, self.error, self.kept = instance, error, kept
        self.user = isinstance(error, ValueError | OSError | MemoryError)
        super().__init__(f"{instance}: {error}")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A committed artifact: whose it is, its key, folder and manifest."""

    name: str
    key: str
    folder: Path
    manifest: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a plan says of one instance."""

    instance: Instance
    action: Action
    reason: str
    changes: tuple[str, ...] = ()
    key: str | None = None
    folder: Path | None = None
    resumes: str | None = None
    """Work found from an earlier attempt, such as "400/600 pictures"."""
    held_by: str | None = None
    """Which process works on it right now."""
    last_seconds: float | None = None
    estimate_s: float | None = None
    estimate_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values for `plan --json`."""
        return {
            "instance": self.instance.name,
            "action": self.action.upper(),
            "reason": self.reason,
            "changes": list(self.changes),
            "key": self.key,
            "folder": str(self.folder) if self.folder else None,
            "resumes": self.resumes,
            "held_by": self.held_by,
            "last_seconds": self.last_seconds,
            "estimate_s": self.estimate_s,
            "estimate_bytes": self.estimate_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """What running one instance came to."""

    artifact: Artifact
    cached: bool
    seconds: float
    text: str


class Listener(Protocol):
    """Who is told what happens (the command line, or Prefect)."""

    def stage_started(self, instance: Instance, resumes: str | None) -> Progress:
        """A stage begins; the returned object receives its progress."""

    def stage_finished(self, instance: Instance, result: Result) -> None:
        """A stage ended well, or was found done."""

    def say(self, text: str) -> None:
        """A line for people."""


Executor = Callable[[Mapping[str, Any], Progress, int], Summary]
"""Runs the stage that a spec describes (see `stages/launch.py`) and returns its summary. The last
argument is the file descriptor of the key's lock, for children to inherit."""
