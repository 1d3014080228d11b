"""A stage in a process group of its own: results, errors, ends."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest

from stages.launch import StageFailed, execute, run_child
from tests.tiny import Told

ROOT = Path(__file__).resolve().parents[1]

VERBS = {
    "counts": """
        def run(config, *, out, progress, pictures, artifacts):
            print("a word on standard output")
            progress.start(3, "items", done=1)
            progress.note(f"seed {config.seed}, {sorted(artifacts)}, {pictures.name}")
            progress.advance(2, loss=0.5)
            (out / "pid").write_text(str(os.getpid()))
            return Summary(text="3 items", numbers={"items": 3, "share": 0.5})
    """,
    "mistakes": """
        def run(config, *, out, progress):
            kind = (out / "kind").read_text()
            if kind == "TrainingError":
                class TrainingError(ValueError): ...
                raise TrainingError("update 3 of 10")
            raise {"FileNotFoundError": FileNotFoundError, "KeyError": KeyError}[kind]("no such")
    """,
    "dies": """
        def run(config, *, out, progress):
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
    """,
    "forgets": """
        def run(config, *, out, progress):
            child = subprocess.Popen(["sleep", "60"], start_new_session=True)
            (out / "pids").write_text(str(child.pid))
            os._exit(3)
    """,
    "hangs": """
        def run(config, *, out, progress):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its child inherits this
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (out / "pids.tmp").write_text(f"{os.getpid()} {child.pid}")
            (out / "pids.tmp").rename(out / "pids")
            progress.note("hanging")
            while True:
                time.sleep(0.1)
    """,
}
IMPORTS = "import os, signal, subprocess, sys, time\nfrom stages.contracts import Summary\n"


@pytest.fixture
def spec_of(tmp_path, monkeypatch):
    """Specs of small stages that are written for these tests."""
    package = tmp_path / "verbs"
    package.mkdir()
    for name, source in VERBS.items():
        (package / f"{name}_for_launch.py").write_text(IMPORTS + textwrap.dedent(source))
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(package))
    monkeypatch.syspath_prepend(str(package))

    def spec(verb: str, **inputs) -> dict:
        return {
            "stage": verb,
            "verb": f"{verb}_for_launch",
            "round": 1,
            "leg": None,
            "sections": ["refine"],
            "recipe": {"seed": 7},
            "recipe_class": "stages.config:Recipe",
            "out": str(out),
            "inputs": inputs,
        }

    return spec


def in_process(spec, progress):
    return execute(spec, progress)


@pytest.mark.parametrize("run", [in_process, run_child])
def test_stage_tells_its_progress_and_its_summary(spec_of, tmp_path, run):
    told = Told()
    spec = spec_of("counts", pictures="some/pictures", artifacts={"refine@1": "a", "evaluate": "b"})
    summary = run(spec, told)
    assert (summary.text, dict(summary.numbers)) == ("3 items", {"items": 3, "share": 0.5})
    assert told.started == [(3, "items", 1)]
    assert told.notes == ["seed 7, ['evaluate', 'refine@1'], pictures"]
    assert (told.advanced, told.metrics) == (2, [{"loss": 0.5}])
    in_this_process = int((tmp_path / "out" / "pid").read_text()) == os.getpid()
    assert in_this_process == (run is in_process)


def test_other_output_of_a_child_goes_to_the_log(spec_of, caplog):
    with caplog.at_level(logging.INFO, logger="stages.launch"):
        run_child(spec_of("counts", pictures="p", artifacts={}), Told())
    assert "a word on standard output" in caplog.text


def test_spec_with_missing_and_unknown_keys_is_refused(spec_of):
    spec = spec_of("counts")
    del spec["leg"]
    with pytest.raises(ValueError, match=r"missing \['leg'\], unknown \['legs'\]"):
        execute({**spec, "legs": None}, Told())


@pytest.mark.parametrize(
    ("raised", "arrives", "message"),
    [
        ("FileNotFoundError", FileNotFoundError, "no such"),
        ("TrainingError", ValueError, "update 3 of 10"),
        ("KeyError", StageFailed, "mistakes failed: KeyError"),
    ],
)
def test_errors_travel_back(spec_of, tmp_path, raised, arrives, message):
    (tmp_path / "out" / "kind").write_text(raised)
    with pytest.raises(arrives, match=message) as caught:
        run_child(spec_of("mistakes"), Told())
    assert type(caught.value) is arrives


def test_death_of_a_child_is_told_with_its_last_words(spec_of):
    with pytest.raises(StageFailed, match=r"(?s)dies: .*signal SIGSEGV.*last words"):
        run_child(spec_of("dies"), Told())


def test_process_that_left_the_group_does_not_hold_up_its_parent(spec_of, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.children.GRACE_S", 0.3)
    started = monotonic()
    try:
        with pytest.raises(StageFailed, match="exit code 3"):
            run_child(spec_of("forgets"), Told())
        assert monotonic() - started < 30
    finally:
        os.kill(int((tmp_path / "out" / "pids").read_text()), signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 20) -> bool:
    deadline = monotonic() + seconds
    while not condition() and monotonic() < deadline:
        sleep(0.02)
    return condition()


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")


@needs_proc
@pytest.mark.parametrize("reason", ["timeout", "exception"])
def test_whole_group_is_gone_after(spec_of, tmp_path, monkeypatch, reason):
    monkeypatch.setattr("stages.children.GRACE_S", 0.3)  # the stage ignores the polite signal

    class Impatient(Told):
        def note(self, text):
            if reason == "exception":
                raise KeyboardInterrupt

    expected = TimeoutError if reason == "timeout" else KeyboardInterrupt
    with pytest.raises(expected):
        run_child(spec_of("hangs"), Impatient(), timeout_s=3 if reason == "timeout" else None)
    pids = [int(pid) for pid in (tmp_path / "out" / "pids").read_text().split()]
    assert len(pids) == 2
    assert wait_for(lambda: not any(map(alive, pids)), 2)


@needs_proc
def test_group_ends_when_its_parent_is_killed(spec_of, tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_of("hangs")))
    code = """
        import json, sys
        from stages.launch import run_child
        from tests.tiny import Told
        run_child(json.load(open(sys.argv[1])), Told())
    """
    path = os.pathsep.join([str(ROOT), str(tmp_path / "verbs")])
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(spec)],
        env={**os.environ, "PYTHONPATH": path},
    )
    found = tmp_path / "out" / "pids"
    assert wait_for(found.exists)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    pids = [int(pid) for pid in found.read_text().split()]
    assert wait_for(lambda: not any(map(alive, pids)), 3)


@needs_proc
def test_child_keeps_a_lock_open_until_it_is_gone(spec_of, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr("stages.children.GRACE_S", 0.3)
    path = tmp_path / "lock"
    mine = path.open("w")
    fcntl.flock(mine, fcntl.LOCK_EX)
    failures = []

    def run():
        try:
            run_child(spec_of("hangs"), Told(), timeout_s=4, keep_fds=[mine.fileno()])
        except TimeoutError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_for((tmp_path / "out" / "pids").exists)
    mine.close()
    with path.open("w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        thread.join()
        assert failures
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_launch_imports_neither_torch_nor_prefect():
    code = "import sys, stages.launch; print({'torch', 'prefect'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


# --- several training processes ------------------------------------------------------------------


@pytest.fixture
def training_spec(tmp_path):
    from tests.tiny import tiny_recipe, write_labelspace, write_sources

    roles = {
        "sources": str(write_sources(tmp_path / "sources", data=tmp_path / "data")),
        "labelspace": str(write_labelspace(tmp_path / "labelspace")),
    }

    def spec(out: Path, *, processes: int, data: dict | None = None, **section) -> dict:
        run = {"device": "cpu", "processes": processes}
        recipe = tiny_recipe(train_source={"steps": 3} | section, run=run, data=data or {})
        return {
            "stage": "train_source",
            "verb": "stages.train_source",
            "round": 0,
            "leg": None,
            "sections": ["segmenter", "train_source"],
            "recipe": recipe.model_dump(mode="json"),
            "recipe_class": "stages.config:Recipe",
            "out": str(out),
            "inputs": roles | ({"validation": roles["sources"]} if data else {}),
        }

    return spec


def test_two_ranks_with_half_a_batch_equal_one_with_all(training_spec, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told = {}
    for processes in (1, 2):
        told[processes] = Told()
        spec = training_spec(tmp_path / str(processes), processes=processes)
        summary = execute(spec, told[processes])
        assert summary.numbers["steps"] == 3
    assert told[2].started == [(3, "steps", 0)]
    one, two = ([row["loss"] for row in told[n].metrics] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)
    weights = [load_file(tmp_path / str(n) / "model.safetensors") for n in (1, 2)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=2e-5)
    lines = (tmp_path / "2" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_two_ranks_stop_at_the_step_that_one_of_them_judges(training_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = {"validation": [{"name": "streets", "root": "streets"}]}
    validation = {"every": 1, "patience": 1}
    spec = training_spec(tmp_path / "out", processes=2, data=data, steps=12, validation=validation)
    summary = execute(spec, Told())
    lines = (tmp_path / "out" / "logs" / "metrics.jsonl").read_text().splitlines()
    judged = {row["step"]: row["miou"] for row in map(json.loads, lines) if "miou" in row}
    best = max(judged, key=lambda step: (judged[step], -step))
    assert summary.numbers["kept_step"] == best
    assert max(judged) in (best + 1, 12)


@needs_proc
def test_ranks_hold_the_lock_that_execute_was_given(training_spec, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path, told = tmp_path / "lock", Told()
    mine = path.open("w")
    fcntl.flock(mine, fcntl.LOCK_EX)
    spec = training_spec(tmp_path / "out", processes=2, steps=8)
    thread = threading.Thread(
        target=execute, args=(spec, told), kwargs={"keep_fds": [mine.fileno()]}
    )
    thread.start()
    assert wait_for(lambda: told.metrics, 60)
    mine.close()
    with path.open("w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        thread.join()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_mistake_that_every_rank_finds_is_told_once(training_spec, tmp_path):
    spec = training_spec(tmp_path / "out", processes=2, batch_size=1)
    with pytest.raises(ValueError, match=r"batch_size is 1, but 2 processes"):
        execute(spec, Told())
