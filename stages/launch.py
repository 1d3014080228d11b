"""Run one stage, in this process or in a process group of its own that can be ended for certain.

    execute(spec, progress)                  in process
    run_child(spec, progress, timeout_s=60)  in a child: python -m stages.launch SPEC.json

A spec is plain JSON: {"stage", "verb", "round", "leg", "sections", "recipe", "recipe_class", "out",
"inputs": {role: folder, or {name: folder}}}. The child tells its progress as one JSON object a line
on its standard output ({"event": "start" | "advance" | "note" | "done" | "error", ...}); whatever
else it prints goes to the log. It stops when its parent is gone. No torch, no Prefect here.

Training stages run in `run.processes` processes of one group: the child is rank 0 and starts the
others with the environment that `torchrun` would give them.
"""

import collections
import contextlib
import importlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

from stages.config import StageConfig
from stages.contracts import Progress, Summary

log = logging.getLogger("stages.launch")  # not __name__: in a child this module is __main__

Spec = Mapping[str, Any]

SPEC_KEYS = frozenset(
    {"stage", "verb", "round", "leg", "sections", "recipe", "recipe_class", "out", "inputs"}
)
USER_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        *(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError),
        *(PermissionError, TimeoutError, ConnectionError, OSError, MemoryError, ImportError),
    )
}
"""Errors that travel back from a child as what they were; anything else becomes StageFailed."""

RANKED_VERBS = frozenset({"stages.train_source", "stages.self_train"})
"""Stages that share their work among `run.processes` processes."""

PATIENCE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of everything that computes, see `be_patient`."""
GRACE_S = 5.0
"""Time between asking a process group to end and killing it."""
PARENT_CHECK_S = 0.2
"""How often a child looks whether its parent lives."""


class StageFailed(RuntimeError):
    """A stage's process ended without a result, or by an error that is our own mistake."""


class StageKilled(StageFailed):
    """A signal ended a stage's process, for want of memory perhaps."""


def be_patient() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user chose otherwise.

    By default they spin: on a machine that is busy with other work, two threads then took ten
    times as long as one. Counts only for what is started, or imports torch, afterwards.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)


def execute(spec: Spec, progress: Progress, *, keep_fds: Sequence[int] = ()) -> Summary:
    """Run the stage that `spec` describes, in this process (in a child, if it takes several).

    Args:
        spec: see the top of this module.
        progress: told what is done.
        keep_fds: file descriptors that a child inherits, see `run_child`.

    Raises:
        ValueError: the spec lacks keys or has unknown ones; and whatever the stage raises.
    """
    if set(spec) != SPEC_KEYS:
        raise ValueError(
            f"a spec has the keys {sorted(SPEC_KEYS)}; missing {sorted(SPEC_KEYS - set(spec))}, "
            f"unknown {sorted(set(spec) - SPEC_KEYS)}"
        )
    if _num_ranks(spec) > 1 and "RANK" not in os.environ:
        return run_child(spec, progress, keep_fds=keep_fds)
    config = StageConfig(
        _imported(spec["recipe_class"]).model_validate(spec["recipe"]),
        stage=spec["stage"],
        sections=tuple(spec["sections"]),
        round=spec["round"],
        leg=spec["leg"],
    )
    inputs = {role: _as_paths(value) for role, value in spec["inputs"].items()}
    verb = importlib.import_module(spec["verb"])
    return verb.run(config, out=Path(spec["out"]), progress=progress, **inputs)


def _num_ranks(spec: Spec) -> int:
    processes = spec["recipe"].get("run", {}).get("processes", 1)
    return processes if spec["verb"] in RANKED_VERBS else 1


def _imported(dotted: str) -> Any:
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


def _as_paths(value: str | Mapping[str, str]) -> Path | dict[str, Path]:
    if isinstance(value, Mapping):
        return {name: Path(path) for name, path in value.items()}
    return Path(value)


# --- the parent's side ---------------------------------------------------------------------------


def run_child(
    spec: Spec,
    progress: Progress,
    timeout_s: float | None = None,
    *,
    keep_fds: Sequence[int] = (),
) -> Summary:
    """Run the stage in a child process; whatever happens here, its whole group has ended after.

    Args:
        spec: see the top of this module.
        progress: told what the child tells.
        timeout_s: end the child after this many seconds; None: never.
        keep_fds: file descriptors the child inherits, such as that of a lock: a lock held by both
            is free only when the child is gone too, even if this process is killed.

    Raises:
        TimeoutError: the child ran longer than `timeout_s`.
        StageFailed: the child died, or failed by an error that is not the user's.
        Exception: one of `USER_ERRORS` that the stage raised, with its message.
    """
    with (
        tempfile.TemporaryDirectory(prefix="clouds-") as folder,
        _process_group(_write_spec(spec, Path(folder)), keep_fds) as child,
    ):
        return _Watch(child, str(spec["stage"]), progress).until_done(timeout_s)


def _write_spec(spec: Spec, folder: Path) -> Path:
    path = folder / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


@contextlib.contextmanager
def _process_group(spec_path: Path, keep_fds: Sequence[int]) -> Iterator[subprocess.Popen]:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(
        [sys.executable, "-m", "stages.launch", str(spec_path), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**PATIENCE, **os.environ, "PYTHONPATH": path},
        pass_fds=tuple(keep_fds),
        start_new_session=True,
    )
    try:
        yield child
    finally:
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


class _Watch:
    """Reads what a child says until it has said how it ended."""

    def __init__(self, child: subprocess.Popen, stage: str, progress: Progress) -> None:
        self.child, self.stage, self.progress = child, stage, progress
        self.lines: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        self.open_streams = {"out", "err"}
        self.last_words: collections.deque[str] = collections.deque(maxlen=20)
        for name, stream in (("out", child.stdout), ("err", child.stderr)):
            threading.Thread(target=self._read, args=(name, stream), daemon=True).start()

    def _read(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self.lines.put((name, line.decode("utf-8", errors="replace").rstrip()))
        self.lines.put((name, None))

    def until_done(self, timeout_s: float | None) -> Summary:
        deadline = None if timeout_s is None else monotonic() + timeout_s
        summary: Summary | None = None
        left_open_since: float | None = None
        while self.open_streams:
            if deadline is not None and monotonic() > deadline:
                break
            try:
                name, line = self.lines.get(timeout=0.1)
            except queue.Empty:
                if _has_exited(self.child):  # its own children may still hold the pipes
                    _signal_group(self.child, signal.SIGKILL)
                    left_open_since = left_open_since or monotonic()
                    if monotonic() - left_open_since > GRACE_S:  # by one that left the group
                        self.open_streams.clear()
                continue
            if line is None:
                self.open_streams.discard(name)
            elif (found := self._take(name, line)) is not None:
                summary, deadline = found, monotonic() + GRACE_S  # for its last words, and to exit
        if summary is not None:
            return summary
        if not self.open_streams:
            raise self._obituary()
        raise TimeoutError(
            f"{self.stage} ran longer than {timeout_s:g} s and was ended; what it finished is "
            f"kept. Raise run.stage_timeout_s, or run it again to go on."
        )

    def _take(self, name: str, line: str) -> Summary | None:
        event = _event(line) if name == "out" else None
        match event:
            case {"event": "start", "total": total, "unit": unit, "done": done}:
                self.progress.start(total, unit, done=done)
            case {"event": "advance", "count": count, "metrics": metrics}:
                self.progress.advance(count, **metrics)
            case {"event": "note", "text": text}:
                self.progress.note(text)
            case {"event": "done", "text": text, "numbers": numbers}:
                return Summary(text=text, numbers=numbers)
            case {"event": "error"}:
                raise self._error(event)
            case _:
                self.last_words.append(line)
                log.log(_level(line), "%s: %s", self.stage, line)
        return None

    def _error(self, event: Mapping[str, str]) -> Exception:
        known = USER_ERRORS.get(event["kind"])
        if known is not None:
            error: Exception = known(event["message"])
        else:
            error = StageFailed(f"{self.stage} failed: {event['kind']}: {event['message']}")
        error.add_note(f"In the stage's process:\n{event['traceback']}")
        return error

    def _obituary(self) -> StageFailed:
        code = self.child.wait()
        kind, how = StageFailed, f"exit code {code}"
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            kind, how = StageKilled, f"signal {signal.Signals(-code).name}{hint}"
        words = "\n".join(self.last_words) or "(it printed nothing)"
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


# --- the child's side ----------------------------------------------------------------------------


class _LineProgress:
    """Progress as JSON lines."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream, self.lock = stream, threading.Lock()

    def tell(self, event: str, **fields: Any) -> None:
        with self.lock:
            self.stream.write(json.dumps({"event": event, **fields}) + "\n")
            self.stream.flush()

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        self.tell("start", total=total, unit=unit, done=done)

    def advance(self, count: int = 1, **metrics: float) -> None:
        self.tell("advance", count=count, metrics=metrics)

    def note(self, text: str) -> None:
        self.tell("note", text=text)


def _stop_with_parent(parent: int) -> None:
    """Kill this whole process group once `parent` is no longer our parent."""

    def watch() -> None:
        while os.getppid() == parent:
            sleep(PARENT_CHECK_S)
        os.killpg(0, signal.SIGKILL)

    if os.getpgid(0) not in (os.getpid(), parent):
        raise ValueError("a stage's process must lead a group of its own: see run_child")
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _other_ranks(count: int, spec_path: str, progress: "_LineProgress") -> Iterator[None]:
    """Make this process rank 0 of `count` and start the others; they end with this group."""
    if count == 1 or "RANK" in os.environ:
        yield
        return
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    command = [sys.executable, "-m", "stages.launch", spec_path, str(os.getpid())]
    others = [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(1, count)
    ]
    for rank, other in enumerate(others, start=1):
        args = (f"training process {rank} of 0..{count - 1}", other, progress)
        threading.Thread(target=_end_with, args=args, daemon=True).start()
    yield
    for other in others:
        other.wait()


def _end_with(name: str, other: subprocess.Popen, progress: "_LineProgress") -> None:
    """If `other` fails, end the group: rank 0 would wait for it for ever."""
    if other.wait() != 0:
        sleep(GRACE_S)  # a mistake that every rank finds is better told by rank 0
        progress.tell(
            "error",
            kind="StageFailed",
            message=f"{name} ended by exit code {other.returncode}; the log has its words",
            traceback="",
        )
        os.killpg(0, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _error_kind(error: BaseException) -> str:
    """The nearest class of `error` that can travel, else its own name."""
    names = [kind.__name__ for kind in type(error).__mro__]
    if "OutOfMemoryError" in names:
        return "MemoryError"
    return next((name for name in names if name in USER_ERRORS), names[0])


def main(spec_path: str, parent: str) -> int:
    """The child: run the stage of the spec file, telling progress on the true standard output."""
    silent = os.environ.get("RANK", "0") != "0"
    target = os.open(os.devnull, os.O_WRONLY) if silent else os.dup(sys.stdout.fileno())
    events = os.fdopen(target, "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # prints, of libraries too, go to the log
    sys.stdout.reconfigure(line_buffering=True)
    _stop_with_parent(int(parent))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    progress = _LineProgress(events)
    try:
        spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
        level = spec["recipe"].get("run", {}).get("log_level", "info").upper()
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        for room in ("stages", "models", "prompts"):  # others only warn
            logging.getLogger(room).setLevel(level)
        log.info("process %d", os.getpid())
        with _other_ranks(_num_ranks(spec), spec_path, progress):
            summary = execute(spec, progress)
    except Exception as error:
        text = traceback.format_exc()
        progress.tell("error", kind=_error_kind(error), message=str(error), traceback=text)
        return 1
    progress.tell("done", text=summary.text, numbers=dict(summary.numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
