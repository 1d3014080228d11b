"""Worker processes of this machine that make a stage's shards, each a whole one at a time.

Every worker asks for the number of its next shard when it has finished one, so that nobody waits
for the slowest share. Seeds and batches follow from the items alone: the shards are the same for
any number of workers. What a worker held when it was killed, or stuck, is given out once more.
"""

import contextlib
import subprocess
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from stages.children import Spec, StageKilled, Stopped, Watch, process_group, write_spec
from stages.contracts import Progress, Summary
from stages.shards import ShardJob

RETRIES = 1
"""How often a shard whose worker died or was stuck is given out again."""
JOIN_EVERY_S = 0.2
"""How often the main thread looks up from waiting, for signals to arrive."""


def make_shards(
    spec: Spec,
    job: ShardJob,
    missing: Sequence[int],
    progress: Progress,
    *,
    keep_fds: Sequence[int] = (),
) -> int:
    """Have the missing shards made by up to `run.processes` worker processes.

    Args:
        spec: of the stage, see `stages/launch.py`.
        job: the stage's work.
        missing: numbers of the shards to make.
        progress: told each item, from several threads but one at a time.
        keep_fds: file descriptors for the workers to inherit.

    Returns:
        Peak memory of the worker that held most, in bytes.

    Raises:
        StageKilled, TimeoutError: a shard's workers died, or were stuck, again and again.
        Exception: what a worker raised; the others have ended.
    """
    run = spec["recipe"]["run"]
    crew = _Crew(str(spec["stage"]), job, missing, progress, run.get("shard_timeout_s"))
    with tempfile.TemporaryDirectory(prefix="clouds-") as folder:
        spec_path = write_spec(spec, Path(folder))
        workers = [
            threading.Thread(target=crew.employ, args=(place, spec_path, keep_fds))
            for place in range(min(run["processes"], len(missing)))
        ]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive():
                    worker.join(JOIN_EVERY_S)
        finally:
            crew.stop.set()
            for worker in workers:
                worker.join()
    if crew.failures:
        raise crew.failures[0]
    return crew.peak_memory_bytes


class _Crew:
    """What several workers have in common: the shards left, and how it went."""

    def __init__(
        self,
        stage: str,
        job: ShardJob,
        missing: Sequence[int],
        progress: Progress,
        timeout_s: float | None,
    ) -> None:
        self.stage, self.job, self.timeout_s = stage, job, timeout_s
        self.left = deque(missing)
        self.lost: Counter[int | None] = Counter()
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self.peak_memory_bytes = 0
        self.progress, self.lock = progress, threading.Lock()
        self._noted: set[str] = set()

    def employ(self, place: int, spec_path: Path, keep_fds: Sequence[int]) -> None:
        """Keep a worker at this place until no shard is left."""
        env = {"LOCAL_RANK": str(place)}
        while self.left and not self.stop.is_set():
            group = process_group(spec_path, keep_fds=keep_fds, shards=True, env=env)
            try:
                with group as child:
                    worker = _Worker(child, self)
                    try:
                        self._gone_home(worker.until_done(None, self.stop))
                    except (StageKilled, TimeoutError) as error:
                        self._give_again(worker, error)
            except Stopped:
                return
            except BaseException as error:
                self.failures.append(error)
                self.stop.set()

    def _gone_home(self, summary: Summary) -> None:
        with self.lock:
            self.peak_memory_bytes = max(self.peak_memory_bytes, summary.peak_memory_bytes)

    def _give_again(self, worker: "_Worker", error: Exception) -> None:
        """Put a lost worker's shard back, unless it was lost before."""
        with self.lock:
            self.lost[worker.shard] += 1
            if self.lost[worker.shard] > RETRIES:
                raise error
            if worker.shard is not None:
                self.left.appendleft(worker.shard)
            self.progress.advance(-worker.advanced)
        what = f"shard {worker.shard}" if worker.shard is not None else "loading"
        self.note(f"a worker of {self.stage} was lost at {what}, which is done again: {error}")

    def note(self, text: str) -> None:
        """Pass on what a worker notes, once: all of them find the same."""
        with self.lock:
            if text not in self._noted:
                self._noted.add(text)
                self.progress.note(text)


class _Worker(Watch):
    """A worker process as its crew sees it; also receives what it tells of its progress."""

    def __init__(self, child: subprocess.Popen, crew: _Crew) -> None:
        super().__init__(child, crew.stage, progress=self)
        self.crew = crew
        self.shard: int | None = None
        self.advanced = 0
        """Items of that shard."""

    def hand_on(self, event: Mapping[str, Any]) -> None:
        """Give the worker its next shard, or send it home."""
        with self.crew.lock:
            self.advanced = 0
            self.shard = self.crew.left.popleft() if self.crew.left else None
        if self.crew.timeout_s is not None:
            self.deadline = monotonic() + self.crew.timeout_s
        with contextlib.suppress(OSError):  # it has died: its end will be heard
            if self.shard is None:
                self.child.stdin.close()
            else:
                self.child.stdin.write(f"{self.shard}\n".encode())
                self.child.stdin.flush()

    def too_long(self, timeout_s: float | None) -> str:
        """What is said of a worker that was stuck."""
        return (
            f"a worker took longer than {self.crew.timeout_s:g} s for shard {self.shard} and was "
            f"ended. Raise run.shard_timeout_s, or lower {self.stage}.shard_size."
        )

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        """The crew's total is known: a worker has none of its own."""

    def advance(self, count: int = 1, **metrics: float) -> None:
        """Count items of the present shard."""
        with self.crew.lock:
            self.advanced += count
            self.crew.progress.advance(count, **metrics)

    def note(self, text: str) -> None:
        """Pass a note on."""
        self.crew.note(text)
