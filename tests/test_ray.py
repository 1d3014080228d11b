"""A stage's shards over a real Ray cluster of two nodes: the same bytes, also when a node dies.

make test-ray
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows.steps import StageError
from tests.test_faults import SHARED, digests, start
from tests.test_stages_crew import COUNT, make, shards_of

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[1]
PAUSE_S = 0.4
"""Time for one number of the toy, so that a node can be killed in the middle of a shard."""
STARTS = 4
"""How often a node is started: Ray itself gives it 30 seconds, too few on a busy machine."""


class Cluster:
    """Ray nodes on the loopback, started as a user starts them."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.env = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
        self.env |= {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "20",  # a busy machine is not dead
            "TOY_PAUSE_S": str(PAUSE_S),
        }
        self.logs = folder
        self.nodes: list[subprocess.Popen] = []

    def add(self, *, hiding: Path | None = None) -> subprocess.Popen:
        """Start a node of one core; `hiding`: it sees an empty folder there."""
        where = ["--address", self.address]
        if not self.nodes:
            port = self.address.split(":")[1]
            where = ["--head", "--port", port, "--include-dashboard=false"]
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", *where]
        words += ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0", "--block"]
        words += ["--object-store-memory=80000000", "--disable-usage-stats"]
        if hiding is not None:
            script = 'mount -t tmpfs none "$0" && exec "$@"'
            words = ["unshare", "--mount", "sh", "-c", script, str(hiding), *words]
        for _ in range(STARTS):
            with (self.logs / f"node{len(self.nodes)}.log").open("w") as log:
                node = subprocess.Popen(words, env=self.env, stdout=log, stderr=log)
            self.nodes.append(node)
            self.wait(node)
            if node.poll() is None:
                return node
            self.nodes.remove(node)
        raise AssertionError(f"no node starts: see {self.logs}")

    def wait(self, newest: subprocess.Popen | None = None) -> None:
        """Until all nodes are alive for the cluster, or the newest has given up."""
        code = (
            f"import ray; ray.init('{self.address}', log_to_driver=False, logging_level='error'); "
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        deadline = time.monotonic() + 600
        while newest is None or newest.poll() is None:
            done = subprocess.run(
                [sys.executable, "-c", code], env=self.env, capture_output=True, text=True
            )
            if done.stdout.strip() == str(sum(node.poll() is None for node in self.nodes)):
                return
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.5)

    def kill(self, node: subprocess.Popen) -> None:
        """kill -9 of a node and all its processes."""
        for process in [*family(node.pid), psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        node.wait(timeout=20)


def family(pid):
    return psutil.Process(pid).children(recursive=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    made = Cluster(tmp_path_factory.mktemp("ray"))
    try:
        made.add()
        made.add()
        yield made
    finally:
        for node in reversed(made.nodes):
            if node.poll() is None:
                made.kill(node)


@pytest.fixture
def two_nodes(cluster, monkeypatch):
    """The cluster with both nodes alive, which runs find as a user's would."""
    if sum(node.poll() is None for node in cluster.nodes) < 2:
        cluster.add()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return cluster


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    make(root, 1)
    return shards_of(root)


def test_two_nodes_make_what_one_process_makes(tmp_path, two_nodes, expected):
    ears = make(tmp_path, 1, engine="ray")
    assert shards_of(tmp_path) == expected
    assert ears.done == COUNT
    assert any(text.startswith("2 Ray nodes share") for text in ears.said)


def test_a_node_killed_in_the_middle_changes_nothing(tmp_path, two_nodes, expected):
    node = two_nodes.nodes[-1]
    heard = []
    run = threading.Thread(target=lambda: heard.append(make(tmp_path, 1, engine="ray")))
    run.start()
    deadline = time.monotonic() + 600
    while not (held := held_by(tmp_path, node)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    two_nodes.kill(node)
    assert (lost := held[0]).is_dir(), "it was in the middle of a shard"
    run.join(timeout=900)
    assert heard, "the run has ended well"
    assert heard[0].done == COUNT
    assert shards_of(tmp_path) == expected
    assert not lost.exists()


def held_by(root, node):
    """Unfinished shards of a node: their folders' names end in the process that writes them."""
    pids = {process.pid for process in family(node.pid)}
    halves = root.glob("numbers/.staging-*/.shard-*.tmp")
    return [half for half in halves if int(half.stem.rsplit("-", 1)[1]) in pids]


def test_a_mistake_on_a_node_is_told_as_it_was(tmp_path, two_nodes):
    with pytest.raises(StageError, match=r"modulo.*zero") as caught:
        make_with(tmp_path, modulus=0)
    assert "ray_crew" in str(caught.value.error.__notes__)


def make_with(root, **toy):
    from tests.toy_pipeline import Ears, engine, in_process

    made = engine(root, toy=toy, run={"engine": "ray"})
    made.store.open()
    made.run_one(made.instances["numbers"], listener=Ears(), execute=in_process)


def test_a_node_that_does_not_share_the_folder_is_named_before_any_work(tmp_path, two_nodes):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace of its own for a node here (not root)")
    stranger = two_nodes.add(hiding=tmp_path)
    try:
        with pytest.raises(StageError, match=r"does not share .*same path") as caught:
            make(tmp_path, 1, engine="ray")
        assert caught.value.user
        assert not list(tmp_path.glob("numbers/.staging-*/shard-*"))
    finally:
        two_nodes.kill(stranger)
        two_nodes.wait()


def test_a_run_without_a_cluster_says_how_to_start_one(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(StageError, match=r"RAY_ADDRESS is .*ray start --head") as caught:
        make(tmp_path, 1, engine="ray")
    assert caught.value.user


def test_real_stages_over_two_nodes_leave_the_same_artifacts(tmp_path, two_nodes):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    process = start(alone, "--until", "refine")
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    shutil.copytree(alone, shared, symlinks=True)
    words = ["--from", SHARED[0], "--until", SHARED[-1], "--set", "run.engine=ray"]
    process = start(shared, *words, *(f"--force={name}" for name in SHARED))
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    assert "2 Ray nodes share" in output
    assert digests(shared) == digests(alone)
