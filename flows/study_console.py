"""What `clouds study` prints: the forecast, a line per trial, the table."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flows import console
from flows.pipeline import Instance
from flows.steps import Result
from flows.studies import Plan, Study, Trial
from flows.study_runs import Forecast
from stages.study_table import Outcome, Row, Table, difference_text, figure_text, spread_text


class StudyConsole(console.Console):
    """Listens to a study: what is found done goes without a line."""

    def stage_finished(self, instance: Instance, result: Result) -> None:
        """One line, indented, for what ran."""
        if not result.cached:
            super().stage_finished(instance, result)

    def trial_started(self, place: int, total: int, trial: Trial, pending: int) -> None:
        """Which trial, and how much of it is to do."""
        num = len(trial.instances)
        what = f"{pending} of {num} stage runs to do" if pending else "all done"
        console.say(f"[{place}/{total}] {trial.case}, seed {trial.seed}: {what}")

    def trial_finished(self, trial: Trial, outcomes: Sequence[Outcome], failures: int) -> None:
        """Its results in one line."""
        self._stop_bars()  # of what failed
        found = {one.model: one.mean for one in outcomes}
        words = [
            f"{model} {console.percent(found[model]) if model in found else 'missing'}"
            for model in trial.wanted
        ]
        console.say(f"  => mean mIoU %: {', '.join(words)}" + ("  (failures)" if failures else ""))


def forecast(plan: Plan, found: Forecast) -> None:
    """How many stage runs the study has, and what they come to."""
    cases = dict.fromkeys(trial.case for trial in plan.trials)
    seeds = dict.fromkeys(trial.seed for trial in plan.trials)
    console.say(f"study {plan.title}: {plan.study.description}")
    console.say(
        f"recipe {plan.recipe}; {len(cases)} cases ({', '.join(cases)}) x {len(seeds)} seeds "
        f"({', '.join(map(str, seeds))}) = {len(plan.trials)} trials"
    )
    total, to_do = Counter(), Counter()
    for step in found.steps:
        total[step.instance.stage] += 1
        to_do[step.instance.stage] += step.action != "skip"
    for stage, number in total.items():
        done = number - to_do[stage]
        console.say(f"  {stage:<16}{to_do[stage]:>4} to run{done:>6} done")
    if not found.pending:
        console.say(f"up to date: all {len(found.steps)} stage runs are done.")
        return
    time = ""
    if found.estimate_s:
        unknown = f", and {found.num_unknown} of unknown time" if found.num_unknown else ""
        time = f"; about {console.duration(found.estimate_s)}{unknown}"
    console.say(f"{len(found.pending)} of {len(found.steps)} stage runs to do{time}.")


def table(plan: Plan, result: Table) -> None:
    """The rows as a plain table, failures, and where everything is."""
    if result.rows:
        many = len(result.seeds) > 1
        figures = list(result.rows[0].figures)
        head = ["case", "model", *result.targets, "mean", f"to {result.reference}", *figures]
        console.table([head, *(_cells(row) for row in result.rows)], num_left=2)
        note = "mean ± standard deviation over seeds" if many else "one seed"
        console.say(f"mIoU in percent, {note}.")
    for failure in result.failures:
        console.error(failure)
    if result.num_done < result.num_trials:
        console.say(f"{result.num_done} of {result.num_trials} trials are whole.")
    for name in ("table.md", "table.json", "picture.svg"):
        if (plan.folder / name).is_file():
            console.say(f"{name:<12} {console.place(Path(plan.folder / name))}")


def _cells(row: Row) -> list[str]:
    spreads = [*row.targets.values(), row.mean]
    cells = [row.case, row.model, *map(spread_text, spreads)]
    cells.append(difference_text(row))
    return cells + [figure_text(spread) for spread in row.figures.values()]


def studies(found: dict[str, Study]) -> None:
    """Names and questions of the shipped studies."""
    width = max(len(name) for name in found)
    for name, study in found.items():
        console.say(f"{name:<{width}}  {study.description}")
        for variable, choices in study.variables.items():
            console.say(f"{'':<{width}}  --with {variable}={'|'.join(choices)}")
