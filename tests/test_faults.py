"""Whatever dies, and whenever: the same command goes on, and the artifacts are the same.

A whole small run is killed (kill -9, with all its children) at random moments, resumed without any
manual step, and its artifacts' digests are compared with those of an undisturbed run. `FAULTS` is
the table of all that was tried, with where it stands and what is done again; of finished work
nothing is ever lost.
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flows.outputs import problems_of
from flows.runs import arrange
from flows.steps import StageError
from flows.store import Store
from stages.contracts import CONTRACTS
from tests.toy_pipeline import Ears, in_process

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "flows/clouds.py", "--recipe", "tiny"]
LEGS = "legs={control: {self_train.labels: none}, refined: {}}"

SHARD = "the shards in progress"
STEPS = "training steps since the last checkpoint"
FAULTS = (
    ("kill -9 of a run, at any moment", "faults", "test_25_kills_at_random_moments", SHARD),
    ("Ctrl-C, SIGTERM", "faults", "test_a_stop_in_the_middle_of_training_is_calm", STEPS),
    ("kill -9 of the flow, or Prefect's worker", "flows_prefect", "test_after_kill_9_of_a", STEPS),
    ("Prefect's server dies", "flows_prefect", "test_a_run_outlives_its_server", "nothing"),
    ("Prefect's database restarts", "postgres", "test_the_database_restarts_in_the", "nothing"),
    ("kill -9 of a stage's process", "flows_engine", "test_a_child_that_is_killed", SHARD),
    ("its parent dies", "stages_launch", "test_group_ends_when_its_parent_is_killed", SHARD),
    ("kill -9 of a training's rank", "stages_ranks", "test_a_killed_rank_ends_the_stage", STEPS),
    ("kill -9 of one machine's rank", "stages_machines", "test_a_machine_killed_in_the", STEPS),
    ("kill -9 of a worker process", "stages_crew", "test_a_lost_workers_shard_is_made", SHARD),
    ("kill -9 of their coordinator", "stages_crew", "test_workers_end_with_their", SHARD),
    ("a Ray node dies", "ray", "test_a_node_killed_in_the_middle_changes_nothing", SHARD),
    ("a Ray node sees another disk", "ray", "test_a_node_that_does_not_share", "nothing"),
    ("a stuck stage", "flows_prefect", "test_a_stuck_child_is_ended_and_tried_once_more", SHARD),
    ("a stuck worker", "stages_crew", "test_a_lost_workers_shard_is_made_by_another", SHARD),
    ("cancellation", "flows_prefect", "test_a_cancelled_run_leaves_no_process", STEPS),
    ("two deployments, one folder", "flows_prefect", "test_of_two_runs_on_one_folder", "nothing"),
    ("two commands, one folder", "flows_engine", "test_a_second_process_waits", "nothing"),
    ("disk full at any point", "faults_disk", "test_a_disk_that_is_full_at_any_point", SHARD),
    ("disk full at a checkpoint", "faults_disk", "test_a_checkpoint_that_found_no_room", STEPS),
    ("a file system that cannot lock", "faults_disk", "test_a_file_system_that_will", "nothing"),
    ("a power cut in a shard", "faults_disk", "test_a_shard_is_on_the_disk_before", SHARD),
    ("files missing, truncated, altered", "flows_engine", "test_damage_is_named_and_only", SHARD),
    ("a manifest altered", "flows_engine", "test_damage_is_named_and_only", "its stage"),
    ("a checkpoint truncated, altered", "stages_training", "test_damaged_checkpoint_falls", STEPS),
    ("a painted picture truncated", "stages_synthesize", "test_a_truncated_picture", SHARD),
    ("a data set's file truncated", "stages_prepare", "test_corrupt_files_are_named", "nothing"),
    ("out of memory: painting", "stages_synthesize", "test_a_batch_that_does_not_fit", "nothing"),
    ("... labelling", "stages_pseudo_label", "test_a_batch_that_does_not_fit_into", "nothing"),
    ("... refining", "stages_refine", "test_a_batch_that_does_not_fit_into", "nothing"),
    ("... every stage, for good", "faults", "test_a_stage_without_memory_says_what", SHARD),
    ("... told by torch or the system", "flows_engine", "test_want_of_memory_says", "nothing"),
)
"""What happens, tests/test_<file>.py, the test's first words, what is done again."""


@pytest.mark.parametrize(("what", "file", "test", "again"), FAULTS, ids=[row[0] for row in FAULTS])
def test_every_row_of_the_table_is_tested(what, file, test, again):
    assert f"\ndef {test}" in (ROOT / "tests" / f"test_{file}.py").read_text(encoding="utf-8")


def start(artifacts, *words):
    return subprocess.Popen(
        [*COMMAND, "--artifacts", str(artifacts), "--set", LEGS, *words],
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
        assert problems_of(folder, manifest, full=True) == []
        if manifest["stage"] != "report":
            found[manifest["instance"]] = (manifest["key"], manifest["digest"])
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Digests of an undisturbed run, how long it took, and its artifacts."""
    artifacts = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    process = start(artifacts)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return digests(artifacts), time.monotonic() - started, artifacts


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
    expected, elapsed_s, _ = undisturbed
    hit = run_with_kills(tmp_path, 5, random.Random(1), longest_s=elapsed_s / 2)
    assert hit >= 3
    assert digests(tmp_path) == expected
    assert not list(tmp_path.glob("*/.staging-*"))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_25_kills_at_random_moments_lose_nothing(tmp_path, undisturbed, seed):
    expected, elapsed_s, _ = undisturbed
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


SHARED = ("synthesize", "pseudo_label", "refine")
"""Stages that several processes share, shard by shard."""


def test_two_workers_paint_label_and_refine_what_one_process_does(tmp_path, undisturbed):
    expected, _, done = undisturbed
    shutil.copytree(done, tmp_path / "artifacts", symlinks=True)
    words = ["--from", SHARED[0], "--until", SHARED[-1], "--set", "run.processes=2"]
    process = start(tmp_path / "artifacts", *words, *(f"--force={name}" for name in SHARED))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert sum("cached" not in line for line in output.splitlines() if "[" in line) == 3, output
    assert digests(tmp_path / "artifacts") == expected


@pytest.mark.faults
@pytest.mark.parametrize("stage", [contract.name for contract in CONTRACTS if contract.numeric])
def test_a_stage_without_memory_says_what_needs_less_and_goes_on_when_there_is_some(
    tmp_path, monkeypatch, undisturbed, stage
):
    _, _, done = undisturbed
    shutil.copytree(done, tmp_path / "artifacts", symlinks=True)
    overrides = [LEGS, "write_prompts.model=builtin:writer"] if stage == WRITER else [LEGS]
    given = {"recipe": "tiny", "artifacts": str(tmp_path / "artifacts"), "overrides": overrides}
    engine, selected = arrange(**given)
    instance = next(instance for instance in selected if instance.stage == stage)
    heard = {"listener": Ears(), "execute": in_process}
    expected = engine.run_one(instance, **heard).artifact.manifest["digest"]
    engine, _ = arrange(**given, force=[stage])
    with monkeypatch.context() as patched:
        for kind in (torch.nn.Linear, torch.nn.Conv2d):
            patched.setattr(kind, "forward", full_after(40, kind.forward))
        with pytest.raises(StageError, match="memory does not suffice") as caught:
            engine.run_one(instance, **heard)
    assert caught.value.user
    assert instance.contract.saves_memory.split(", ")[0] in str(caught.value)
    again = engine.run_one(instance, **heard)
    assert not again.cached
    assert again.artifact.manifest["digest"] == expected


WRITER = "write_prompts"
"""The tiny recipe has a prompt bank in its place."""


def full_after(calls: int, forward):
    """A layer's `forward` that finds no memory any more after so many calls."""
    count = itertools.count(1)

    def layer(self, *inputs):
        if next(count) > calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *inputs)

    return layer
