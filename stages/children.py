"""Child processes that work for a stage: started in a group of their own, heard, ended for certain.

    with process_group(spec_path, keep_fds=[lock]) as child:
        summary = Watch(child, "refine", progress).until_done(timeout_s=60)

The child is `python -m stages.launch SPEC.json PARENT`. It tells what it does as one JSON object a
line on its standard output ({"event": "start" | "advance" | "note" | "next" | "done" | "error",
...}); whatever else it prints goes to the log. No torch, no Prefect here.
"""

import collections
import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

from stages.contracts import Progress, Summary
from stages.memory import is_out_of_memory

log = logging.getLogger("stages.launch")  # one name for what both sides of a launch log

Spec = Mapping[str, Any]

USER_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        *(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError),
        *(PermissionError, TimeoutError, ConnectionError, OSError, MemoryError, ImportError),
    )
}
"""Errors that travel back from a child as what they were; anything else becomes StageFailed."""

PATIENCE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of everything that computes, see `be_patient`."""
GRACE_S = 5.0
"""Time between asking a process group to end and killing it."""


class StageFailed(RuntimeError):
    """A stage's process ended without a result, or by an error that is our own mistake."""


class StageKilled(StageFailed):
    """A signal ended a stage's process, for want of memory perhaps."""


class Stopped(Exception):
    """What a child did is no longer wanted: another one failed."""


def be_patient() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user chose otherwise.

    By default they spin: on a machine that is busy with other work, two threads then took ten
    times as long as one. Counts only for what is started, or imports torch, afterwards.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)


def write_spec(spec: Spec, folder: Path) -> Path:
    """Write a spec where a child reads it."""
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


@contextlib.contextmanager
def process_group(
    spec_path: Path,
    *,
    keep_fds: Sequence[int] = (),
    shards: bool = False,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen]:
    """A child that leads a group of its own; the whole group has ended afterwards.

    Args:
        spec_path: what it does.
        keep_fds: file descriptors it inherits, and hands on to children of its own.
        shards: it makes the shards whose numbers it is handed on its standard input.
        env: additions to its environment.
    """
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "stages.launch", str(spec_path), str(os.getpid())]
    for descriptor in keep_fds:
        command += ["--keep-fd", str(descriptor)]
    child = subprocess.Popen(
        [*command, "--shards"] if shards else command,
        stdin=subprocess.PIPE if shards else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**PATIENCE, **os.environ, "PYTHONPATH": path, **(env or {})},
        pass_fds=tuple(keep_fds),
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()
        _end_group(child)


def _end_group(child: subprocess.Popen) -> None:
    """Ask the group to end, then kill it; the leader is reaped last, so its number stays ours."""
    if not _has_exited(child):
        _signal_group(child, signal.SIGTERM)
        deadline = monotonic() + GRACE_S
        while monotonic() < deadline and not _has_exited(child):
            sleep(0.02)
    _signal_group(child, signal.SIGKILL)
    child.wait()


def _signal_group(child: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _has_exited(child: subprocess.Popen) -> bool:
    """Whether the leader has exited, without reaping it."""
    if child.returncode is not None:
        return True
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


class Watch:
    """Reads what a child says until it has said how it ended."""

    def __init__(
        self, child: subprocess.Popen, stage: str, progress: Progress, *, name: str = ""
    ) -> None:
        self.child, self.stage, self.progress = child, stage, progress
        self.name = name or stage
        """Its instance, for the log: several of one stage may run beside each other."""
        self.deadline: float | None = None
        self._lines: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        self._open_streams = {"out", "err"}
        self._last_words: collections.deque[str] = collections.deque(maxlen=20)
        for name, stream in (("out", child.stdout), ("err", child.stderr)):
            threading.Thread(target=self._read, args=(name, stream), daemon=True).start()

    def _read(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._lines.put((name, line.decode("utf-8", errors="replace").rstrip()))
        self._lines.put((name, None))

    def until_done(self, timeout_s: float | None, stop: threading.Event | None = None) -> Summary:
        """Pass on what the child tells until it ends; end it after `timeout_s`.

        Raises:
            TimeoutError: it took longer.
            Stopped: `stop` was set.
            StageFailed: it died, or failed by an error that is not the user's.
            Exception: one of `USER_ERRORS` that the stage raised, with its message.
        """
        self.deadline = None if timeout_s is None else monotonic() + timeout_s
        summary: Summary | None = None
        left_open_since: float | None = None
        while self._open_streams:
            if self.deadline is not None and monotonic() > self.deadline:
                break
            if stop is not None and stop.is_set():
                raise Stopped
            try:
                name, line = self._lines.get(timeout=0.1)
            except queue.Empty:
                if _has_exited(self.child):  # its own children may still hold the pipes
                    _signal_group(self.child, signal.SIGKILL)
                    left_open_since = left_open_since or monotonic()
                    if monotonic() - left_open_since > GRACE_S:  # by one that left the group
                        self._open_streams.clear()
                continue
            if line is None:
                self._open_streams.discard(name)
            elif (found := self._take(name, line)) is not None:
                # for its last words, and to exit
                summary, self.deadline = found, monotonic() + GRACE_S
        if summary is not None:
            return summary
        if not self._open_streams:
            raise self._obituary()
        raise TimeoutError(self.too_long(timeout_s))

    def too_long(self, timeout_s: float | None) -> str:
        """What to say of a child that was ended for taking too long."""
        return (
            f"{self.stage} ran longer than {timeout_s:g} s and was ended; what it finished is "
            f"kept. Raise run.stage_timeout_s, or run it again to go on."
        )

    def hand_on(self, event: Mapping[str, Any]) -> None:
        """The child asks for the next shard (see `stages/crew.py`)."""
        raise StageFailed(f"{self.stage}: its process asks for work ({event}), but gets none here")

    def _take(self, name: str, line: str) -> Summary | None:
        event = _event(line) if name == "out" else None
        match event:
            case {"event": "start", "total": total, "unit": unit, "done": done}:
                self.progress.start(total, unit, done=done)
            case {"event": "advance", "count": count, "metrics": metrics}:
                self.progress.advance(count, **metrics)
            case {"event": "note", "text": text}:
                self.progress.note(text)
            case {"event": "next"}:
                self.hand_on(event)
            case {"event": "done", "text": text, "numbers": numbers, "peak": peak}:
                return Summary(text=text, numbers=numbers, peak_memory_bytes=peak)
            case {"event": "error"}:
                raise as_error(self.stage, event)
            case _:
                self._last_words.append(line)
                log.log(_level(line), "%s: %s", self.name, line)
        return None

    def _obituary(self) -> StageFailed:
        code = self.child.wait()
        kind, how = StageFailed, f"exit code {code}"
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            kind, how = StageKilled, f"signal {signal.Signals(-code).name}{hint}"
        words = "\n".join(self._last_words) or "(it printed nothing)"
        return kind(
            f"{self.stage}: its process ended by {how} before it was done; it last said:\n{words}"
        )


def _level(line: str) -> int:
    """The level that a child's log line begins with; INFO for anything else it prints."""
    return logging.getLevelNamesMapping().get(line.split(" ", 1)[0], logging.INFO)


def _event(line: str) -> dict[str, Any] | None:
    if not line.startswith('{"event"'):
        return None
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def told_error(error: BaseException, trace: str) -> dict[str, str]:
    """An error as plain words that travel between processes."""
    names = [kind.__name__ for kind in type(error).__mro__]
    kind = next((name for name in names if name in (*USER_ERRORS, *_KINDS)), names[0])
    if is_out_of_memory(error):
        kind = "MemoryError"
    return {"kind": kind, "message": str(error), "traceback": trace}


_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (StageKilled, StageFailed)}


def as_error(stage: str, told: Mapping[str, str]) -> Exception:
    """The error again that `told_error` told of: of a known kind, else StageFailed."""
    known = USER_ERRORS.get(told["kind"]) or _KINDS.get(told["kind"])
    if known is not None:
        error: Exception = known(told["message"])
    else:
        error = StageFailed(f"{stage} failed: {told['kind']}: {told['message']}")
    error.add_note(f"In the stage's process:\n{told['traceback']}")
    return error
