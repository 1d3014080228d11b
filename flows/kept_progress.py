"""The newest progress of a stage, kept in a file for `status` and `plan`."""

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

from stages.contracts import Progress

PROGRESS_EVERY_S = 1.0


class KeptProgress:
    """Passes progress on, and keeps the newest in a file for `status` and `plan`."""

    def __init__(self, path: Path, listener: Progress) -> None:
        self._path, self._listener = path, listener
        self._total, self._done, self._unit = 0, 0, ""
        self._found = 0
        self._began: float | None = None
        self._saved = 0.0

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        self._total, self._unit, self._done, self._found = total, unit, done, done
        self._began = self._began or time.perf_counter()
        self._listener.start(total, unit, done=done)
        self.save()

    def advance(self, count: int = 1, **metrics: float) -> None:
        self._done += count
        self._listener.advance(count, **metrics)
        if time.monotonic() - self._saved > PROGRESS_EVERY_S:
            self.save()

    def note(self, text: str) -> None:
        self._listener.note(text)

    def save(self) -> None:
        """Write the newest state, unless the disk refuses (progress is no reason to stop)."""
        self._saved = time.monotonic()
        record = {
            "total": self._total,
            "done": self._done,
            "unit": self._unit,
            "pid": os.getpid(),
            "updated": now(),
        }
        try:
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(json.dumps(record))
            temporary.replace(self._path)
        except OSError:
            return

    def work(self) -> dict[str, Any]:
        """Units done in this attempt and the seconds since work began, for rates."""
        told = {"total": self._total, "done": self._done - self._found, "unit": self._unit}
        if self._began is not None:
            told["seconds"] = round(time.perf_counter() - self._began, 3)
        return told


def now() -> str:
    """This instant in UTC, in the form that manifests and records hold."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
