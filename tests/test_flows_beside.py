"""Stages beside each other: the same artifacts, at most so many at once, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from flows import console
from flows.beside import threads_each
from flows.console import Console, StandardError
from flows.engine import Engine
from flows.gpus import own_gpus
from flows.inspection import status
from flows.recipes import validate
from flows.runs import run
from flows.steps import Artifact, MissingNeedError, Result, StageError
from flows.store import Store
from stages.contracts import Contract, Need
from tests.toy_pipeline import Ears, ToyRecipe, in_process

ROOT = Path(__file__).resolve().parents[1]
MIDDLE = ("left", "middle", "right")


def contract(name, *needs, **more):
    return Contract(
        name=name,
        version=1,
        verb="tests.toy_meeting",
        does="Meets others.",
        needs=tuple(Need(role=need, stage=need) for need in needs),
        **more,
    )


def diamond(**more):
    """first -> left, middle, right -> last."""
    return (
        contract("first"),
        *(contract(name, "first", **more) for name in MIDDLE),
        contract("last", *MIDDLE),
    )


BOTH_AT_ONCE = {"left": {"awaits": ["middle began"]}, "middle": {"awaits": ["left began"]}}


@pytest.fixture
def meet(tmp_path, monkeypatch):
    """Run a diamond by orders; each run has events of its own."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    class Meet:
        root = tmp_path / "artifacts"
        events = tmp_path / "events"
        ears = Ears()

        def __call__(self, *, contracts=None, orders=None, root=None, only=None, **settings):
            for event in self.events.glob("*"):
                event.unlink()
            self.events.mkdir(exist_ok=True)
            monkeypatch.setenv("TOY_MEETING", str(self.events))
            monkeypatch.setenv("TOY_ORDERS", json.dumps(orders or {}))
            more = {name: settings.pop(name) for name in ("choose_gpus",) if name in settings}
            listener = settings.pop("listener", None)
            made = new_engine(root or self.root, contracts or diamond(), **settings)
            self.ears = listener or Ears()
            chosen = [one for one in made.instances.values() if only is None or one.stage in only]
            return run(made, chosen, listener=self.ears, execute=in_process, **more)

        def told(self, event):
            return json.loads((self.events / event).read_text())

    return Meet()


class Herald(Ears):
    """Lets stages await what the run itself has learned: a stage's last word comes before that."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def say(self, text):
        super().say(text)
        if " failed; first " in text:
            (self.events / f"{text.split()[0]} is known to have failed").touch()

    def stage_finished(self, instance, result):
        super().stage_finished(instance, result)
        (self.events / f"{instance.name} is known to have ended").touch()


def new_engine(root, contracts, *, beside=2, device="cpu", legs=None):
    settings = {"run": {"beside": beside, "device": device}, "legs": legs or {}}
    recipe = validate(settings, model=ToyRecipe, place="toy")
    return Engine(recipe=recipe, store=Store(root), contracts=contracts)


def outcomes(root):
    store = Store(root)
    manifests = [store.manifest(folder) for folder in store.artifacts()]
    return {one["instance"]: (one["key"], one["digest"]) for one in manifests}


def wait_until(condition, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_those_that_need_nothing_of_each_other_run_at_once_and_make_the_same(meet, tmp_path):
    record = meet(orders=BOTH_AT_ONCE)
    alone = meet(beside=1, root=tmp_path / "alone")
    assert outcomes(meet.root) == outcomes(tmp_path / "alone")
    names = ["first", *MIDDLE, "last"]
    assert list(record["instances"]) == list(alone["instances"]) == names
    assert record["status"] == "completed"
    written = json.loads(Store(meet.root).runs()[-1].read_text())
    assert written["instances"] == record["instances"]


def test_they_start_in_the_order_of_the_plan_and_never_more_than_asked_for(meet):
    meet(orders={**BOTH_AT_ONCE, "middle": {"awaits": ["right began"]}})
    started = [name for name, _ in meet.ears.started]
    assert (started[0], set(started[1:3]), started[3:]) == (
        "first",
        {"left", "middle"},
        ["right", "last"],
    )
    assert meet.told("right began")["when"] > meet.told("left ended")["when"]
    assert meet.told("last began")["when"] > meet.told("right ended")["when"]


def test_again_all_is_found_done_in_the_order_of_the_plan(meet):
    meet()
    meet()
    assert (meet.ears.ran, meet.ears.cached) == ([], ["first", *MIDDLE, "last"])


def test_beside_a_failure_what_runs_is_finished_and_nothing_new_starts(meet):
    orders = {
        "left": {"awaits": ["middle began"], "fails": "ValueError"},
        "middle": {"awaits": ["left is known to have failed"]},
    }
    with pytest.raises(StageError, match="left: as ordered") as caught:
        meet(orders=orders, listener=Herald(meet.events))
    assert caught.value.user
    assert caught.value.kept.is_file()
    assert meet.ears.ran == ["first", "middle"]
    assert "left failed; first what runs is finished: middle" in meet.ears.said
    assert not (meet.events / "right began").exists()
    record = json.loads(Store(meet.root).runs()[-1].read_text())
    assert (record["status"], record["failed"]) == ("failed", "left")
    assert set(record["instances"]) == {"first", "middle"}
    meet()
    assert sorted(meet.ears.ran) == ["last", "left", "right"]


def test_the_first_failure_is_raised_and_the_second_told(meet):
    orders = {
        "left": {"awaits": ["middle is known to have failed"], "fails": "ValueError"},
        "middle": {"awaits": ["left began"], "fails": "MemoryError"},
    }
    with pytest.raises(StageError, match=r"needs less: fewer stages at once \(run.beside=1\)"):
        meet(orders=orders, listener=Herald(meet.events))
    assert "left failed too: left: as ordered" in meet.ears.said


def test_what_is_missing_is_named_and_what_runs_is_finished(meet):
    with pytest.raises(MissingNeedError, match="last needs middle"):
        meet(only=("first", "left", "last"))
    assert meet.ears.ran == ["first", "left"]


def test_a_stage_has_its_share_of_the_cores_unless_the_user_set_it(meet, monkeypatch):
    meet()
    assert meet.told("left began")["OMP_NUM_THREADS"] == str(threads_each(2))
    assert threads_each(10_000) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    meet(root=meet.root / "again")
    assert meet.told("left began")["OMP_NUM_THREADS"] == "3"


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """GPUs as the given number of device files, none of them real."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(number):
        for place in range(number):
            (tmp_path / f"nvidia{place}").touch()
        return partial(own_gpus, devices=tmp_path, locks=tmp_path)

    return make


def test_on_gpus_each_has_its_own(meet, gpus):
    contracts = diamond(numeric=True)
    meet(contracts=contracts, orders=BOTH_AT_ONCE, device="cuda", choose_gpus=gpus(2))
    seen = [meet.told(f"{name} began")["CUDA_VISIBLE_DEVICES"] for name in ("left", "middle")]
    assert seen == ["0", "1"]


@pytest.mark.parametrize(
    ("device", "seen", "slots"),
    [("cuda", "0", False), ("cuda:0", None, False), ("cuda:0", None, True)],
)
def test_with_fewer_gpus_they_wait_rather_than_share_one(meet, gpus, device, seen, slots):
    contracts = (*diamond(numeric=True), contract("writer", "first"))
    orders = {"left": {"awaits": ["writer ended"]}}  # needs no GPU: overtakes
    choose = None if slots else gpus(1)  # None: Prefect counts GPUs, but two slots say nothing here
    meet(contracts=contracts, orders=orders, device=device, choose_gpus=choose)
    for before, after in (("left", "middle"), ("middle", "right")):
        assert meet.told(f"{after} began")["when"] > meet.told(f"{before} ended")["when"]
    assert {meet.told(f"{name} began")["CUDA_VISIBLE_DEVICES"] for name in MIDDLE} == {seen}


def test_a_gpu_of_another_run_is_not_taken_for_one_that_is_free(meet, gpus):
    choose = gpus(2)
    with choose(1):  # another run's
        meet(contracts=diamond(numeric=True), device="cuda", choose_gpus=choose)
    assert meet.told("middle began")["when"] > meet.told("left ended")["when"]
    assert {meet.told(f"{name} began")["CUDA_VISIBLE_DEVICES"] for name in MIDDLE} == {"1"}


def test_peak_memory_is_the_childs_alone(meet):
    held = bytearray(b"x") * (256 * 2**20)
    meet()
    assert held
    peaks = [Store(meet.root).newest(name)["peak_memory_bytes"] for name in MIDDLE]
    assert all(2**20 < peak < 200 * 2**20 for peak in peaks)


def test_legs_with_one_key_make_it_once(meet):
    contracts = (contract("first", legs=True, rounds=lambda recipe: True),)
    meet(contracts=contracts, legs={"a": {}, "b": {}})
    assert (meet.ears.ran, meet.ears.cached) == (["first@1#a"], ["first@1#b"])


def test_latest_is_the_last_of_the_plan_whoever_ends_first(meet):
    contracts = (contract("self_train", legs=True, rounds=lambda recipe: True, sections=("toy",)),)
    orders = {"self_train#a": {"awaits": ["self_train@1#b is known to have ended"]}}
    legs = {"a": {"toy.count": 1}, "b": {}}
    meet(contracts=contracts, orders=orders, legs=legs, listener=Herald(meet.events))
    assert meet.ears.ran == ["self_train@1#b", "self_train@1#a"]
    assert (meet.root / "latest" / "model").resolve().parent.name == "self_train@1#b"


def test_in_a_log_every_line_names_its_instance(meet, capsys):
    meet(orders=BOTH_AT_ONCE, listener=Console(beside=2))
    lines = capsys.readouterr().out.splitlines()
    assert {"left: started", "middle: started", "last: started"} <= set(lines)
    assert "  first: all visited" in lines
    assert all(line.strip().startswith(("first", *MIDDLE, "last")) for line in lines)


def test_on_a_terminal_each_has_a_bar_until_it_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    made = new_engine(tmp_path, diamond())
    artifact = Artifact(name="left", key="k", folder=tmp_path / "left", manifest={})
    result = Result(artifact=artifact, cached=False, seconds=1.0, text="all seen")

    with Console(beside=2) as listener:
        bars = [listener.stage_started(made.instances[name], None) for name in MIDDLE[:2]]
        for bar in bars:
            bar.start(8, "visits")
            bar.advance(3, loss=0.5)
        drawn = redrawn(listener, capsys).err
        assert drawn.count("3/8") >= 2
        assert all(name in drawn for name in MIDDLE[:2])
        StandardError().write("INFO a line of the log\n")
        assert "\x1b[2K" in capsys.readouterr().err.split("INFO")[0], "bars are wiped off before it"
        listener.stage_finished(made.instances["left"], result)
        assert capsys.readouterr().out.startswith("left "), "a line is not for the bars' stream"
        drawn = redrawn(listener, capsys).err
        assert ("middle" in drawn, "left" in drawn) == (True, False)
        bars[1].note("half way")
        assert "middle: half way" in capsys.readouterr().err


def test_a_line_that_cannot_be_printed_leaves_the_bars_running(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    made = new_engine(tmp_path, diamond())

    def fails(text):
        raise OSError(f"no space for {text!r}")

    with Console(beside=2) as listener:
        listener.stage_started(made.instances["left"], None)
        monkeypatch.setattr(console, "say", fails)
        with pytest.raises(OSError, match="no space for 'half way'"):
            listener.say("half way")
        assert listener._bars.live.is_started


def redrawn(listener, capsys):
    """What the bars look like now."""
    capsys.readouterr()
    listener._bars.refresh()
    return capsys.readouterr()


RUN_DIAMOND = """
import sys
from pathlib import Path
from flows.runs import run
from tests.test_flows_beside import diamond, new_engine
from tests.toy_pipeline import Ears, in_process
made = new_engine(Path(sys.argv[1]), diamond())
run(made, list(made.instances.values()), listener=Ears(), execute=in_process)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_whatever_stops_the_run_ends_its_children_and_the_same_command_goes_on(meet, stop):
    meet(root=meet.root / "undisturbed")
    root, waits = meet.root / "stopped", {"awaits": ["nothing of that kind"]}
    for event in meet.events.glob("*"):
        event.unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_DIAMOND, str(root)],
        cwd=ROOT,
        env={**os.environ, "TOY_ORDERS": json.dumps({"left": waits, "middle": waits})},
        stderr=subprocess.PIPE,
        text=True,
        # A job in a script's background is started with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    both = [meet.events / "left began", meet.events / "middle began"]
    wait_until(lambda: all(path.exists() for path in both))
    wait_until(lambda: [one["progress"] for one in shown(root)] == ["0/2 visits"] * 2)
    assert [one["instance"] for one in shown(root)] == ["left", "middle"]
    assert all(one["held_by"].startswith(f"process {process.pid} ") for one in shown(root))
    children = [json.loads(path.read_text())["pid"] for path in both]
    process.send_signal(stop)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == -stop, said
    wait_until(lambda: not any(lives(pid) for pid in children))
    assert not (meet.events / "right began").exists()
    assert set(outcomes(root)) == {"first"}
    assert not list(root.glob("*/.failed-*"))
    record = json.loads(Store(root).runs()[-1].read_text())
    assert record["status"] == ("interrupted" if stop == signal.SIGINT else "running")
    meet(root=root)
    assert outcomes(root) == outcomes(meet.root / "undisturbed")
    assert sorted(name for name, resumes in meet.ears.started if resumes) == ["left", "middle"]


def shown(root):
    """What `clouds status` says is running."""
    return [one for one in status(Store(root)).unfinished if one["held_by"]]


def lives(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
