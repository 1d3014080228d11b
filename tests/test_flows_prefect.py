"""The flow under a real Prefect: its own server (SQLite), process pool, worker and deployments.

pytest -m "prefect and not faults" tests/test_flows_prefect.py
"""

import importlib
import json
import shutil
import socket
import time
import urllib.error
from functools import partial
from pathlib import Path

import psutil
import pytest

from flows.gpus import count_gpus, gpus_taken, own_gpus, wants_gpu
from flows.outputs import problems_of
from flows.recipes import load_recipe
from flows.steps import StageError
from flows.store import Store
from stages.contracts import CONTRACTS
from stages.launch import RANKED_VERBS
from tests import toy_pipeline
from tests.prefect_server import PASSWORD, Prefect, end, until

pytestmark = [pytest.mark.prefect]

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "tiny"
ONE_LEG = ["legs={}", "world.num_source=12", "world.num_target=2"]
"""Overrides that make the tiny recipe smaller still."""
INSTANCES = [
    *("render_world", "prepare", "train_source", "write_prompts", "synthesize", "evaluate@0"),
    *("pseudo_label@1", "select@1", "refine@1", "self_train@1", "evaluate@1", "report"),
]


@pytest.fixture(scope="session")
def prefect(tmp_path_factory):
    """A server of its own, deployed to as a user does, with a worker."""
    made = Prefect(tmp_path_factory.mktemp("prefect"))
    try:
        made.serve()
        made.deploy()
        made.work()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def whole_run(prefect, tmp_path_factory):
    """A whole recipe run by its deployment: the flow run, and its artifacts' folder."""
    folder = tmp_path_factory.mktemp("artifacts")
    run_id = prefect.deploy_and_run(
        "whole", recipe=RECIPE, artifacts=str(folder), overrides=ONE_LEG
    )
    run = prefect.finished(run_id, timeout_s=1800)
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
    told = until(lambda: progress(folder), timeout_s=600)
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
    until(lambda: progress(folder), timeout_s=600)
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
    told = until(lambda: progress(folder), timeout_s=600)
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
    assert problems_of(*whole(folder, "train_source"), full=True) == []


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


def test_stages_run_beside_each_other_as_tasks_of_one_flow(prefect, tmp_path):
    words = ("--until", "write_prompts", "--set=run.beside=2", "--set=train_source.steps=1")
    done = typed(prefect, tmp_path, *words)
    assert done.returncode == 0, done.stdout
    record = json.loads(Store(tmp_path).runs()[-1].read_text())
    made = {"render_world", "prepare", "train_source", "write_prompts"}
    assert (record["status"], set(record["instances"])) == ("completed", made)
    tasks = prefect.tasks(record["prefect_run_id"], count=len(made))
    assert {name: task["state"]["type"] for name, task in tasks.items()} == dict.fromkeys(
        made, "COMPLETED"
    )
    first, second = tasks["train_source"], tasks["write_prompts"]
    assert max(first["start_time"], second["start_time"]) < min(
        first["end_time"], second["end_time"]
    )


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


TWO_GPUS = """
import sys
from prefect.client.orchestration import get_client
from flows import prefect_flow
from flows.runs import arrange
prefect_flow.GPU_LIMIT = "two-gpus"
with get_client(sync_client=True) as client:
    client.upsert_global_concurrency_limit_by_name("two-gpus", limit=2)
    for processes in (1, 2, 3):
        engine, _ = arrange(recipe=sys.argv[1], artifacts=sys.argv[2],
                            overrides=["run.device=cuda", f"run.processes={processes}"])
        desk = prefect_flow._Desk(engine)
        for stage in ("write_prompts", "refine", "train_source", "report"):
            with desk._slots({"stage": stage}):
                held = client.read_global_concurrency_limit_by_name("two-gpus").active_slots
            print(stage, processes, held)
"""


def test_a_stage_holds_a_slot_for_every_gpu_it_computes_on(prefect, tmp_path):
    done = prefect.command("-c", TWO_GPUS, RECIPE, str(tmp_path))
    held = dict.fromkeys(["write_prompts 1", "refine 1", "train_source 1"], 1)
    held |= {"report 1": 0, "write_prompts 2": 1, "refine 2": 2, "train_source 2": 2}
    held |= {"report 2": 0, "write_prompts 3": 1}
    told = [f"{what} {count}" for what, count in held.items()]
    assert [line for line in done.stdout.splitlines() if line in told] == told, done.stdout
    assert "run.processes is 3, but this Prefect server's limit 'two-gpus'" in done.stdout
    assert "`python -m flows.deploy --gpus 3`" in done.stdout


def test_the_server_listens_on_loopback_alone(prefect):
    members = [psutil.Process(prefect.server.pid)]
    members += members[0].children(recursive=True)
    listening = [
        connection.laddr.ip
        for member in members
        for connection in member.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.parametrize("password", [None, "clouds:wrong", "clouds:"])
def test_the_server_answers_nobody_without_its_password(prefect, password):
    with pytest.raises(urllib.error.HTTPError) as refused:
        prefect.ask("deployments/filter", password=password, limit=1)
    assert refused.value.code == 401
    assert prefect.ask("health", password=password) is True, "probes need none"


def test_who_lacks_the_password_is_told_where_it_belongs(prefect, tmp_path):
    typed_without = typed(prefect, tmp_path, PREFECT_API_AUTH_STRING="")
    assert typed_without.returncode == 2, typed_without.stdout
    assert "asks for a password: set PREFECT_API_AUTH_STRING" in typed_without.stdout
    deployed = prefect.command("-m", "flows.deploy", PREFECT_API_AUTH_STRING="clouds:wrong")
    assert deployed.returncode != 0
    assert "set PREFECT_API_AUTH_STRING to its user:password" in deployed.stdout


def test_the_password_is_in_no_artifact_log_or_page(prefect, whole_run):
    run, folder = whole_run
    secret = PASSWORD.partition(":")[2].encode()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if secret in path.read_bytes()]
    logs = [path for path in prefect.home.rglob("*.log") if secret in path.read_bytes()]
    assert not logs
    told = json.dumps([prefect.log_lines(run["id"]), prefect.artifacts(run["id"]), run])
    assert secret.decode() not in told


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


IN_OTHER_ORDER = """
import sys
from pathlib import Path
from flows import prefect_flow
from flows.steps import Artifact, Result
from tests.toy_pipeline import engine
desk = prefect_flow._Desk(engine(Path(sys.argv[1])))
for name in reversed(desk.engine.instances):
    artifact = Artifact(name=name, key="k", folder=Path(name), manifest={})
    desk.results[name] = Result(artifact=artifact, cached=False, seconds=1.0, text="done")
prefect_flow._tell = lambda create, key, markdown: print(markdown)
desk.summarise()
print("plan", *desk.engine.instances)
"""


def test_the_summary_is_in_the_order_of_the_plan_whoever_ended_first(prefect, tmp_path):
    done = prefect.command("-c", IN_OTHER_ORDER, str(tmp_path))
    lines = done.stdout.splitlines()
    (plan,) = [line.split()[1:] for line in lines if line.startswith("plan ")]
    told = [line.split()[1] for line in lines if line.endswith("` |")]
    assert told == plan, done.stdout
    assert len(plan) > 2


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


@pytest.mark.parametrize(
    ("stage", "overrides", "count"),
    [
        ("train_source", {}, 4),
        ("train_source", {"run.engine": "ray"}, 4),
        ("synthesize", {}, 4),
        ("synthesize", {"run.engine": "ray"}, 1),
        ("evaluate", {}, 1),
        ("select", {}, 0),
        ("select", {"select.clip": "builtin:miniature"}, 1),
        ("prepare", {}, 0),
        ("refine", {"run.device": "cpu"}, 0),
    ],
)
def test_a_stage_takes_a_gpu_per_process_that_computes(stage, overrides, count):
    settings = {"run.device": "cuda", "run.processes": 4} | overrides
    recipe = load_recipe(RECIPE, [f"{key}={value}" for key, value in settings.items()])
    (contract,) = [contract for contract in CONTRACTS if contract.name == stage]
    assert gpus_taken(contract, recipe) == count


def test_runs_beside_each_other_see_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for number in range(3):
        (tmp_path / f"nvidia{number}").touch()
    own = partial(own_gpus, devices=tmp_path, locks=tmp_path)
    with own(2) as first, own(1) as second, own(1) as third:
        assert first == {"CUDA_VISIBLE_DEVICES": "0,1"}
        assert second == {"CUDA_VISIBLE_DEVICES": "2"}
        assert third == {}, "none is free: as if nobody had chosen"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a1,2")
    with own(1) as first, own(1) as second:
        assert (first | second, first) == (
            {"CUDA_VISIBLE_DEVICES": "2"},
            {"CUDA_VISIBLE_DEVICES": "GPU-a1"},
        )


def test_what_processes_share_is_what_the_stages_can_share():
    shared = {contract.verb: contract.shared for contract in CONTRACTS}
    assert {verb for verb, what in shared.items() if what == "updates"} == RANKED_VERBS
    sharded = {verb for verb in shared if hasattr(importlib.import_module(verb), "shards")}
    assert {verb for verb, what in shared.items() if what == "shards"} == sharded


def test_an_automatic_device_is_a_gpu_only_where_one_is_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [wants_gpu(device) for device in ("auto", "cpu", "cuda:1")] == [False, False, True]
