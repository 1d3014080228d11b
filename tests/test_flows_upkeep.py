"""Comparing and clearing what runs left, and drawing what needs what. No torch."""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flows import housekeeping
from flows.cli import _GROUPS, _VERBS, main
from flows.compare import compare
from flows.recipes import load_recipe
from flows.runs import run
from flows.store import Store
from tests.toy_pipeline import Ears, engine, in_process

ROOT = Path(__file__).resolve().parents[1]
LEGS = {"legs": {"double": {"share.factor": 2}, "triple": {"share.factor": 3}}}


def run_toy(root, **settings):
    """Run the toy as the command line would; returns the run's record."""
    toy = engine(root, **settings)
    chosen = list(toy.instances.values())
    return run(toy, chosen, listener=Ears(), execute=in_process)


def clouds(root, *words):
    return main([*words, "--artifacts", str(root)])


def names(sweep):
    return sorted(f"{one.kind}: {one.path.parent.name}" for one in sweep.leftovers)


# gc


def test_nothing_goes_that_a_run_recorded(tmp_path):
    run_toy(tmp_path)
    run_toy(tmp_path, toy={"count": 15})
    sweep = housekeeping.look(Store(tmp_path), older_days=0)
    assert sweep.leftovers == ()
    assert sweep.num_kept == len(list(Store(tmp_path).artifacts()))


def test_what_only_a_dropped_run_used_goes_and_the_rest_stays_whole(tmp_path, capsys):
    run_toy(tmp_path)
    time.sleep(1.1)  # run ids, and with them the order of runs, tell seconds
    kept = run_toy(tmp_path, total={"unit": 7})
    before = {folder.name for folder in Store(tmp_path).artifacts()}
    assert clouds(tmp_path, "gc", "--older", "0", "--keep-runs", "1") == 0
    assert "Nothing was removed" in capsys.readouterr().out
    assert {folder.name for folder in Store(tmp_path).artifacts()} == before
    assert clouds(tmp_path, "gc", "--older", "0", "--keep-runs", "1", "--delete") == 0
    left = {folder.name for folder in Store(tmp_path).artifacts()}
    assert left == {entry["key"] for entry in kept["instances"].values()}
    assert left < before
    assert len(Store(tmp_path).runs()) == 1
    assert not list(tmp_path.glob("*/.trash-*"))
    toy = engine(tmp_path, total={"unit": 7})
    assert all(step.action == "skip" for step in toy.plan(toy.instances.values()))


def test_what_referred_artifacts_were_made_from_stays(tmp_path):
    record = run_toy(tmp_path)
    (tmp_path / "runs" / f"{record['id']}.json").unlink()
    store = Store(tmp_path)
    assert housekeeping.look(store, older_days=0).leftovers == ()  # latest/report.html
    (tmp_path / "latest" / "report.html").unlink()
    store.point_latest("model", store.folder("sum", record["instances"]["sum"]["key"]))
    assert names(housekeeping.look(store, older_days=0)) == [
        "artifact: report",
        "artifact: share@1",
    ]


def test_a_study_s_table_and_an_adoption_are_references(tmp_path):
    record = run_toy(tmp_path)
    (tmp_path / "runs" / f"{record['id']}.json").unlink()
    keys = {name: entry["key"] for name, entry in record["instances"].items()}
    table = tmp_path / "studies" / "s" / "1" / "table.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps({"rows": [{"artifacts": [{"key": keys["share@1"]}]}]}))
    Store(tmp_path).pin("report", keys["report"])
    assert housekeeping.look(Store(tmp_path), older_days=0).leftovers == ()


def test_leftovers_are_found_by_age_and_never_taken_from_a_live_process(tmp_path, capsys):
    run_toy(tmp_path)
    store = Store(tmp_path)
    for name in (".staging-" + "a" * 20, ".staging-" + "b" * 20, ".trash-x-1-2"):
        (tmp_path / "sum" / name).mkdir()
        (tmp_path / "sum" / name / "part").write_text("1234")
    (tmp_path / "sum" / f".failed-{'a' * 20}.json").write_text("{}")
    assert housekeeping.look(store).num_young == 4
    day_before = time.time() - 2 * housekeeping.DAY_S
    for path in [*tmp_path.glob("sum/.[stf]*"), *tmp_path.glob("sum/.[st]*/part")]:
        os.utime(path, (day_before, day_before))
    code = (
        "import sys, time; from flows.store import Store\n"
        f"with Store({str(tmp_path)!r}).lock('sum', {'b' * 20!r}, waiting=print):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            sweep = housekeeping.look(store)
            assert sweep.num_locked == 1
            assert [one.num_bytes for one in sweep.leftovers] == [4, 2, 4]
            held = housekeeping.Leftover(
                kind="unfinished work",
                path=tmp_path / "sum" / (".staging-" + "b" * 20),
                num_bytes=4,
                age_s=0,
                lock=("sum", "b" * 20),
            )
            assert not housekeeping.remove(store, held)
            assert held.path.is_dir()
            assert clouds(tmp_path, "gc", "--delete", "--json") == 0
        finally:
            holder.kill()
    told = json.loads(capsys.readouterr().out)
    assert all(one["removed"] for one in told)
    assert [path.name for path in tmp_path.glob("sum/.[stf]*")] == [".staging-" + "b" * 20]


def test_what_a_starting_run_builds_on_is_safe_even_if_older_records_go(tmp_path):
    run_toy(tmp_path)

    def looks_meanwhile(spec, progress, lock):
        if spec["stage"] == "share":
            sweep = housekeeping.look(Store(tmp_path), older_days=0, keep_runs=1)
            assert not [
                one for one in sweep.leftovers if one.path.parent.name in ("sum", "numbers")
            ]
            assert sweep.num_locked >= 1
        return in_process(spec, progress, lock)

    time.sleep(1.1)
    toy = engine(tmp_path, share={"factor": 5})
    record = run(toy, list(toy.instances.values()), listener=Ears(), execute=looks_meanwhile)
    assert not record["instances"]["share@1"]["cached"]


@pytest.mark.parametrize("words", [["--older", "-1"], ["--keep-runs", "0"]])
def test_senseless_numbers_are_refused(tmp_path, words):
    with pytest.raises(SystemExit) as left:
        clouds(tmp_path, "gc", *words)
    assert left.value.code == 2


def test_gc_of_nothing_says_so(tmp_path, capsys):
    assert clouds(tmp_path / "none", "gc") == 2
    assert "no artifacts folder" in capsys.readouterr().err


# diff


def test_runs_differ_in_settings_inputs_and_nothing_else(tmp_path, capsys):
    run_toy(tmp_path)
    time.sleep(1.1)
    run_toy(tmp_path, share={"factor": 3})
    first, second, found = compare(Store(tmp_path), "before-last", "last")
    assert first.name != second.name
    told = {(one.group, one.name) for one in found if not one.name.endswith("seconds")}
    assert told == {("settings", "share.factor"), ("inputs", "share@1"), ("inputs", "report")}
    assert clouds(tmp_path, "diff", "last", "last") == 0
    assert "nothing differs" in capsys.readouterr().out


def test_artifacts_differ_by_settings_inputs_and_results(tmp_path):
    run_toy(tmp_path, toy={"count": 12})
    first = Store(tmp_path).newest("sum")["key"]
    run_toy(tmp_path, toy={"count": 15}, total={"unit": 7})
    second = next(f.name for f in Store(tmp_path).artifacts("sum") if f.name != first)
    _, _, found = compare(Store(tmp_path), first[:12], second)
    told = {one.name: one for one in found}
    assert (told["total.unit"].before, told["total.unit"].after) == (1, 7)
    assert told["numbers"].group == "inputs"
    assert "digest" in told


def test_recipes_differ_by_their_settings(tmp_path, capsys):
    assert clouds(tmp_path, "diff", "miniature", "tiny", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    steps = next(one for one in told["differences"] if one["name"] == "train_source.steps")
    wanted = [load_recipe(name).train_source.steps for name in ("miniature", "tiny")]
    assert [steps["before"], steps["after"]] == wanted
    assert wanted[0] != wanted[1]
    assert not any(one["name"] == "description" for one in told["differences"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sum", "nothing"], "Neither is it a recipe"),
        (["sum", "tiny"], "compare two artifacts"),
        (["last", "before-last"], "1 are recorded"),
        (["tiny", "nowhere.yaml"], "not there"),
    ],
)
def test_what_cannot_be_compared_is_explained(tmp_path, capsys, words, said):
    run_toy(tmp_path)
    assert clouds(tmp_path, "diff", *words) == 2
    assert said in capsys.readouterr().err


# graph


def test_a_graph_shows_every_instance_its_needs_and_state(tmp_path, capsys):
    assert clouds(tmp_path, "graph", "--recipe", "tiny") == 0
    text = capsys.readouterr().out
    assert "refine@1" in text
    line = next(line for line in text.splitlines() if line.startswith("evaluate@1#raw"))
    assert "<- self_train@1#raw, prepare" in line


def test_a_graph_in_every_form_has_the_same_boxes(tmp_path, capsys):
    found = {}
    for form in ("json", "mermaid", "dot", "svg"):
        assert clouds(tmp_path, "graph", "--recipe", "tiny", "--format", form) == 0
        found[form] = capsys.readouterr().out
    instances = [one["instance"] for one in json.loads(found["json"])]
    assert len(instances) > 10
    for name in instances:
        assert f'["{name}"]' in found["mermaid"]
        assert f'"{name}" [label=' in found["dot"]
    picture = ElementTree.fromstring(found["svg"])
    assert len(picture.findall(".//{*}rect")) == len(instances)
    # a need that a longer way shows is drawn once: refine also needs synthesize's pictures
    assert '"select@1" -> "refine@1"' in found["dot"]
    assert '"synthesize" -> "refine@1"' not in found["dot"]


def test_a_graph_tells_what_is_done(tmp_path, capsys):
    from flows.graphing import as_text

    run_toy(tmp_path, **LEGS)
    toy = engine(tmp_path, total={"unit": 7}, **LEGS)
    lines = as_text(toy.plan(toy.instances.values())).splitlines()
    states = {
        line.split()[0]: line[len(line.split()[0]) :].split("<-")[0].strip() for line in lines
    }
    assert states["numbers"] == "done"
    assert states["sum"] == "to run"
    assert states["share@1#double"] == "may run"
    assert lines[-1].endswith("<- everything above")


# estimates, settings shown


def test_an_estimate_grows_with_the_work_and_not_with_what_comes_before_it(tmp_path):
    run_toy(tmp_path, toy={"count": 12})
    made = Store(tmp_path).newest("numbers")
    working_s = made["work"]["seconds"]
    assert 0 < working_s <= made["seconds"]
    step = engine(tmp_path, toy={"count": 36}).plan(
        [engine(tmp_path, toy={"count": 36}).instances["numbers"]]
    )[0]
    before_s = made["seconds"] - working_s
    assert step.estimate_s == pytest.approx(before_s + 3 * working_s, abs=2e-3)


def test_show_takes_a_stage_with_one_instance_and_lists_those_of_several(tmp_path, capsys):
    run_toy(tmp_path, **LEGS, rounds={"count": 2})
    assert clouds(tmp_path, "show", "sum") == 0
    for what, meant in {
        "share": "share@1#double, share@1#triple, share@2#double, share@2#triple",
        "share@2": "share@2#double, share@2#triple",
    }.items():
        capsys.readouterr()
        assert clouds(tmp_path, "show", what) == 2
        assert f"{what!r} may be {meant}: name one." in capsys.readouterr().err


def test_show_prints_the_settings_as_a_recipe_could_hold_them(tmp_path, capsys):
    run_toy(tmp_path, toy={"count": 12})
    assert clouds(tmp_path, "show", "numbers") == 0
    assert "toy: {count: 12, modulus: 100, shard_size: 3, workers: 1}" in capsys.readouterr().out


# help


def test_help_lists_every_command_once_in_its_group(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in _VERBS:
        assert text.count(f"\n    {name} ") == 1, name
    grouped = [name for names_ in _GROUPS.values() for name in names_]
    assert len(grouped) == len(set(grouped))
