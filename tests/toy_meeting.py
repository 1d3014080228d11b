"""A toy stage that tells when it ran and waits for others, for what runs beside what. No torch."""

import json
import os
import time
from pathlib import Path

from stages.config import StageConfig
from stages.contracts import Progress, Summary

PATIENCE_S = 120.0


def run(config: StageConfig, *, out: Path, progress: Progress, **inputs: Path) -> Summary:
    """Write the inputs' texts; TOY_ORDERS says of each stage what it awaits, and how it fails."""
    name = config.stage + (f"#{config.leg}" if config.leg else "")
    orders = json.loads(os.environ.get("TOY_ORDERS", "{}")).get(name, {})
    progress.start(2, "visits")
    tell(name, "began")
    for event in orders.get("awaits", ()):
        await_event(event)
    if "fails" in orders:
        tell(name, "failed")
        raise {"ValueError": ValueError, "MemoryError": MemoryError}[orders["fails"]]("as ordered")
    texts = [(inputs[role] / "text.txt").read_text() for role in sorted(inputs)]
    (out / "text.txt").write_text(f"{config.stage}({', '.join(texts)})")
    progress.note("all visited")
    progress.advance(2)
    tell(name, "ended")
    return Summary(text=f"{len(texts)} texts")


def events() -> Path:
    """The folder of what was told: a file for each event, which holds facts of the process."""
    return Path(os.environ["TOY_MEETING"])


def tell(name: str, what: str) -> None:
    """Leave an event for others to find."""
    facts = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    path = events() / f"{name} {what}"
    path.with_suffix(".tmp").write_text(
        json.dumps({**facts, "pid": os.getpid(), "when": time.time()})
    )
    path.with_suffix(".tmp").replace(path)


def await_event(event: str) -> None:
    """Wait until an event was told.

    Raises:
        TimeoutError: it was not.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (events() / event).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{event!r} was awaited in vain")
        time.sleep(0.02)
