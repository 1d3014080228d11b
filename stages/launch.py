"""Run one stage, in this process or in a process group of its own that can be ended for certain.

    execute(spec, progress)                  in process
    run_child(spec, progress, timeout_s=60)  in a child: python -m stages.launch SPEC.json PARENT

A spec is plain JSON: {"stage", "verb", "round", "leg", "sections", "recipe", "recipe_class", "out",
"inputs": {role: folder, or {name: folder}}}. A child stops when its parent is gone; what it tells
is described in `stages/children.py`. No torch, no Prefect here.

Training stages run in `run.processes` processes: the child lets `accelerate launch` start them from
the same spec file, on several machines with the help of `stages/join.py`. Stages that work in
shards are shared among worker processes by `stages/crew.py`, or among the nodes of a Ray cluster by
`stages/ray_crew.py`.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import IO, Any

from stages.children import (
    GRACE_S,
    USER_ERRORS,
    Spec,
    StageFailed,
    StageKilled,
    Watch,
    be_patient,
    process_group,
    told_error,
    write_spec,
)
from stages.contracts import Progress, Summary
from stages.machines import call_for_machines, is_lost_peer
from stages.memory import peak_memory_bytes
from stages.shards import ShardJob, make_shard, missing_shards
from stages.specs import open_spec

__all__ = ["StageFailed", "StageKilled", "be_patient", "execute", "run_child"]

log = logging.getLogger("stages.launch")  # not __name__: in a child this module is __main__

SPEC_KEYS = frozenset(
    {"stage", "verb", "round", "leg", "sections", "recipe", "recipe_class", "out", "inputs"}
)

RANKED_VERBS = frozenset({"stages.train_source", "stages.self_train"})
"""Stages that share every update among `run.processes` processes."""

PARENT_CHECK_S = 0.2
"""How often a child looks whether its parent lives."""


def execute(spec: Spec, progress: Progress, *, keep_fds: Sequence[int] = ()) -> Summary:
    """Run the stage that `spec` describes, in this process (in others too, if it takes several).

    Args:
        spec: see the top of this module.
        progress: told what the stage tells.
        keep_fds: file descriptors for other processes to inherit, see `run_child`.

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
    opened, peak = open_spec(spec), 0
    if _has_crew(spec) and hasattr(opened.verb, "shards"):
        job = opened.shards(progress)
        missing = missing_shards(opened.out, job)
        if len(missing) > 1:
            peak = _with_crew(spec, job, missing, progress, keep_fds)
            progress = _Finishing(progress)
    summary = opened.verb.run(opened.config, out=opened.out, progress=progress, **opened.inputs)
    return replace(summary, peak_memory_bytes=peak)


def _num_ranks(spec: Spec) -> int:
    run = _settings(spec)
    each, machines = run.get("processes", 1), run.get("machines", 1)
    return each * machines if spec["verb"] in RANKED_VERBS else 1


def _has_crew(spec: Spec) -> bool:
    run = _settings(spec)
    return run.get("engine", "local") != "local" or run.get("processes", 1) > 1


def _settings(spec: Spec) -> Mapping[str, Any]:
    return spec["recipe"].get("run", {})


def _with_crew(
    spec: Spec,
    job: ShardJob,
    missing: Sequence[int],
    progress: Progress,
    keep_fds: Sequence[int],
) -> int:
    """Have the missing shards made by other processes; their largest peak memory in bytes."""
    done = len(job.items) - sum(len(job.chunk(number)) for number in missing)
    progress.start(len(job.items), job.unit, done=done)
    if _settings(spec).get("engine", "local") == "ray":
        from stages import ray_crew

        return ray_crew.make_shards(spec, job, missing, progress)
    from stages import crew

    return crew.make_shards(spec, job, missing, progress, keep_fds=keep_fds)


class _Finishing:
    """Progress for what is left to do once a crew has made all shards: its counts are known."""

    def __init__(self, progress: Progress) -> None:
        self.note = progress.note

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        pass

    def advance(self, count: int = 1, **metrics: float) -> None:
        pass


def run_child(
    spec: Spec,
    progress: Progress,
    timeout_s: float | None = None,
    *,
    keep_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Run the stage in a child process; whatever happens here, its whole group has ended after.

    Args:
        spec: see the top of this module.
        progress: told what the child tells.
        timeout_s: end the child after this many seconds; None: never.
        keep_fds: file descriptors the child inherits, such as that of a lock: a lock held by both
            is free only when the child is gone too, even if this process is killed.
        env: additions to its environment.
        stop: end the child when this is set.

    Raises:
        TimeoutError: the child ran longer than `timeout_s`.
        Stopped: `stop` was set.
        StageFailed: the child died, or failed by an error that is not the user's.
        Exception: one of `USER_ERRORS` that the stage raised, with its message.
    """
    with (
        tempfile.TemporaryDirectory(prefix="clouds-") as folder,
        process_group(write_spec(spec, Path(folder)), keep_fds=keep_fds, env=env) as child,
    ):
        watch = Watch(child, str(spec["stage"]), progress, name=_name_of(spec))
        return watch.until_done(timeout_s, stop)


def _name_of(spec: Spec) -> str:
    """Its instance, in the engine's words."""
    round_, leg = spec["round"], spec["leg"]
    at = f"@{round_}" if round_ is not None else ""
    return f"{spec['stage']}{at}" + (f"#{leg}" if leg is not None else "")


# --- the child's side ----------------------------------------------------------------------------


class _LineProgress:
    """Progress as JSON lines."""

    def __init__(self, stream: IO[str], *, rank: int) -> None:
        self.stream, self.rank, self.lock = stream, rank, threading.Lock()

    def tell(self, event: str, **fields: Any) -> None:
        if self.rank and event != "error":  # what all ranks would tell, the first tells
            return
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

    if os.getpgid(0) != os.getpid():
        raise ValueError("a stage's process must lead a group of its own: see run_child")
    threading.Thread(target=watch, daemon=True).start()


def _lead_ranks(spec: Spec, spec_path: str, progress: _LineProgress) -> int:
    """Let `accelerate launch` start this machine's training processes from the spec file, and wait.

    A rank's own error is told by the rank; what is told here is that one died without a word.
    """
    count, machines = _num_ranks(spec), _settings(spec).get("machines", 1)
    here = count // machines
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // here)
    options = {
        "num_processes": count,
        "num_cpu_threads_per_process": threads,
        "mixed_precision": "no",  # the trainer asks for the recipe's
        "dynamo_backend": "no",
    }
    with call_for_machines(spec, machines) as meeting:
        if meeting.note:
            progress.note(meeting.note)
        words = [f"--{name}={value}" for name, value in (options | meeting.options).items()]
        # --multi_gpu means torchrun; without GPUs the trainer's Accelerator chooses gloo
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *words]
        ranks = subprocess.run(
            [*launcher, "-m", "stages.launch", spec_path, "0"],
            stdin=subprocess.DEVNULL,
            stdout=progress.stream.fileno(),
        )
    if ranks.returncode != 0:
        progress.tell("error", **_lost_rank(count))
    elif meeting.rank:  # the first machine has told the rest
        progress.tell("done", text="", numbers={}, peak=0)
    return ranks.returncode


def _lost_rank(count: int) -> dict[str, str]:
    message = (
        f"one of the {count} training processes was killed, or died without a word (out of "
        f"memory?); the log says which. Run it again to go on from its checkpoint."
    )
    return {"kind": "StageKilled", "message": message, "traceback": ""}


def _make_handed(spec: Spec, progress: _LineProgress) -> Summary:
    """Make the shards whose numbers come line by line on the standard input."""
    opened = open_spec(spec)
    job = opened.shards(progress)
    work = None
    progress.tell("next", made=None)
    for line in sys.stdin:
        work = work or job.open(progress)
        make_shard(opened.out, int(line), job, work)
        progress.tell("next", made=int(line))
    return Summary(text="")


def main(words: Sequence[str] | None = None) -> int:
    """The child: run the stage of the spec file, telling progress on the true standard output."""
    parser = argparse.ArgumentParser(prog="stages.launch")
    parser.add_argument("spec")
    parser.add_argument("parent", type=int, help="process to end with; 0: whoever started this")
    parser.add_argument("--keep-fd", type=int, action="append", default=[])
    parser.add_argument("--shards", action="store_true")
    arguments = parser.parse_args(words)
    rank = os.environ.get("RANK")
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # prints, of libraries too, go to the log
    sys.stdout.reconfigure(line_buffering=True)
    _stop_with_parent(arguments.parent or os.getppid())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    progress = _LineProgress(events, rank=int(rank or 0))
    try:
        spec = json.loads(Path(arguments.spec).read_text(encoding="utf-8"))
        level = _settings(spec).get("log_level", "info").upper()
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        for room in ("stages", "models", "prompts"):  # others only warn
            logging.getLogger(room).setLevel(level)
        log.info("process %d", os.getpid())
        if _num_ranks(spec) > 1 and rank is None:
            return _lead_ranks(spec, arguments.spec, progress)
        if arguments.shards:
            summary = _make_handed(spec, progress)
        else:
            summary = execute(spec, progress, keep_fds=arguments.keep_fd)
    except Exception as error:
        told = told_error(error, traceback.format_exc())
        if rank is not None and is_lost_peer(error):  # on another machine: here it goes unnoticed
            log.info("the others are gone: %s", str(error).partition("\n")[0])
            told = _lost_rank(_num_ranks(spec))
        if progress.rank or (rank is not None and told["kind"] not in USER_ERRORS):
            sleep(GRACE_S)  # another rank's death, or what rank 0 finds too, is better told first
        progress.tell("error", **told)
        return 1
    peak = max(peak_memory_bytes(), summary.peak_memory_bytes)
    progress.tell("done", text=summary.text, numbers=dict(summary.numbers), peak=peak)
    return 0


if __name__ == "__main__":
    sys.exit(main())
