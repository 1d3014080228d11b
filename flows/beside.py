"""Run several instances at once: those whose inputs are there and which need nothing of each other.

    clouds --set run.beside=2

Each runs in a process of its own; a thread of this one waits for it. They start in the order of the
plan. What is made, and under which key, is the same as one after the other: numbers up to rounding,
where a stage has another number of threads then.
"""

import contextlib
import contextvars
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from flows.engine import Engine
from flows.gpus import gpus_taken, own_gpus
from flows.pipeline import Instance
from flows.steps import Listener, Result
from stages.children import GRACE_S, Stopped
from stages.contracts import Progress, Summary
from stages.launch import run_child

LOOK_UP_S = 0.2
"""How often the main thread looks up from waiting, for signals to arrive."""
STOP_S = 2 * GRACE_S
"""How long a stop waits for what runs; what is left then ends with this process."""

Around = Callable[[Instance, Callable[[], Result]], Result]
ChooseGpus = Callable[[int], contextlib.AbstractContextManager[Mapping[str, str]]]


class ChildExecutor(Protocol):
    """Runs a stage in a child process while others run."""

    def __call__(
        self,
        spec: Mapping[str, Any],
        progress: Progress,
        lock: int,
        *,
        env: Mapping[str, str],
        stop: threading.Event,
    ) -> Summary:
        """As `flows.steps.Executor`, with additions to the child's environment.

        Raises:
            Stopped: `stop` was set; the child has ended.
        """


def in_child(
    spec: Mapping[str, Any],
    progress: Progress,
    lock: int,
    *,
    env: Mapping[str, str],
    stop: threading.Event,
) -> Summary:
    """Run a stage in a child of this process."""
    timeout_s = spec["recipe"]["run"]["stage_timeout_s"]
    return run_child(spec, progress, timeout_s, keep_fds=(lock,), env=env, stop=stop)


def run_beside(
    engine: Engine,
    selected: Sequence[Instance],
    *,
    listener: Listener,
    execute: ChildExecutor,
    around: Around,
    done: Callable[[Result], None],
    choose_gpus: ChooseGpus | None = own_gpus,
) -> None:
    """Run the selected instances, `run.beside` of them at once.

    Args:
        engine: of the recipe.
        selected: the instances, each after what it needs.
        listener: told what happens, by one thread at a time.
        execute: runs a stage in a child.
        around: calls what runs an instance, in the instance's thread.
        done: told every result, in this thread.
        choose_gpus: what gives a stage GPUs of its own; None: `execute` sees to that. On the one
            that `run.device` names they go one after the other in any case.

    Raises:
        Exception: what the first that failed raised, when those that ran beside it have ended.
    """
    _Beside(engine, selected, _InTurn(listener), execute, around, done, choose_gpus).run()


@dataclass(kw_only=True)
class _Job:
    """An instance that runs."""

    instance: Instance
    key: str
    gpus: contextlib.ExitStack
    on_gpu: bool
    thread: threading.Thread = field(init=False)
    computes: bool = False
    """Whether it got as far as its child: only then a stop waits for it. Before, it may wait for
    another run's lock without end, and there is nothing to lose."""


class _Beside:
    """What is left to start, what runs, and how it went."""

    def __init__(
        self,
        engine: Engine,
        selected: Sequence[Instance],
        listener: "_InTurn",
        execute: ChildExecutor,
        around: Around,
        done: Callable[[Result], None],
        choose_gpus: ChooseGpus | None,
    ) -> None:
        self.engine, self.listener = engine, listener
        self.execute, self.around, self.done = execute, around, done
        self.choose_gpus = choose_gpus
        self.count = engine.recipe.run.beside
        self.left = deque(selected)
        self.jobs: dict[str, _Job] = {}
        self.ended: queue.SimpleQueue[tuple[_Job, Result | BaseException]] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.failure: Exception | None = None

    def run(self) -> None:
        """Start and await until all is done, or what ran beside a failure has ended."""
        try:
            while self.jobs or (self.left and self.failure is None):
                if self.failure is None:
                    self._start_ready()
                if self.jobs:
                    self._await_one()
        finally:  # after Ctrl-C, or an error of our own, something runs yet
            self._stop()
        if self.failure is not None:
            raise self.failure

    # Starting

    def _start_ready(self) -> None:
        """Go through the plan once, as long as there is room."""
        gpus_awaited = False
        for instance in list(self.left):
            if len(self.jobs) >= self.count or self.failure is not None:
                return
            pending = {*self.jobs, *(one.name for one in self.left)} - {instance.name}
            if any(entry.instance in pending for entry in instance.inputs):
                continue
            on_gpu = gpus_taken(instance.contract, instance.recipe) > 0
            if not (on_gpu and gpus_awaited):  # nobody overtakes who waits for a GPU
                try:
                    gpus_awaited |= not self._start(instance, on_gpu=on_gpu) and on_gpu
                except Exception as error:
                    self._fail(instance, error)

    def _start(self, instance: Instance, *, on_gpu: bool) -> bool:
        """Start an instance, unless it has to wait for one that runs; what is done is only told."""
        (step,) = self.engine.plan([instance])
        if step.action != "run" or step.key is None:
            self.left.remove(instance)
            run_it = partial(
                self.engine.run_one,
                instance,
                listener=self.listener,
                execute=partial(self.execute, env={}, stop=self.stop),
                in_child=True,
            )
            self.done(self.around(instance, run_it))
            return True
        if self._is_made(instance, step.key) or self._needs_the_same_machines(instance):
            return False
        gpus = contextlib.ExitStack()
        chosen = self._gpus_for(instance, gpus) if on_gpu else {}
        if chosen is None:
            return False
        job = _Job(instance=instance, key=step.key, gpus=gpus, on_gpu=on_gpu)
        env = {**_threads(instance, self.count), **chosen}
        # in the context of this thread: by it Prefect knows the flow that a task belongs to
        work = partial(contextvars.copy_context().run, self._work, job, env)
        job.thread = threading.Thread(target=work, name=instance.name, daemon=True)
        self.left.remove(instance)
        self.jobs[instance.name] = job
        job.thread.start()
        return True

    def _is_made(self, instance: Instance, key: str) -> bool:
        """Whether the same artifact is being made, for another leg."""
        return any(
            (job.instance.stage, job.instance.round, job.key)
            == (instance.stage, instance.round, key)
            for job in self.jobs.values()
        )

    def _needs_the_same_machines(self, instance: Instance) -> bool:
        """Whether other machines, which help one training at a time, are busy with one of ours."""
        return _calls_machines(instance) and any(
            _calls_machines(job.instance) for job in self.jobs.values()
        )

    def _gpus_for(self, instance: Instance, held: contextlib.ExitStack) -> Mapping[str, str] | None:
        """The environment in which it sees GPUs of its own; None: it waits for those that run."""
        env: Mapping[str, str] = {}
        if ":" not in instance.recipe.run.device:  # else the user chose the one that all wait for
            if self.choose_gpus is None:
                return env
            count = gpus_taken(instance.contract, instance.recipe)
            env = held.enter_context(self.choose_gpus(count))
        if not env and any(job.on_gpu for job in self.jobs.values()):
            held.close()
            return None
        return env

    # In an instance's thread

    def _work(self, job: _Job, env: Mapping[str, str]) -> None:
        def execute(spec: Mapping[str, Any], progress: Progress, lock: int) -> Summary:
            job.computes = True  # before the look at `stop`: who sets that looks at this after
            try:
                if self.stop.is_set():
                    raise Stopped
                return self.execute(spec, progress, lock, env=env, stop=self.stop)
            except Stopped:
                raise KeyboardInterrupt from None

        run_it = partial(
            self.engine.run_one,
            job.instance,
            listener=self.listener,
            execute=execute,
            in_child=True,
        )
        try:
            outcome: Result | BaseException = self.around(job.instance, run_it)
        except BaseException as error:
            outcome = error
        self.ended.put((job, outcome))

    # Ending

    def _await_one(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                job, outcome = self.ended.get(timeout=LOOK_UP_S)
                break
        job.thread.join()
        job.gpus.close()
        del self.jobs[job.instance.name]
        if isinstance(outcome, Result):
            self.done(outcome)
        elif isinstance(outcome, Exception):
            self._fail(job.instance, outcome)
        else:
            raise outcome

    def _fail(self, instance: Instance, error: Exception) -> None:
        """Start nothing more; what runs is finished and committed."""
        if self.failure is not None:
            self.listener.say(f"{instance.name} failed too: {error}")
            return
        self.failure = error
        if self.jobs:
            names = ", ".join(self.jobs)
            self.listener.say(f"{instance.name} failed; first what runs is finished: {names}")

    def _stop(self) -> None:
        """End what runs; it goes on from there another time."""
        self.stop.set()
        deadline = time.monotonic() + STOP_S
        for job in self.jobs.values():
            while job.computes and job.thread.is_alive() and time.monotonic() < deadline:
                job.thread.join(LOOK_UP_S)
            job.gpus.close()


def threads_each(count: int, processes: int = 1) -> int:
    """Threads for each of `count` stages at once in `processes` processes each; 1 at least."""
    return max(1, len(os.sched_getaffinity(0)) // (count * processes))


def _threads(instance: Instance, count: int) -> Mapping[str, str]:
    """The environment that shares the cores out; always the same, for sums depend on threads."""
    run, shared = instance.recipe.run, instance.contract.shared
    elsewhere = shared == "shards" and run.engine != "local"
    if elsewhere or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(threads_each(count, run.processes if shared else 1))}


def _calls_machines(instance: Instance) -> bool:
    return instance.contract.shared == "updates" and instance.recipe.run.machines > 1


class _InTurn:
    """Passes on what several threads tell, one at a time."""

    def __init__(self, listener: Listener) -> None:
        self._listener, self._lock = listener, threading.Lock()

    def say(self, text: str) -> None:
        with self._lock:
            self._listener.say(text)

    def stage_started(self, instance: Instance, resumes: str | None) -> Progress:
        with self._lock:
            told = self._listener.stage_started(instance, resumes)
        return _ProgressInTurn(told, self._lock)

    def stage_finished(self, instance: Instance, result: Result) -> None:
        with self._lock:
            self._listener.stage_finished(instance, result)


class _ProgressInTurn:
    """One instance's progress, told under the lock of all."""

    def __init__(self, told: Progress, lock: threading.Lock) -> None:
        self._told, self._lock = told, lock

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        with self._lock:
            self._told.start(total, unit, done=done)

    def advance(self, count: int = 1, **metrics: float) -> None:
        with self._lock:
            self._told.advance(count, **metrics)

    def note(self, text: str) -> None:
        with self._lock:
            self._told.note(text)
