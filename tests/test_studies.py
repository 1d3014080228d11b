"""Studies: families of runs through one store, their tables, and what goes wrong in them."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from flows import study_runs
from flows.cli import main
from flows.recipes import ConfigError
from flows.runs import run
from flows.studies import arrange_study, load_study, study_files
from stages.launch import execute
from stages.study_table import (
    Outcome,
    Spread,
    Table,
    as_json,
    as_markdown,
    figure_text,
    rows_of,
)

STUDY = """
description: Does it pay?
recipe: tiny
seeds: [0, 1]
overrides:
  world.num_source: 8
  world.num_target: 2
  data.targets: [{name: night, layout: cityscapes, root: "@render_world/targets/night"}]
  train_source.steps: 1
  train_source.batch_size: 2
  self_train.steps: 1
  self_train.batch_size: 2
  write_prompts.num_prompts: 2
  synthesize.num_images: 2
  synthesize.steps: 1
  evaluate.num_predictions: 0
cases:
  half: {self_train.painted_share: 0.5}
  whole: {self_train.painted_share: 1.0}
models: {source: evaluate@0, refined: "evaluate@last#refined"}
compare: {model: source}
figures:
  pictures: {instance: refine@last, file: statistics.json, at: num_pictures, models: [refined]}
  nowhere: {instance: refine@last, at: no.such.number}
"""


class Watcher:
    """A listener that remembers which stages ran."""

    def __init__(self):
        self.ran, self.said, self.trials = [], [], []

    def say(self, text):
        self.said.append(text)

    def stage_started(self, instance, resumes):
        return self

    def stage_finished(self, instance, result):
        if not result.cached:
            self.ran.append(instance.name)

    def trial_started(self, place, total, trial, pending):
        self.trials.append((trial.case, trial.seed, pending))

    def trial_finished(self, trial, outcomes, failures):
        pass

    def start(self, total, unit, *, done=0):
        pass

    def advance(self, count=1, **metrics):
        pass

    def note(self, text):
        pass


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "points.yaml"
    path.write_text(STUDY)
    return str(path), str(tmp_path / "artifacts")


def run_here(spec, progress, _lock):
    return execute(spec, progress)


@pytest.mark.parametrize("name", sorted(study_files()))
def test_every_shipped_study_is_valid_with_each_of_its_choices(name, tmp_path):
    study = load_study(name)
    assert study.description
    for variable, choices in study.variables.items():
        for choice in choices:
            plan = arrange_study(
                name, artifacts=str(tmp_path), choices=[f"{variable}={choice}"], seeds=[0]
            )
            assert len(plan.trials) == len(study.cases)
    assert arrange_study(name, artifacts=str(tmp_path)).trials


def test_a_study_runs_shares_resumes_and_leaves_a_table(study, capsys):
    path, artifacts = study
    plan = arrange_study(path, artifacts=artifacts)
    ahead = study_runs.forecast(plan.trials)
    listener = Watcher()
    table = study_runs.run_study(plan, listener=listener, execute=run_here)
    assert not table.failures
    # the forecast counted what cases share once, and nothing else
    assert sorted(step.instance.name for step in ahead.pending) == sorted(listener.ran)
    assert listener.ran.count("train_source") == 2
    assert listener.ran.count("self_train@1#refined") == 4
    # rows: what is the same in every case is one row
    assert [(row.case, row.model) for row in table.rows] == [
        ("(all)", "source"),
        ("half", "refined"),
        ("whole", "refined"),
    ]
    written = json.loads((plan.folder / "table.json").read_text())
    assert written["num_done"] == written["num_trials"] == 4
    refined = written["rows"][1]
    assert refined["mean"]["num"] == 2
    assert set(refined["targets"]) == {"night"}
    assert set(refined["figures"]) == {"pictures"}
    assert refined["figures"]["pictures"]["values"] == {"0": 2.0, "1": 2.0}
    assert len(refined["artifacts"][0]["key"]) == 20
    assert "every value" in (plan.folder / "table.md").read_text().lower()
    ElementTree.parse(plan.folder / "picture.svg")
    # again: nothing runs
    assert main(["study", path, "--artifacts", artifacts]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["study", path, "--artifacts", artifacts, "--plan"]) == 0
    assert main(["study", path, "--artifacts", artifacts, "--plan", "--seeds", "0,5"]) == 3


def test_a_failure_ends_only_what_depends_on_it(study, capsys):
    path, artifacts = study
    plan = arrange_study(path, artifacts=artifacts, seeds=[0])
    listener = Watcher()

    def fails_with_half(spec, progress, lock):
        if spec["recipe"]["self_train"]["painted_share"] == 0.5 and spec["leg"]:
            raise ValueError("no masks today")
        return run_here(spec, progress, lock)

    table = study_runs.run_study(plan, listener=listener, execute=fails_with_half)
    assert [(row.case, row.model) for row in table.rows] == [
        ("(all)", "source"),
        ("whole", "refined"),
    ]
    assert table.num_done == 1
    (failure,) = table.failures
    assert "half, seed 0" in failure
    assert "no masks today" in failure
    assert "not whole: 1 of 2" in (plan.folder / "table.md").read_text()
    # mended, the same study goes on and only what is missing runs
    listener = Watcher()
    assert study_runs.run_study(plan, listener=listener, execute=run_here).num_done == 2
    assert listener.ran == ["self_train@1#refined", "evaluate@1#refined"]


def test_the_latest_model_is_no_study_s(study, tmp_path):
    path, artifacts = study
    plan = arrange_study(path, artifacts=artifacts, seeds=[0], cases=["half"])
    only_source = plan.trials[0].instances[:3]
    run(
        plan.trials[0].engine,
        only_source,
        listener=Watcher(),
        execute=run_here,
        study="points: half",
    )
    assert "train_source" in {instance.stage for instance in only_source}
    assert not (tmp_path / "artifacts" / "latest").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ablatoin"], "did you mean 'ablation'"),
        (["nowhere.yaml"], "not there"),
        (["ablation", "--case", "frosen"], "did you mean 'frozen'"),
        (["ablation", "--with", "pictures=wob"], "did you mean 'web'"),
        (["ablation", "--with", "picture=web"], "did you mean 'pictures'"),
        (["ablation", "--with", "web"], "VARIABLE=CHOICE"),
        (["ablation", "--seeds", "1,1"], "distinct"),
        (["ablation", "--recipe", "camvd"], "did you mean 'camvid'"),
        (["ablation", "--recipe", "rein_clip_l_gta5"], "does not have"),
        (["ablation", "--set", "segmenter.tuning.kind=full"], "come to the same recipe"),
        (["ablation", "--set", "refine.pints=3"], "did you mean 'points'"),
    ],
)
def test_a_mistake_is_explained_before_anything_runs(tmp_path, capsys, words, said):
    assert main(["study", *words, "--artifacts", str(tmp_path / "artifacts")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cases: {a: {}}\nmodels: {m: evaluate@0}\nsedes: [1]", "did you mean 'seeds'"),
        ("cases: {}\nmodels: {m: evaluate@0}", "cases"),
        ("cases: {a: {}}\nmodels: {m: evaluate@0}\ncompare: {case: b}", "compare.case 'b'"),
        ("- 1", "is a mapping"),
        ("a: [", "no YAML"),
    ],
)
def test_a_study_file_that_is_wrong_is_explained(tmp_path, text, said):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_study(str(path))


def outcome(case, model, seed, night, snow, key="k"):
    return Outcome(
        case=case,
        model=model,
        seed=seed,
        instance="evaluate@1",
        key=f"{key}{case}{model}{seed}",
        revision="abc",
        protocol={"mode": "whole", "step": seed},
        mious={"night": night, "snow": snow},
        class_ious={},
    )


def table_of(outcomes, **changes):
    rows = rows_of(outcomes, targets=["night", "snow"], seeds=[0, 1], reference=(None, "control"))
    fields = {
        "title": "t",
        "description": "",
        "facts": {},
        "seeds": (0, 1),
        "targets": ("night", "snow"),
        "rows": rows,
        "reference": "control",
        "num_trials": 2,
        "num_done": 2,
    }
    return Table(**{**fields, **changes})


def test_means_spreads_and_paired_differences_are_those_of_hand():
    outcomes = [
        outcome("a", "control", 0, 0.20, 0.40),
        outcome("a", "control", 1, 0.30, 0.50),
        outcome("a", "refined", 0, 0.24, 0.42),
        outcome("a", "refined", 1, 0.32, 0.50),
    ]
    control, refined = table_of(outcomes).rows
    assert control.difference is None
    assert control.mean.mean == pytest.approx(0.35)
    assert control.mean.std == pytest.approx(0.0707107, abs=1e-6)  # of 0.30 and 0.40
    assert refined.difference.values == {0: pytest.approx(0.03), 1: pytest.approx(0.01)}
    assert refined.difference.std == pytest.approx(0.0141421, abs=1e-6)
    text = as_markdown(table_of(outcomes))
    assert (
        "| a | refined | 28.0 ± 5.7 | 46.0 ± 5.7 | 37.0 ± 5.7 | +2.0 ± 1.4 (above in 2 of 2) |"
        in text
    )
    assert len(table_of(outcomes).protocols) == 1


def test_a_missing_seed_or_target_is_a_gap_and_no_number():
    outcomes = [
        outcome("a", "control", 0, 0.20, 0.40),
        outcome("a", "refined", 0, 0.24, None),
        outcome("a", "refined", 1, 0.32, 0.50),
    ]
    refined = table_of(outcomes).rows[1]
    assert refined.mean.values == {0: None, 1: pytest.approx(0.41)}
    assert refined.difference.values == {0: None, 1: None}
    assert refined.difference.mean is None
    json.dumps(as_json(table_of(outcomes)), allow_nan=False)
    assert Spread(values={0: 0.5}).std is None


def test_failures_and_published_numbers_are_marked():
    text = as_markdown(
        table_of([], failures=("a, seed 0: full",), published=({"method": "X|Y", "mean": 61.5},))
    )
    assert "not ours" in text
    assert "X\\|Y" in text
    assert "- a, seed 0: full" in text


def test_an_error_that_is_no_stage_s_own_stops_the_study(study):
    path, artifacts = study
    plan = arrange_study(path, artifacts=artifacts, seeds=[0], cases=["half"])

    def interrupted(spec, progress, lock):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study_runs.run_study(plan, listener=Watcher(), execute=interrupted)


def test_shares_are_told_in_percent_and_counts_as_they_are():
    assert figure_text(Spread(values={0: 0.25, 1: 0.35})) == "30.0 ± 7.1"
    assert figure_text(Spread(values={0: 82.0, 1: None})) == "82.0 (1)"
    assert figure_text(Spread(values={0: None})) == "–"
