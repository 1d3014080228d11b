"""Whatever dies, and whenever: the same command goes on, and the artifacts are the same.

A whole small run is killed (kill -9, with all its children) at random moments, resumed without any
manual step, and its artifacts' digests are compared with those of an undisturbed run.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.store import Store

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "flows/clouds.py", "--recipe", "tiny"]
LEGS = "legs={control: {self_train.labels: none}, refined: {}}"


def start(artifacts):
    return subprocess.Popen(
        [*COMMAND, "--artifacts", str(artifacts), "--set", LEGS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )


def _heed_ctrl_c():
    """A shell's background jobs ignore Ctrl-C, and so would what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def digests(artifacts):
    """Digest of every artifact but the report (which shows times)."""
    store = Store(artifacts)
    found = {}
    for folder in store.artifacts():
        manifest = store.manifest(folder)
        assert store.problems(folder, manifest, full=True) == []
        if manifest["stage"] != "report":
            found[manifest["instance"]] = (manifest["key"], manifest["digest"])
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Digests of an undisturbed run, and how long it took."""
    artifacts = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    process = start(artifacts)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return digests(artifacts), time.monotonic() - started


def run_with_kills(artifacts, kills, rng, longest_s):
    """Kill the run so many times, then let it end; returns how many kills hit it running."""
    hit = 0
    for _ in range(kills):
        process = start(artifacts)
        try:
            process.communicate(timeout=rng.uniform(0.5, longest_s))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            hit += 1
    process = start(artifacts)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return hit


def test_five_kills_at_random_moments_lose_nothing(tmp_path, undisturbed):
    expected, elapsed_s = undisturbed
    hit = run_with_kills(tmp_path, 5, random.Random(1), longest_s=elapsed_s / 2)
    assert hit >= 3
    assert digests(tmp_path) == expected
    assert not list(tmp_path.glob("*/.staging-*"))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_25_kills_at_random_moments_lose_nothing(tmp_path, undisturbed, seed):
    expected, elapsed_s = undisturbed
    hit = run_with_kills(tmp_path, 5, random.Random(100 + seed), longest_s=elapsed_s / 2)
    assert hit >= 3
    assert digests(tmp_path) == expected


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_middle_of_training_is_calm_and_loses_nothing(tmp_path, stop):
    process = start(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("train_source/.staging-*/state/*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "goes on from here" in output
    staging = next(tmp_path.glob("train_source/.staging-*"))
    assert list((staging / "state").glob("step-*.json")), "the checkpoint is kept"
