"""A stage's shards made by the nodes of a Ray cluster: one task per shard, results on shared disk.

    ray start --head                         on one machine
    ray start --address=HEAD:6379            on the others
    clouds --set run.engine=ray              on one of them (RAY_ADDRESS names a cluster elsewhere)

A task writes its shard into the stage's folder as a local process does, so nothing but a number
travels. A task whose node or process dies is run again by Ray, on another node if need be; a node
that was only believed dead makes the same bytes in a folder of its own, and the first to finish is
kept. What is assumed of the nodes is tried out before the first task (`_look_from`): they see the
stage's folder under the same path, can write there, and what one renames the others see.

On CPUs bits depend on the number of threads: set OMP_NUM_THREADS where runs shall be compared.
"""

import contextlib
import fcntl
import json
import os
import socket
import traceback
import uuid
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from stages.children import PATIENCE, Spec, StageFailed, StageKilled, as_error, told_error
from stages.contracts import Progress
from stages.memory import peak_memory_bytes
from stages.shards import ShardJob, Work, make_shard, shard_folder, shard_problem
from stages.specs import Opened, open_spec

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "run.engine=ray needs Ray, which is not installed: pip install 'clouds-pipeline[ray]', or "
        "run.engine=local.",
        name=error.name,
    ) from error

RETRIES = 3
"""How often Ray runs a task again whose process or node died."""
ANSWER_TIMEOUT_S = 10.0
"""Longest wait for somebody to listen at RAY_ADDRESS."""
LOOK_TIMEOUT_S = 120.0
"""Longest wait for a node's answer before the first task."""
SEEN_WITHIN_S = 90.0
"""Longest wait until what a node renamed is seen here: longer than NFS remembers attributes."""
_PASSED_ON = ("OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE")
"""Environment of this process that tasks must have too, to make the same."""


def make_shards(spec: Spec, job: ShardJob, missing: Sequence[int], progress: Progress) -> int:
    """Have the missing shards made by the cluster.

    Args:
        spec: of the stage, see `stages/launch.py`.
        job: the stage's work.
        missing: numbers of the shards to make.
        progress: told the items of each finished shard.

    Returns:
        Peak memory of the process that held most, in bytes.

    Raises:
        ConnectionError: no cluster answers.
        ValueError: a GPU is asked for and the cluster has none, or its nodes do not share the
            stage's folder.
        StageKilled: a shard's tasks died again and again.
        Exception: what a task raised.
    """
    with _cluster():
        out = Path(spec["out"])
        progress.note(_look_around(out))
        resources = _resources(spec["recipe"]["run"]["device"])
        task = ray.remote(max_retries=RETRIES, **resources)(_make_shard)
        text = json.dumps(spec)
        pending = {task.remote(text, number): number for number in missing}
        noted: set[str] = set()
        peak = 0
        while pending:
            ready, _ = ray.wait(list(pending), timeout=1.0)
            for reference in ready:
                told = _result(reference, str(spec["stage"]), pending.pop(reference))
                for note in set(told["notes"]) - noted:
                    progress.note(note)
                noted.update(told["notes"])
                _must_be_seen(shard_folder(out, told["number"]), told["host"])
                progress.advance(len(job.chunk(told["number"])))
                peak = max(peak, told["peak"])
        return peak


@contextlib.contextmanager
def _cluster() -> Any:
    """A connection to the running cluster; tasks still pending at the end are cancelled with it."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    try:
        _must_answer(os.environ.get("RAY_ADDRESS", ""))
        ray.init(
            address="auto",
            log_to_driver=False,
            logging_level="warning",
            runtime_env={"env_vars": {**PATIENCE, **env, "PYTHONPATH": path}},
        )
    except OSError as error:
        raise ConnectionError(
            f"run.engine=ray found no Ray cluster ({str(error).splitlines()[0]}): start one with "
            f"`ray start --head`, set RAY_ADDRESS to one that runs, or use run.engine=local."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _must_answer(address: str) -> None:
    """Refuse at once an address where nobody listens: Ray itself tries for many minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_S).close()
        except OSError as error:
            raise OSError(f"RAY_ADDRESS is {address!r}: {error}") from error


def _resources(device: str) -> dict[str, float]:
    """What a task takes: a core, and a GPU if it will compute on one."""
    if device.startswith("cuda:"):
        raise ValueError(
            f"run.device is {device!r}, but with run.engine=ray the cluster chooses GPUs: use auto "
            f"or cuda."
        )
    gpus = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and not gpus:
        raise ValueError("run.device is 'cuda', but no node of the Ray cluster has a GPU.")
    return {"num_cpus": 1, "num_gpus": int(device != "cpu" and gpus > 0)}


def _result(reference: Any, stage: str, number: int) -> Mapping[str, Any]:
    try:
        told = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise StageKilled(
            f"{stage}: shard {number} was given out {RETRIES + 1} times, and its process or node "
            f"died each time (out of memory?): {error}"
        ) from error
    if told.get("error"):
        raise as_error(stage, told["error"])
    return told


# --- on the nodes --------------------------------------------------------------------------------


class _Notes:
    """Progress of a task: its notes travel back with its result."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        pass

    def advance(self, count: int = 1, **metrics: float) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def taken(self) -> list[str]:
        """What was noted since the last time."""
        notes, self.notes = self.notes, []
        return notes


@lru_cache(maxsize=1)
def _opened(spec_text: str) -> tuple[Opened, ShardJob, Work, _Notes]:
    """A process of the cluster loads a stage's networks once, for all shards it gets."""
    notes = _Notes()
    opened = open_spec(json.loads(spec_text))
    job = opened.shards(notes)
    return opened, job, job.open(notes), notes


def _make_shard(spec_text: str, number: int) -> dict[str, Any]:
    try:
        opened, job, work, notes = _opened(spec_text)
        folder = shard_folder(opened.out, number)
        if not folder.is_dir() or shard_problem(folder) is not None:
            make_shard(opened.out, number, job, work)
    except Exception as error:
        return {"error": told_error(error, traceback.format_exc())}
    return {
        "number": number,
        "host": socket.gethostname(),
        "notes": notes.taken(),
        "peak": peak_memory_bytes(),
    }


# --- what is assumed of the disk they share ------------------------------------------------------


def _look_around(out: Path) -> str:
    """Let every node look at the stage's folder; one line on what was found.

    Raises:
        ValueError: a node does not see what is here, or what it wrote is not seen here.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    token = uuid.uuid4().hex
    probe = out / f".probe-{token}"
    probe.write_text(token)
    try:
        with probe.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            answers = {
                ray.remote(
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                )(_look_from).remote(str(probe), token): node
                for node in nodes
            }
            told = [(node, _answer(reference, node, out)) for reference, node in answers.items()]
        nodes = [node for node, lock in told if lock is not None]
        gone = [node["NodeManagerHostname"] for node, lock in told if lock is None]
        if not nodes:
            raise StageFailed(f"no Ray node is left: {', '.join(gone)} ended while looked at")
        for node in nodes:
            _must_be_seen(out / f".probe-{token}-{node['NodeID']}", node["NodeManagerHostname"])
    finally:
        for left in out.glob(f".probe-{token}*"):
            left.unlink(missing_ok=True)
    text = f"{len(nodes)} Ray nodes share {out}"
    if gone:
        text += f"; {', '.join(gone)} ended meanwhile, the others do its share"
    if not all(lock for _, lock in told if lock is not None):
        text += "; file locks do not reach all of them: start its runs from one machine only"
    return text


def _answer(reference: Any, node: Mapping[str, Any], out: Path) -> bool | None:
    """Whether locks reach a node; None if it is there no more, which Ray notices after a while."""
    host = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    try:
        problem, locked = ray.get(reference, timeout=LOOK_TIMEOUT_S)
    except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
        return None
    except ray.exceptions.RayError as error:
        raise StageFailed(f"the Ray node {host} did not answer: {error}") from error
    if problem:
        raise ValueError(
            f"the Ray node {host} does not share {out} ({problem}): --artifacts must name a folder "
            f"that all nodes mount under the same path and may write to."
        )
    return locked


def _look_from(probe: str, token: str) -> tuple[str | None, bool]:
    """From a node: what is wrong with the shared folder, and whether its locks reach this node."""
    path = Path(probe)
    try:
        with path.open() as file:
            if file.read() != token:
                return "the probe file there is another", False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = False
            except BlockingIOError:
                locked = True
        mine = path.with_name(f"{path.name}-{ray.get_runtime_context().get_node_id()}")
        temporary = mine.with_name(mine.name + ".tmp")
        temporary.write_text(token)
        temporary.rename(mine)
    except OSError as error:
        return str(error), False
    return None, locked


def _must_be_seen(path: Path, host: str) -> None:
    """Wait until what another node renamed into place is there for this one too."""
    deadline = monotonic() + SEEN_WITHIN_S
    while not path.exists():
        os.scandir(path.parent).close()  # lets NFS look again
        if monotonic() > deadline:
            raise ValueError(
                f"{host} has written {path}, but it is not seen here: the artifacts folder must "
                f"lie on a file system that all Ray nodes share."
            )
        sleep(0.1)
