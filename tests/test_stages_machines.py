"""A training shared by two machines, both here on the loopback: they train what one does."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from stages.join import join
from stages.launch import StageKilled, execute
from stages.machines import CARD, call_for_machines
from tests.prefect_server import until
from tests.test_stages_launch import training_spec  # noqa: F401 (a fixture)
from tests.test_stages_ranks import rank
from tests.tiny import Told

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def second_machine(tmp_path, monkeypatch):
    """Another machine that waits for trainings; what it said is in `said`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    with (tmp_path / "said").open("w") as said:
        helper = subprocess.Popen(
            [sys.executable, "-m", "stages.join", str(artifacts), "--machine", "1"],
            cwd=ROOT,
            stdout=said,
            stderr=said,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    yield helper
    helper.kill()
    helper.wait()


def shared_spec(training_spec, folder: Path, **section) -> dict:  # noqa: F811
    """Of a training by two machines with a process each."""
    spec = training_spec(folder, processes=1, **section)
    spec["recipe"]["run"]["machines"] = 2
    folder.mkdir(parents=True)
    return spec


def test_two_machines_with_half_a_batch_each_equal_one_with_all(
    training_spec,  # noqa: F811
    second_machine,
    tmp_path,
):
    alone, shared = Told(), Told()
    execute(training_spec(tmp_path / "alone", processes=1), alone)
    out = tmp_path / "artifacts" / "train_source" / ".staging-0"
    summary = execute(shared_spec(training_spec, out), shared)
    assert summary.numbers["steps"] == 3
    assert any("leads 2 machines from 127.0.0.1:" in note for note in shared.notes)
    losses = [[row["loss"] for row in told.metrics] for told in (alone, shared)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "alone", out))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5)
    assert not (out / CARD).exists()
    said = tmp_path / "said"
    until(lambda: "train_source: done" in said.read_text(), timeout_s=600)
    second_machine.send_signal(signal.SIGINT)
    assert second_machine.wait(timeout=120) == 130
    assert "train_source: joins 127.0.0.1:" in said.read_text()


@pytest.mark.faults
def test_a_machine_killed_in_the_middle_ends_the_training_which_then_goes_on(
    training_spec,  # noqa: F811
    second_machine,
    tmp_path,
):
    alone = Told()
    execute(training_spec(tmp_path / "alone", processes=1, steps=60), alone)
    out = tmp_path / "artifacts" / "train_source" / ".staging-0"
    spec = shared_spec(training_spec, out, steps=60)
    found, before = [], set(psutil.Process().children(recursive=True))  # the second machine

    def kill() -> None:
        while not list((out / "state").glob("step-*.json")):
            time.sleep(0.01)
        found.extend(set(psutil.Process().children(recursive=True)) - before)
        os.kill(rank(1).pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(StageKilled, match="one of the 2 training processes was killed"):
        execute(spec, Told())
    assert psutil.wait_procs(found, timeout=60)[1] == []
    again = Told()
    assert execute(spec, again).numbers["steps"] == 60
    (_, _, first) = again.started[0]
    assert first >= 2, "it went on from a checkpoint"
    losses = [row["loss"] for row in alone.metrics][first:]
    assert [row["loss"] for row in again.metrics] == pytest.approx(losses, rel=2e-2)


def test_a_dead_leaders_card_is_passed_over(tmp_path):
    out = tmp_path / "train_source" / ".staging-0"
    out.mkdir(parents=True)
    card = {"spec": {"stage": "train_source"}, "machines": 2, "attempt": "a"}
    (out / CARD).write_text(json.dumps(card | {"address": "127.0.0.1", "port": 1}))
    seen: set[str] = set()
    join(out / CARD, 1, seen)
    assert not seen


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NODE_RANK": "2"}, "this is machine 2 .*run.machines is 2: they are 0 to 1"),
        ({"NODE_RANK": "1"}, "MASTER_ADDR and MASTER_PORT must say where machine 0 listens"),
    ],
)
def test_a_machine_that_cannot_know_its_place_says_so(tmp_path, monkeypatch, env, message):
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), call_for_machines({"out": str(tmp_path)}, 2):
        pass
