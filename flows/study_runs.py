"""A study's trials run one after the other through the store, and what is there tabulated.

The table is renewed after every trial, so an interrupted study shows what is done; the same command
goes on.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from flows.digests import key_of
from flows.engine import Engine
from flows.keys import ingredients
from flows.outputs import StoreError, read_json
from flows.pipeline import Instance
from flows.provenance import facts
from flows.recipes import ConfigError
from flows.runs import run
from flows.steps import Artifact, Executor, Listener, MissingNeedError, StageError, Step
from flows.studies import Figure, Plan, Trial
from stages.published import Table as PublishedTable
from stages.published import read_published
from stages.report_scores import Number, number
from stages.shards import write_json
from stages.study_table import Outcome, Table, as_json, as_markdown, read_outcome, rows_of


class StudyListener(Listener, Protocol):
    """Who is told how a study goes on."""

    def trial_started(self, place: int, total: int, trial: Trial, pending: int) -> None:
        """A trial begins, of whose stage runs `pending` are to do."""

    def trial_finished(self, trial: Trial, outcomes: Sequence[Outcome], failures: int) -> None:
        """A trial ended; with failures, some outcomes are missing."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The distinct stage runs of a study: what several trials share is counted once."""

    steps: tuple[Step, ...]

    @property
    def pending(self) -> list[Step]:
        """What would run, or may."""
        return [step for step in self.steps if step.action != "skip"]

    @property
    def estimate_s(self) -> float:
        """Seconds of those whose rate, or last time, is known."""
        known = (step.estimate_s or step.last_seconds for step in self.pending)
        return sum(seconds for seconds in known if seconds is not None)

    @property
    def num_unknown(self) -> int:
        """Stage runs of which no time is known."""
        return sum(not (step.estimate_s or step.last_seconds) for step in self.pending)


def forecast(trials: Iterable[Trial]) -> Forecast:
    """What a study would run. Reads the store, runs nothing.

    Two steps of different trials are one if they have the same settings all the way up: before
    anything ran there are no output digests to tell by.
    """
    distinct: dict[str, Step] = {}
    for trial in trials:
        marks: dict[str, str] = {}
        for step in trial.engine.plan(trial.instances):
            marks[step.instance.name] = _mark(step.instance, marks, trial.engine)
            distinct.setdefault(marks[step.instance.name], step)
    return Forecast(steps=tuple(distinct.values()))


def _mark(instance: Instance, marks: Mapping[str, str], engine: Engine) -> str:
    inputs = {entry.role: f"{marks[entry.instance]} {entry.part}" for entry in instance.inputs}
    return key_of(ingredients(instance, inputs, engine.store))


def run_study(plan: Plan, *, listener: StudyListener, execute: Executor) -> Table:
    """Run what is missing of every trial; a failure ends only what depends on it.

    Returns:
        The table, as written to the plan's folder; its failures say what is missing and why.
    """
    failures: list[str] = []
    for place, trial in enumerate(plan.trials, start=1):
        pending = [step for step in trial.engine.plan(trial.instances) if step.action != "skip"]
        listener.trial_started(place, len(plan.trials), trial, len(pending))
        fresh = _run_trial(plan, trial, listener, execute)
        failures += fresh
        listener.trial_finished(trial, outcomes_of(plan, trial), len(fresh))
        write(plan, tabulate(plan, failures))
    table = tabulate(plan, failures)
    write(plan, table)
    return table


def _run_trial(plan: Plan, trial: Trial, listener: StudyListener, execute: Executor) -> list[str]:
    """Run a trial; after a failure, go on with what does not depend on it."""
    failed: dict[str, str] = {}
    where = f"{trial.case}, seed {trial.seed}"
    while chosen := _untouched(trial.instances, failed):
        try:
            run(
                trial.engine,
                chosen,
                listener=listener,
                execute=execute,
                overrides=trial.overrides,
                study=f"{plan.title}: {where}",
            )
            break
        except StageError as error:
            failed[error.instance] = f"{error} (the whole error: {_place(error.kept)})"
            listener.say(f"{where}: {error.instance} failed; going on without it")
        except (ConfigError, MissingNeedError, StoreError) as error:
            failed["this trial"] = str(error)
            listener.say(f"{where}: {error}")
            break
    return [f"{where}: {reason}" for reason in failed.values()]


def _untouched(instances: Sequence[Instance], failed: Mapping[str, str]) -> list[Instance]:
    """The instances that need nothing of what failed."""
    gone = set(failed)
    for instance in instances:
        if any(entry.instance in gone for entry in instance.inputs):
            gone.add(instance.name)
    return [instance for instance in instances if instance.name not in gone]


def _place(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative


# Tabulating


def tabulate(plan: Plan, failures: Sequence[str] = ()) -> Table:
    """What is there of a study, whoever made it.

    Raises:
        ConfigError: a data set that the study tabulates was not judged.
    """
    found = [outcomes_of(plan, trial) for trial in plan.trials]
    outcomes = [one for group in found for one in group]
    judged = list(dict.fromkeys(name for one in outcomes for name in one.mious))
    targets = plan.study.targets or tuple(judged)
    if judged and (unknown := set(targets) - set(judged)):
        raise ConfigError(
            f"study {plan.study.name!r} tabulates {', '.join(sorted(unknown))}, which was not "
            f"judged; judged were {', '.join(judged)}."
        )
    compare, seeds = plan.study.compare, tuple(dict.fromkeys(t.seed for t in plan.trials))
    done = sum(
        len(group) == len(trial.wanted) for group, trial in zip(found, plan.trials, strict=True)
    )
    return Table(
        title=plan.title,
        description=plan.study.description,
        facts=_facts(plan, outcomes),
        seeds=seeds,
        targets=targets,
        rows=rows_of(
            outcomes, targets=targets, seeds=seeds, reference=(compare.case, compare.model)
        ),
        reference=", ".join(word for word in (compare.case, compare.model) if word) or "itself",
        num_trials=len(plan.trials),
        num_done=done,
        failures=tuple(failures),
        published=tuple(_published(plan.study.published)),
    )


def _published(tables: Sequence[PublishedTable]) -> Iterator[dict[str, Any]]:
    """Rows of others, in percent as printed; unlike ours, and marked so."""
    for name in tables:
        for row in read_published(name):
            yield {
                "method": f"{row.method}, {row.variant}" if row.variant else row.method,
                "encoder": row.encoder,
                "source": row.source,
                **row.miou,
                "average": row.average,
                "from": row.where,
                "": row.marker,
            }


def _facts(plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    here = facts()
    return {
        "recipe": plan.recipe,
        "choices": dict(plan.choices),
        "overrides": [*_texts(plan.study.overrides), *plan.overrides],
        "cases": {trial.case: dict(plan.study.cases[trial.case]) for trial in plan.trials},
        "commit": here["git_revision"],
        "judged_by_commits": sorted({one.revision for one in outcomes if one.revision}),
        "host": here["host"],
    }


def _texts(overrides: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in overrides.items()]


def outcomes_of(plan: Plan, trial: Trial) -> list[Outcome]:
    """The trial's evaluations that are there and whole."""
    found = []
    for model, name in trial.wanted.items():
        artifact = _there(trial.engine, name)
        if artifact is not None:
            one = read_outcome(
                artifact.folder,
                case=trial.case,
                model=model,
                seed=trial.seed,
                manifest=artifact.manifest,
            )
            figures = {
                label: _figure(trial, figure)
                for label, figure in plan.study.figures.items()
                if model in (figure.models or (model,))
            }
            found.append(replace(one, figures=figures))
    return found


def _there(engine: Engine, name: str) -> Artifact | None:
    try:
        return engine.artifact_of(name)
    except (MissingNeedError, StoreError):
        return None


def _figure(trial: Trial, figure: Figure) -> Number:
    name = figure.instance.replace("@last", f"@{trial.engine.recipe.rounds.count}")
    artifact = _there(trial.engine, name) if name in trial.engine.instances else None
    value: Any = read_json(artifact.folder / figure.file) if artifact else None
    for part in figure.at.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return number(value)


def write(plan: Plan, table: Table) -> None:
    """Leave `table.json`, `table.md` and `picture.svg` in the study's folder."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / "table.json", as_json(table))
    texts: dict[str, Callable[[], str]] = {"table.md": lambda: as_markdown(table)}
    if table.rows:
        from stages.study_chart import draw

        texts["picture.svg"] = lambda: draw(table)
    for name, text in texts.items():
        temporary = plan.folder / f"{name}.tmp"
        temporary.write_text(text(), encoding="utf-8")
        temporary.replace(plan.folder / name)
