"""The flow under a real Prefect: its own server (SQLite), process pool, worker and deployments.

pytest -m "prefect and not faults" tests/test_flows_prefect.py
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows.engine import StageError
from flows.gpus import count_gpus, wants_gpu
from flows.store import Store
from tests import toy_pipeline

pytestmark = [pytest.mark.prefect]

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "tiny"
ONE_LEG = ["legs={}", "world.num_source=12", "world.num_target=2"]
"""Overrides that make the tiny recipe smaller still."""
INSTANCES = [
    *("render_world", "prepare", "train_source", "write_prompts", "synthesize", "evaluate@0"),
    *("pseudo_label@1", "select@1", "refine@1", "self_train@1", "evaluate@1", "report"),
]
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


class Prefect:
    """A server with a worker, spoken to as a user (commands) and as a page (its HTTP interface)."""

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.port, self.url = home, port, f"http://127.0.0.1:{port}/api"
        self.server: subprocess.Popen | None = None
        self.worker: subprocess.Popen | None = None
        self.env = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
        self.env |= {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }

    def command(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        """Run a Python program's command line against the server."""
        return subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )

    def serve(self) -> None:
        """Start the server and wait until it answers."""
        words = ("server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        self.server = self.start(*words)
        until(self.answers, timeout_s=120)

    def work(self) -> None:
        """Start a worker."""
        self.worker = self.start("worker", "start", "--pool", "clouds-local")

    def answers(self) -> bool:
        """Whether the server does."""
        with contextlib.suppress(OSError, urllib.error.URLError):
            return self.ask("health") is True
        return False

    def start(self, *words: str) -> subprocess.Popen:
        """Start `prefect WORDS`, its output in a log."""
        with (self.home / f"{words[0]}.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "prefect", *words],
                cwd=self.home,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def deploy_and_run(self, deployment: str, **parameters) -> str:
        """`prefect deployment run`; the flow run's id."""
        words = [
            f"--param={name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in parameters.items()
        ]
        done = self.command("-m", "prefect", "deployment", "run", f"clouds/{deployment}", *words)
        assert done.returncode == 0, done.stdout
        return next(line.split()[-1] for line in done.stdout.splitlines() if "UUID" in line)

    def ask(self, path: str, **body) -> object:
        """A question to the server."""
        data = json.dumps(body).encode() if body else None
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def finished(self, run_id: str, *, timeout_s: float = 180) -> dict:
        """The flow run, once it has ended."""
        return until(
            lambda: (
                found
                if (found := self.ask(f"flow_runs/{run_id}"))["state"]["type"] in FINAL
                else None
            ),
            timeout_s=timeout_s,
        )

    def _of_run(self, path: str, run_id: str) -> list[dict]:
        return self.ask(path, flow_runs={"id": {"any_": [run_id]}}, limit=200)

    def tasks(self, run_id: str, *, count: int) -> dict[str, dict]:
        """The task runs by name, in order (they reach the server a moment after they end)."""
        found = until(
            lambda: (
                tasks
                if len(tasks := self._of_run("task_runs/filter", run_id)) >= count
                and all(task["state_type"] in FINAL for task in tasks)
                else None
            ),
            timeout_s=30,
        )
        return {task["name"]: task for task in sorted(found, key=lambda task: task["start_time"])}

    def artifacts(self, run_id: str) -> dict[str, dict]:
        """What the run shows beside its states, by key."""
        return {item["key"]: item for item in self._of_run("artifacts/filter", run_id)}

    def log_lines(self, run_id: str) -> list[dict]:
        """The run's logs."""
        return self.ask("logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, limit=200)


def until(look, *, timeout_s: float, every_s: float = 0.25):
    """What `look` returns, once that is something."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every_s)
    return found


@pytest.fixture(scope="session")
def prefect(tmp_path_factory):
    """A server of its own, deployed to as a user does, with a worker."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    made = Prefect(home, port)
    try:
        made.serve()
        deployed = made.command("-m", "flows.deploy")
        assert deployed.returncode == 0, deployed.stdout
        made.work()
        yield made
    finally:
        for process in filter(None, (made.worker, made.server)):
            end(process)


def end(process: subprocess.Popen, *, patience_s: float = 10) -> None:
    """Stop a process and whatever it started; at once where there is no patience."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    if patience_s:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience_s)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=10)


@pytest.fixture(scope="session")
def whole_run(prefect, tmp_path_factory):
    """A whole recipe run by its deployment: the flow run, and its artifacts' folder."""
    folder = tmp_path_factory.mktemp("artifacts")
    run_id = prefect.deploy_and_run(
        "whole", recipe=RECIPE, artifacts=str(folder), overrides=ONE_LEG
    )
    run = prefect.finished(run_id, timeout_s=540)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    return run, folder


def manifest(folder: Path, name: str) -> dict:
    found = Store(folder).newest(name)
    assert found is not None, f"{name} was not made"
    return found


def test_the_whole_recipe_completes_as_tasks_named_by_what_runs(prefect, whole_run):
    run, folder = whole_run
    assert run["name"] == f"{RECIPE}: all"
    assert "12 made, 0 done before" in run["state"]["message"]
    tasks = prefect.tasks(run["id"], count=len(INSTANCES))
    assert list(tasks) == INSTANCES
    assert {task["state_name"] for task in tasks.values()} == {"Completed"}
    assert manifest(folder, "refine@1")["prefect_run_id"] == run["id"]
    record = json.loads(Store(folder).runs()[-1].read_text())
    assert (record["status"], record["prefect_run_id"]) == ("completed", run["id"])


def test_a_run_shows_its_results_and_its_logs(prefect, whole_run):
    run, folder = whole_run
    shown = prefect.artifacts(run["id"])
    rows = json.loads(shown["evaluate-1"]["data"])
    scores = {row["target"]: row["mIoU %"] for row in rows}
    evaluated = manifest(folder, "evaluate@1")
    judged = json.loads((folder / "evaluate@1" / evaluated["key"] / "results.json").read_text())
    mious = {name: round(100 * entry["miou"], 2) for name, entry in judged["sets"].items()}
    assert scores == mious | {"mean": round(100 * judged["miou_mean"], 2)}
    summary = shown["clouds-summary"]["data"]
    assert all(manifest(folder, name)["key"] in summary for name in INSTANCES)
    assert "report.html" in summary
    assert any(item["type"] == "progress" for item in shown.values())
    lines = prefect.log_lines(run["id"])
    assert any(line["name"] == "stages.launch" for line in lines), "a child's lines are logged"
    assert any("12 source samples" in line["message"] for line in lines)


def test_again_every_stage_is_cached_and_says_why(prefect, whole_run):
    _, folder = whole_run
    runs_before = len(Store(folder).runs())
    run_id = prefect.deploy_and_run(
        "whole", recipe=RECIPE, artifacts=str(folder), overrides=ONE_LEG
    )
    run = prefect.finished(run_id)
    tasks = prefect.tasks(run_id, count=len(INSTANCES))
    states = {name: task["state_name"] for name, task in tasks.items()}
    assert states == dict.fromkeys(INSTANCES, "Cached")
    assert "0 made, 12 done before" in run["state"]["message"]
    assert "8 prompts" in tasks["write_prompts"]["state"]["message"]
    assert len(Store(folder).runs()) == runs_before


def test_one_stage_alone_by_its_deployment(prefect, whole_run):
    _, folder = whole_run
    before = manifest(folder, "select@1")
    run_id = prefect.deploy_and_run(
        "stage",
        recipe=RECIPE,
        artifacts=str(folder),
        stage="select",
        round=1,
        overrides=ONE_LEG,
        force=["select"],
    )
    run = prefect.finished(run_id)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert run["name"] == f"{RECIPE}: select@1"
    tasks = prefect.tasks(run_id, count=1)
    assert {name: task["state_name"] for name, task in tasks.items()} == {"select@1": "Completed"}
    after = manifest(folder, "select@1")
    assert (after["key"], after["digest"]) == (before["key"], before["digest"])
    assert after["prefect_run_id"] == run_id


def test_evaluation_only_by_its_deployment(prefect, whole_run):
    _, folder = whole_run
    run_id = prefect.deploy_and_run(
        "evaluate", recipe=RECIPE, artifacts=str(folder), overrides=ONE_LEG
    )
    run = prefect.finished(run_id)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    tasks = prefect.tasks(run_id, count=1)
    assert {name: task["state_name"] for name, task in tasks.items()} == {"evaluate@1": "Cached"}


def test_a_bad_override_fails_the_run_with_its_message(prefect, tmp_path):
    run_id = prefect.deploy_and_run(
        "whole", recipe=RECIPE, artifacts=str(tmp_path), overrides=["train_source.stepz=3"]
    )
    run = prefect.finished(run_id)
    assert run["state"]["type"] == "FAILED"
    assert "unknown key 'train_source.stepz'; did you mean 'steps'?" in run["state"]["message"]
    assert not any(tmp_path.iterdir())


def test_the_server_refuses_an_unknown_stage(prefect):
    done = prefect.command(
        *("-m", "prefect", "deployment", "run", "clouds/stage", "--param", "stage=refin")
    )
    assert done.returncode != 0
    assert "refin" in done.stdout


def test_a_stuck_child_is_ended_and_tried_once_more(prefect, tmp_path):
    run_id = prefect.deploy_and_run(
        "stage",
        recipe=RECIPE,
        artifacts=str(tmp_path),
        stage="render_world",
        overrides=["run.stage_timeout_s=0.05"],
    )
    run = prefect.finished(run_id)
    assert run["state"]["type"] == "FAILED"
    assert "render_world ran longer than 0.05 s and was ended" in run["state"]["message"]
    (task,) = prefect.tasks(run_id, count=1).values()
    assert task["run_count"] == 2


def test_a_cancelled_run_leaves_no_process_and_keeps_its_work(prefect, whole_run, tmp_path):
    _, done = whole_run
    folder = tmp_path / "artifacts"
    shutil.copytree(done, folder, symlinks=True)
    run_id = prefect.deploy_and_run(
        "whole",
        recipe=RECIPE,
        artifacts=str(folder),
        overrides=[*ONE_LEG, "train_source.steps=100000"],
        until_stage="train_source",
    )
    told = until(lambda: progress(folder), timeout_s=90)
    children = psutil.Process(told["pid"]).children(recursive=True)
    assert any("stages.launch" in child.cmdline() for child in children)
    cancelled = prefect.command("-m", "prefect", "flow-run", "cancel", run_id)
    assert cancelled.returncode == 0, cancelled.stdout
    assert psutil.wait_procs(children, timeout=60)[1] == [], "processes that outlive the run"
    assert prefect.finished(run_id)["state"]["type"] == "CANCELLED"
    planned = prefect.command(
        *("flows/clouds.py", "plan", "--json", "--recipe", RECIPE, "--artifacts", str(folder)),
        *("--stage", "train_source", "--set", "train_source.steps=100000"),
        *(word for override in ONE_LEG for word in ("--set", override)),
    )
    (step,) = json.loads(planned.stdout)
    assert step["resumes"].endswith("/100000 steps")
    assert step["held_by"] is None
    records = [json.loads(path.read_text()) for path in Store(folder).runs()]
    assert {r["prefect_run_id"]: r["status"] for r in records}[run_id] == "interrupted"


@pytest.mark.faults
def test_a_run_outlives_its_server(prefect, whole_run, tmp_path):
    _, done = whole_run
    folder = tmp_path / "artifacts"
    shutil.copytree(done, folder, symlinks=True)
    run_id = prefect.deploy_and_run(
        "whole",
        recipe=RECIPE,
        artifacts=str(folder),
        overrides=[*ONE_LEG, "train_source.steps=60"],
        until_stage="train_source",
    )
    until(lambda: progress(folder), timeout_s=90)
    end(prefect.server, patience_s=0)
    time.sleep(5)
    prefect.serve()
    run = prefect.finished(run_id)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert "60 steps" in manifest(folder, "train_source")["summary"]["text"]


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["worker", "flow"])
def test_after_kill_9_of_a_process_of_prefects_the_next_run_goes_on(
    prefect, whole_run, tmp_path, victim
):
    _, done = whole_run
    folder = tmp_path / "artifacts"
    shutil.copytree(done, folder, symlinks=True)
    given = {
        "recipe": RECIPE,
        "artifacts": str(folder),
        "overrides": [*ONE_LEG, "train_source.steps=60"],
        "until_stage": "train_source",
    }
    prefect.deploy_and_run("whole", **given)
    told = until(lambda: progress(folder), timeout_s=90)
    if victim == "worker":
        prefect.worker.kill()
        prefect.worker.wait()
        prefect.work()
    else:
        children = psutil.Process(told["pid"]).children(recursive=True)
        psutil.Process(told["pid"]).kill()
        assert psutil.wait_procs(children, timeout=30)[1] == [], "processes that outlive the flow"
    run = prefect.finished(prefect.deploy_and_run("whole", **given), timeout_s=300)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert "60 steps" in manifest(folder, "train_source")["summary"]["text"]
    assert Store(folder).problems(*whole(folder, "train_source"), full=True) == []


def whole(folder: Path, name: str) -> tuple[Path, dict]:
    """The newest artifact of an instance: its folder, and its manifest."""
    found = manifest(folder, name)
    return folder / name / found["key"], found


@pytest.mark.faults
def test_of_two_runs_on_one_folder_one_waits_and_finds_it_done(prefect, tmp_path):
    given = {"recipe": RECIPE, "artifacts": str(tmp_path), "until_stage": "prepare"}
    ids = [prefect.deploy_and_run("whole", **given) for _ in range(2)]
    messages = [prefect.finished(run_id)["state"]["message"] for run_id in ids]
    made = [int(message.split(" made, ")[0]) for message in messages]
    assert sum(made) == 2, messages


def progress(folder: Path) -> dict | None:
    """What a training in progress told last, once it has taken a step."""
    for path in folder.glob("train_source/.progress-*.json"):
        told = json.loads(path.read_text())
        return told if told["done"] >= 1 else None
    return None


def typed(prefect, folder, *words: str, **env: str):
    """`clouds run` as typed in a terminal."""
    settings = (word for override in ONE_LEG for word in ("--set", override))
    return prefect.command(
        *("flows/clouds.py", "run", "--recipe", RECIPE, "--artifacts", str(folder)),
        *(*settings, *words),
        **env,
    )


def test_the_command_line_runs_the_flow_where_a_server_is_set(prefect, whole_run):
    _, folder = whole_run
    done = typed(prefect, folder)
    assert done.returncode == 0, done.stdout
    assert "runner prefect (PREFECT_API_URL is set)" in done.stdout
    assert "nothing to do: all 12 instances are done." in done.stdout
    assert "report:" in done.stdout


def test_the_command_line_fails_with_the_flow(prefect, tmp_path):
    done = typed(prefect, tmp_path, "--stage", "refine")
    assert done.returncode == 2, done.stdout
    assert "which is not there. Make it with: python flows/clouds.py" in done.stdout


def test_no_server_is_started_behind_the_users_back(prefect, tmp_path):
    nowhere = str(tmp_path / "home")
    unset = typed(
        prefect, tmp_path, "--runner", "prefect", PREFECT_API_URL="", PREFECT_HOME=nowhere
    )
    assert unset.returncode == 2, unset.stdout
    assert "PREFECT_API_URL is not set: start one with `prefect server start`" in unset.stdout
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
        dead = typed(prefect, tmp_path, PREFECT_API_URL=url, PREFECT_HOME=nowhere)
    assert dead.returncode == 2, dead.stdout
    assert f"no Prefect server answers at {url}" in dead.stdout


WITHOUT_LIMIT = """
import sys
from flows import prefect_flow
prefect_flow.GPU_LIMIT = "no-such-limit"
prefect_flow.run_here(recipe=sys.argv[1], artifacts=sys.argv[2], stage="train_source",
                      overrides=[*sys.argv[3:], "run.device=cuda", "train_source.steps=1"])
"""


def test_a_missing_gpu_limit_names_the_command_that_makes_it(prefect, whole_run):
    _, folder = whole_run
    done = prefect.command("-c", WITHOUT_LIMIT, RECIPE, str(folder), *ONE_LEG)
    assert done.returncode != 0
    assert "no concurrency limit 'no-such-limit'" in done.stdout
    assert "`make deploy` makes it" in done.stdout


def test_deploying_again_changes_nothing_and_limits_gpus(prefect):
    before = prefect.ask("deployments/filter", limit=50)
    again = prefect.command("-m", "flows.deploy")
    assert again.returncode == 0, again.stdout
    after = prefect.ask("deployments/filter", limit=50)
    assert {entry["name"] for entry in after} == {"whole", "stage", "evaluate"}
    assert {entry["id"] for entry in after} == {entry["id"] for entry in before}
    limits = prefect.ask("v2/concurrency_limits/filter", limit=50)
    (gpu,) = [entry for entry in limits if entry["name"] == "gpu"]
    assert gpu["limit"] == max(1, count_gpus())


def test_a_retry_of_a_forced_stage_goes_on_from_its_own_work(tmp_path, monkeypatch):
    made = toy_pipeline.engine(tmp_path, force=frozenset({"numbers"}))
    numbers = made.instances["numbers"]
    monkeypatch.setenv("TOY_FAIL_AT", "7")
    made.store.open()
    for _ in range(2):
        ears = toy_pipeline.Ears()
        with pytest.raises(StageError):
            made.run_one(numbers, listener=ears, execute=toy_pipeline.in_process)
    assert ears.said == ["6/12 numbers"]


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 2), ("0", 1), ("0,1,2", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("GPU-a1,GPU-b2", 2)],
)
def test_gpus_are_counted_without_torch(tmp_path, monkeypatch, visible, count):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus(tmp_path) == count


def test_an_automatic_device_is_a_gpu_only_where_one_is_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [wants_gpu(device) for device in ("auto", "cpu", "cuda:1")] == [False, False, True]
