"""Progress that interrupts a stage, and digests of what a stage left, to compare attempts."""

from pathlib import Path

from stages.contracts import VOLATILE
from stages.shards import file_digest
from tests.tiny import Told


class Interrupted(Exception):
    """Stands for Ctrl-C in the middle of a stage."""


class Interrupting(Told):
    """Lets a stage do some units of work, then stops it."""

    def __init__(self, *, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, count: int = 1, **metrics: float) -> None:
        super().advance(count, **metrics)
        if self.advanced >= self.after:
            raise Interrupted


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file that counts in an artifact's digest, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(VOLATILE):
            found[name] = file_digest(path)
    return found
