"""Worker processes that make whole shards: the same bytes, whatever happens to a worker."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.outputs import problems_of
from flows.steps import StageError
from flows.store import Store
from stages.crew import RETRIES
from tests.toy_pipeline import Ears, engine, in_process

ROOT = Path(__file__).resolve().parents[1]
COUNT = 12
"""Numbers of the toy: four shards of three."""


class Counting(Ears):
    """Also counts what was advanced, and whom it heard at once."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    def start(self, total, unit, *, done=0):
        super().start(total, unit, done=done)
        self.done = done

    def advance(self, count=1, **metrics):
        self.done += count


def make(root, processes, **run):
    """The toy's numbers by so many workers; what was heard."""
    ears = Counting()
    made = engine(root, run={"processes": processes, **run})
    made.store.open()
    made.run_one(made.instances["numbers"], listener=ears, execute=in_process)
    return ears


def shards_of(root):
    """Bytes of every file in the committed shards."""
    store = Store(root)
    (folder,) = store.artifacts("numbers")
    assert problems_of(folder, store.manifest(folder), full=True) == []
    files = sorted(path for path in folder.glob("shard-*/*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What one process makes, without a crew."""
    root = tmp_path_factory.mktemp("alone")
    make(root, 1)
    return shards_of(root)


def test_shards_are_the_same_for_any_number_of_workers(tmp_path, expected):
    for processes in (2, 7):
        ears = make(tmp_path / str(processes), processes)
        assert shards_of(tmp_path / str(processes)) == expected
        assert ears.done == COUNT
        assert ears.said == [f"0/{COUNT} numbers"]


@pytest.mark.parametrize(
    ("misfortune", "run", "told"),
    [
        ({"TOY_KILL_ONCE": "7"}, {}, "ended by signal SIGKILL"),
        ({"TOY_HANG_ONCE": "7"}, {"shard_timeout_s": 8.0}, "took longer than 8 s for shard 2"),
    ],
)
def test_a_lost_workers_shard_is_made_by_another(
    tmp_path, expected, monkeypatch, misfortune, run, told
):
    for name, value in misfortune.items():
        monkeypatch.setenv(name, value)
    ears = make(tmp_path, 2, **run)
    assert shards_of(tmp_path) == expected
    assert ears.done == COUNT, "items of the lost shard are not counted twice"
    (note,) = [text for text in ears.said if "was lost at shard 2" in text]
    assert told in note


def test_a_shard_that_kills_every_worker_ends_the_stage_and_keeps_the_others(
    tmp_path, expected, monkeypatch
):
    monkeypatch.setenv("TOY_KILL_AT", "11")
    with pytest.raises(StageError, match="ended by signal SIGKILL"):
        make(tmp_path, 2)
    assert len(list(tmp_path.glob("numbers/.staging-*/shard-*"))) == 3
    monkeypatch.delenv("TOY_KILL_AT")
    assert make(tmp_path, 2).said == [f"9/{COUNT} numbers"]
    assert shards_of(tmp_path) == expected
    assert RETRIES == 1


def test_a_mistake_ends_all_workers_and_is_told_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_FAIL_AT", "4")
    monkeypatch.setenv("TOY_HANG_ONCE", "0")
    with pytest.raises(StageError, match="item 4 is bad") as caught:
        make(tmp_path, 2)
    assert caught.value.user
    assert not workers()


def workers(parent=None):
    """Worker processes below a process that still run."""
    children = psutil.Process(parent).children(recursive=True)
    return [
        child
        for child in children
        if child.status() != psutil.STATUS_ZOMBIE and "stages.launch" in child.cmdline()
    ]


RUN_TOY = """
import sys
from pathlib import Path
from tests.test_stages_crew import make
make(Path(sys.argv[1]), 2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_coordinator(tmp_path, expected, how):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_TOY, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TOY_PAUSE_S": "0.3"},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("numbers/.staging-*/shard-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    crew = workers(process.pid)
    assert len(crew) == 2
    process.send_signal(how)
    process.wait(timeout=30)
    _, alive = psutil.wait_procs(crew, timeout=5)
    assert not alive
    assert make(tmp_path, 2).said[0].split("/")[0] >= "3"
    assert shards_of(tmp_path) == expected
