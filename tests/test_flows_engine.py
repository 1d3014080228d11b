"""The engine and the store: what runs, what is skipped, and that nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flows.digests import listing_digest
from flows.inspection import status
from flows.outputs import StoreError
from flows.pipeline import select
from flows.recipes import ConfigError
from flows.runs import run
from flows.steps import MissingNeedError, StageError
from flows.store import Store
from stages.contracts import CONTRACTS
from tests.toy_pipeline import Ears, engine, in_child, in_process

ROOT = Path(__file__).resolve().parents[1]
LEGS = {"control": {"share.factor": 1}, "refined": {}}


def go(root, *, execute=in_process, chosen=None, force=frozenset(), **settings):
    made = engine(root, force=force, **settings)
    ears = Ears()
    picked = select(made.instances, **(chosen or {}))
    record = run(made, picked, listener=ears, execute=execute)
    return ears, record


def actions(root, force=frozenset(), **settings):
    made = engine(root, force=force, **settings)
    return {step.instance.name: step for step in made.plan(made.instances.values())}


def digests(root):
    store = Store(root)
    found = {}
    for folder in store.artifacts():
        manifest = store.manifest(folder)
        if manifest["stage"] != "report":
            found[manifest["instance"], manifest["key"]] = manifest["digest"]
    return found


def test_a_second_run_does_nothing(tmp_path):
    first, _ = go(tmp_path, legs=LEGS)
    second, record = go(tmp_path, legs=LEGS)
    assert first.ran == [
        "numbers",
        "sum",
        "share@1#control",
        "share@1#refined",
        "report",
    ]
    assert second.ran == []
    assert second.cached == first.ran
    assert record["status"] == "completed"
    assert {step.action for step in actions(tmp_path, legs=LEGS).values()} == {"skip"}


def test_rounds_follow_each_other(tmp_path):
    ears, _ = go(tmp_path, rounds={"count": 2})
    assert ears.ran == ["numbers", "sum", "share@1", "share@2", "report"]
    one = int((find(tmp_path, "share@1") / "share.txt").read_text())
    two = int((find(tmp_path, "share@2") / "share.txt").read_text())
    assert two == 2 * one


def find(root, name):
    store = Store(root)
    return store.folder(name, store.newest(name)["key"])


def test_a_changed_setting_reruns_what_reads_it_and_says_old_and_new(tmp_path):
    go(tmp_path)
    plan = actions(tmp_path, share={"factor": 5})
    assert plan["numbers"].action == plan["sum"].action == "skip"
    assert plan["share@1"].action == "run"
    assert plan["share@1"].changes == ("share.factor: 2 -> 5",)
    assert plan["report"].action == "may run"
    ears, _ = go(tmp_path, share={"factor": 5})
    assert ears.ran == ["share@1", "report"]


def test_going_back_to_old_settings_finds_the_old_artifacts(tmp_path):
    go(tmp_path)
    go(tmp_path, share={"factor": 5})
    ears, _ = go(tmp_path)
    assert ears.ran == []


def test_what_cannot_change_a_result_is_not_in_the_key(tmp_path):
    go(tmp_path)
    ears, _ = go(tmp_path, toy={"workers": 7}, run={"device": "cpu"})
    assert ears.ran == []


def test_an_equal_output_cuts_off_what_follows(tmp_path):
    go(tmp_path, total={"unit": 10**6})
    ears, _ = go(tmp_path, total={"unit": 2 * 10**6})
    assert ears.ran == ["sum"]


def test_legs_share_what_they_do_not_change(tmp_path):
    ears, _ = go(tmp_path, legs={"a": {}, "b": {"total.unit": 3}})
    assert ears.ran[:2] == ["numbers", "sum"]
    assert set(ears.ran) == {
        "numbers",
        "sum",
        "sum#b",
        "share@1#a",
        "share@1#b",
        "report",
    }


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "shard-00001" / "4.txt").unlink(), "4.txt is missing"),
        (lambda folder: (folder / "shard-00001" / "4.txt").write_text(""), "4.txt is truncated"),
        (lambda folder: (folder / "shard-00001" / "new.txt").write_text("x"), "does not belong"),
        (lambda folder: (folder / "shard-00001" / "shard.json").write_text("{}"), "is altered"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "unreadable"),
    ],
)
def test_damage_is_named_and_only_the_damaged_is_made_again(tmp_path, damage, named):
    go(tmp_path)
    before = digests(tmp_path)
    kept = find(tmp_path, "numbers") / "shard-00000" / "0.txt"
    stamp = kept.stat().st_mtime_ns
    damage(find(tmp_path, "numbers"))
    plan = actions(tmp_path)
    assert plan["numbers"].action == "run"
    assert named in plan["numbers"].reason
    ears, _ = go(tmp_path)
    assert ears.ran == ["numbers"]
    assert digests(tmp_path) == before
    if "manifest" not in named and "unreadable" not in named:
        assert kept.stat().st_mtime_ns == stamp, "whole shards are kept"


def test_a_file_of_equal_size_with_other_bytes_is_found(tmp_path):
    go(tmp_path)
    victim = find(tmp_path, "sum") / "sum.txt"
    text = victim.read_text()
    victim.write_text(str((int(text[0]) + 1) % 10) + text[1:])
    assert "sum.txt is altered" in actions(tmp_path)["sum"].reason


def test_touched_but_equal_files_are_no_damage(tmp_path):
    go(tmp_path)
    os.utime(find(tmp_path, "sum") / "sum.txt")
    assert actions(tmp_path)["sum"].action == "skip"


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    go(tmp_path)
    folder = find(tmp_path, "sum")
    (tmp_path / "secret.txt").write_text("x")
    (folder / "sum.txt").unlink()
    (folder / "sum.txt").symlink_to(tmp_path / "secret.txt")
    assert "sum.txt is unsafe" in actions(tmp_path)["sum"].reason


def test_links_that_lead_nowhere_or_back_hide_nothing_from_a_listing(tmp_path):
    (tmp_path / "deeper").mkdir()
    for number in range(8):
        (tmp_path / f"{number}.png").write_text("x")
        (tmp_path / f"link_{number}").symlink_to(tmp_path / "nothing")
    (tmp_path / "deeper" / "back").symlink_to(tmp_path)
    before = listing_digest([tmp_path], tmp_path)
    assert listing_digest([tmp_path], tmp_path) == before
    for number in range(8):
        (tmp_path / f"{number}.png").write_text("longer")
        after = listing_digest([tmp_path], tmp_path)
        assert after != before
        before = after


def test_a_failed_stage_keeps_its_error_and_its_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_FAIL_AT", "7")
    with pytest.raises(StageError, match="item 7 is bad") as caught:
        go(tmp_path)
    assert caught.value.user
    kept = json.loads(caught.value.kept.read_text())
    assert "item 7 is bad" in kept["traceback"]
    plan = actions(tmp_path)["numbers"]
    assert "2 finished shards" in plan.resumes
    monkeypatch.delenv("TOY_FAIL_AT")
    ears, _ = go(tmp_path)
    assert "6/12 numbers" in ears.said
    assert not caught.value.kept.exists()


def test_an_unexpected_error_is_not_called_a_users(tmp_path):
    def broken(_spec, _progress, _lock):
        raise ZeroDivisionError("oops")

    with pytest.raises(StageError) as caught:
        go(tmp_path, execute=broken)
    assert not caught.value.user


def test_a_stage_alone_names_the_command_for_what_is_missing(tmp_path):
    with pytest.raises(MissingNeedError, match=r"sum needs numbers, .*--stage numbers"):
        go(tmp_path, chosen={"stage": "sum"})
    go(tmp_path, chosen={"stage": "numbers"})
    ears, _ = go(tmp_path, chosen={"stage": "sum"})
    assert ears.ran == ["sum"]


def test_force_runs_a_done_stage_once_more(tmp_path):
    go(tmp_path)
    ears, _ = go(tmp_path, force=frozenset({"numbers"}))
    assert ears.ran == ["numbers"], "an equal output cuts off what follows"
    assert actions(tmp_path, force=frozenset({"numbers"}))["numbers"].reason == "forced"
    with pytest.raises(ConfigError, match="did you mean 'numbers'"):
        go(tmp_path, force=frozenset({"number"}))


def test_from_and_until_cut_the_order(tmp_path):
    ears, _ = go(tmp_path, chosen={"until_stage": "sum"})
    assert ears.ran == ["numbers", "sum"]
    ears, _ = go(tmp_path, chosen={"from_stage": "share"})
    assert ears.ran == ["share@1", "report"]


def test_an_unwritable_artifacts_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--artifacts"):
        go(tmp_path / "file" / "artifacts")


def test_ctrl_c_keeps_finished_shards(tmp_path):
    class Interrupting(Ears):
        def start(self, total, unit, *, done=0):
            super().start(total, unit, done=done)
            self.left = 8

        def advance(self, count=1, **metrics):
            self.left -= count
            if not self.left:
                raise KeyboardInterrupt

    made = engine(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(made, list(made.instances.values()), listener=Interrupting(), execute=in_process)
    assert "2 finished shards" in actions(tmp_path)["numbers"].resumes
    assert json.loads(Store(tmp_path).runs()[-1].read_text())["status"] == "interrupted"


RUN_TOY = """
import sys
from pathlib import Path
from flows.runs import run
from stages.contracts import CONTRACTS
from tests.toy_pipeline import Ears, engine, in_process, in_child
made = engine(Path(sys.argv[1]))
ears = Ears()
run(made, list(made.instances.values()), listener=ears, execute=globals()[sys.argv[2]])
print("ran", *ears.ran)
print("said", *ears.said)
"""


def start_process(root, executor, **env):
    return subprocess.Popen(
        [sys.executable, "-c", RUN_TOY, str(root), executor],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("executor", ["in_process", "in_child"])
def test_kill_9_loses_nothing_and_needs_no_unlock(tmp_path, executor):
    go(tmp_path / "undisturbed")
    root = tmp_path / "killed"
    process = start_process(root, executor, TOY_PAUSE_S="0.05")
    wait_until(lambda: list(root.glob("numbers/.staging-*/shard-00001")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ears, _ = go(root)
    resumed = [line for line in ears.said if line.endswith("/12 numbers")]
    assert int(resumed[0].split("/")[0]) >= 6
    assert digests(root) == digests(tmp_path / "undisturbed")


def test_a_killed_run_is_not_said_to_be_running(tmp_path):
    store = Store(tmp_path)
    store.open()
    store.write_run({"id": "1", "recipe": "toy", "status": "running"})
    assert status(store).last_run["status"].startswith("stopped")
    store.staging("numbers", "key").mkdir(parents=True)
    with store.lock("numbers", "key", waiting=print):
        assert status(store).last_run["status"] == "running"


def test_a_child_that_is_killed_fails_the_stage_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_KILL_AT", "7")
    with pytest.raises(StageError, match="SIGKILL"):
        go(tmp_path, execute=in_child)
    monkeypatch.delenv("TOY_KILL_AT")
    ears, _ = go(tmp_path, execute=in_child)
    assert ears.ran[0] == "numbers"


def test_a_second_process_waits_and_then_finds_it_done(tmp_path):
    first = start_process(tmp_path, "in_process", TOY_PAUSE_S="0.3")
    wait_until(lambda: list(tmp_path.glob("numbers/.staging-*")))
    second = start_process(tmp_path, "in_process")
    out_1, err_1 = first.communicate(timeout=60)
    out_2, err_2 = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), err_1 + err_2
    assert "ran numbers" in out_1
    assert "numbers" not in out_2.split("said")[0].split()[1:2]
    assert f"waiting for process {first.pid}" in out_2


def test_adoptions_at_the_same_time_are_all_kept(tmp_path):
    code = (
        "import sys\nfrom flows.store import Store\n"
        "for n in range(40): Store(sys.argv[1]).pin(f'{sys.argv[2]}{n}', 'key')"
    )
    Store(tmp_path).open()
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=ROOT)
        for name in ("a", "b")
    ]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(Store(tmp_path).pins()) == 80


def test_plan_imports_neither_torch_nor_prefect():
    code = (
        "import sys\nfrom flows.cli import main\n"
        "main(['plan', '--recipe', 'camvid', '--artifacts', 'nowhere'])\n"
        "main(['config', 'validate', '--recipe', 'camvid'])\n"
        "bad = {'torch', 'prefect', 'transformers', 'diffusers', 'numpy'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scratch_state_outlives_the_stage_but_not_the_commit(tmp_path):
    def with_state(spec, progress, _lock):
        summary = in_process(spec, progress, _lock)
        (Path(spec["out"]) / "state").mkdir(exist_ok=True)
        (Path(spec["out"]) / "state" / "step.pt").write_text("x")
        return summary

    go(tmp_path, execute=with_state)
    assert not list(tmp_path.glob("*/*/state"))
    assert not any("state" in path for path in Store(tmp_path).newest("numbers")["outputs"])


def test_want_of_memory_says_what_helps_and_keeps_what_is_finished(tmp_path):
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    def full(_spec, _progress, _lock):
        raise OutOfMemoryError("tried to allocate 20 GiB\nand more")

    made = engine(tmp_path)
    contract = replace(made.instances["numbers"].contract, saves_memory="a lower toy.count")
    made.store.open()
    with pytest.raises(StageError) as caught:
        made.run_one(
            replace(made.instances["numbers"], contract=contract), listener=Ears(), execute=full
        )
    assert caught.value.user
    assert str(caught.value) == (
        "numbers: memory does not suffice: tried to allocate 20 GiB. What needs less: a lower "
        "toy.count. What is finished is kept."
    )


def test_every_stage_that_loads_a_network_says_what_saves_memory():
    assert [c.name for c in CONTRACTS if (c.numeric or c.weights) and not c.saves_memory] == []


def test_peak_memory_is_that_of_the_stage_not_of_the_process(tmp_path):
    def hungry(spec, progress, lock):
        if spec["stage"] == "numbers":
            held = bytearray(200 * 2**20)
            assert held
            del held
        return in_process(spec, progress, lock)

    go(tmp_path, execute=hungry)
    store = Store(tmp_path)
    peaks = {name: store.newest(name)["peak_memory_bytes"] for name in ("numbers", "sum")}
    assert peaks["numbers"] > peaks["sum"] + 150 * 2**20
    go(tmp_path / "child", execute=in_child)
    assert Store(tmp_path / "child").newest("numbers")["peak_memory_bytes"] > 10 * 2**20
