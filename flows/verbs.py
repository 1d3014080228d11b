"""Commands about many runs, and about what runs left: study, graph, diff, gc.

Their modules are imported when they are called: `clouds plan` pays for none of them.
"""

import argparse
from pathlib import Path

from flows import console
from flows.options import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_WOULD_RUN,
    recipe_options,
    selection_options,
    store_options,
)
from flows.store import Store


def study_options(parser: argparse.ArgumentParser) -> None:
    """Options of `clouds study`."""
    parser.add_argument(
        "name", metavar="NAME|FILE.yaml", nargs="?", help="which study; none: list them"
    )
    parser.add_argument("--recipe", metavar="NAME|FILE.yaml", help="in place of the study's own")
    parser.add_argument("--seeds", type=_numbers, default=(), metavar="0,1,2", help="seeds to run")
    parser.add_argument(
        "--case",
        dest="cases",
        action="append",
        default=[],
        metavar="CASE",
        help="only this case (may be repeated)",
    )
    parser.add_argument(
        "--with",
        dest="choices",
        action="append",
        default=[],
        metavar="VARIABLE=CHOICE",
        help="choose a variant of the study, for example pictures=web (may be repeated)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting in all cases (may be repeated)",
    )
    store_options(parser)
    parser.add_argument(
        "--plan", action="store_true", help="say what would run, and tabulate what is there"
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write numbers with commas, as 0,1,2"
        ) from error


def study(arguments: argparse.Namespace) -> int:
    """Run a study, or list them."""
    from flows import studies, study_console, study_runs
    from stages.launch import execute

    if arguments.name is None:
        study_console.studies({name: studies.load_study(name) for name in studies.study_files()})
        return EXIT_OK
    plan = studies.arrange_study(
        arguments.name,
        artifacts=arguments.artifacts,
        recipe=arguments.recipe,
        seeds=arguments.seeds,
        cases=arguments.cases,
        choices=arguments.choices,
        overrides=arguments.overrides,
    )
    found = study_runs.forecast(plan.trials)
    study_console.forecast(plan, found)
    if arguments.plan:
        study_console.table(plan, study_runs.tabulate(plan))
        return EXIT_WOULD_RUN if found.pending else EXIT_OK
    beside = max(trial.engine.recipe.run.beside for trial in plan.trials)
    with study_console.StudyConsole(beside=beside) as listener:
        result = study_runs.run_study(
            plan,
            listener=listener,
            execute=lambda spec, progress, _lock: execute(spec, progress),
        )
    study_console.table(plan, result)
    return EXIT_FAILED if result.failures else EXIT_OK


def graph_options(parser: argparse.ArgumentParser) -> None:
    """Options of `clouds graph`."""
    recipe_options(parser)
    store_options(parser)
    selection_options(parser)
    parser.add_argument(
        "--format",
        choices=("text", "mermaid", "dot", "svg", "json"),
        default="text",
        help="text (default); mermaid for Markdown, dot for Graphviz, svg for a browser",
    )


def graph(arguments: argparse.Namespace) -> int:
    """Show a recipe's instances, their needs and states."""
    from flows.graphing import FORMATS
    from flows.runs import arrange

    engine, chosen = arrange(
        recipe=arguments.recipe,
        artifacts=arguments.artifacts,
        overrides=arguments.overrides,
        force=arguments.force,
        stage=arguments.stage,
        round=arguments.round,
        leg=arguments.leg,
        from_stage=arguments.from_stage,
        until_stage=arguments.until_stage,
    )
    console.say(FORMATS[arguments.format](engine.plan(chosen)))
    return EXIT_OK


def diff_options(parser: argparse.ArgumentParser) -> None:
    """Options of `clouds diff`."""
    what = "key (or its beginning), instance, run id, last, before-last, or recipe"
    parser.add_argument("first", metavar="A", help=what)
    parser.add_argument("second", metavar="B", help="likewise")
    store_options(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable")


def diff(arguments: argparse.Namespace) -> int:
    """Say how two things differ."""
    from flows.compare import compare

    first, second, found = compare(
        Store(Path(arguments.artifacts)), arguments.first, arguments.second
    )
    if arguments.json:
        differences = [vars(one) for one in found]
        console.as_json({"a": first.name, "b": second.name, "differences": differences})
        return EXIT_OK
    console.say(f"a: {first.name}")
    console.say(f"b: {second.name}")
    group = ""
    for one in found:
        if one.group != group:
            group = one.group
            console.say(group)
        console.say(f"  {one}")
    if not found:
        console.say("nothing differs.")
    return EXIT_OK


def gc_options(parser: argparse.ArgumentParser) -> None:
    """Options of `clouds gc`."""
    store_options(parser)
    parser.add_argument("--delete", action="store_true", help="remove it (default: only say what)")
    parser.add_argument(
        "--older",
        type=_not_negative,
        default=1.0,
        metavar="DAYS",
        help="only what was not written to for so many days (default: 1)",
    )
    parser.add_argument(
        "--keep-runs",
        type=_count,
        metavar="N",
        help="only the newest N run records count; the older ones go too (default: all count)",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text}: 0 or more days")
    return value


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: 1 or more runs")
    return int(text)


def gc(arguments: argparse.Namespace) -> int:
    """Find what nothing refers to, and with `--delete` remove it."""
    from flows import housekeeping

    store = Store(Path(arguments.artifacts))
    sweep = housekeeping.look(store, older_days=arguments.older, keep_runs=arguments.keep_runs)
    gone = {
        one.path: housekeeping.remove(store, one) for one in sweep.leftovers if arguments.delete
    }
    if arguments.json:
        console.as_json(
            [{**vars(one), "removed": gone.get(one.path, False)} for one in sweep.leftovers]
        )
        return EXIT_OK
    for one in sweep.leftovers:
        age = console.duration(one.age_s)
        busy = "  (in use: stays)" if gone.get(one.path) is False else ""
        console.say(
            f"{one.kind:<16}{console.size(one.num_bytes):>11}  {age:>12} old  "
            f"{console.place(one.path)}{busy}"
        )
    counted = [one for one in sweep.leftovers if gone.get(one.path, True)]
    total = console.size(sum(one.num_bytes for one in counted))
    did = "removed" if arguments.delete else "could go"
    console.say(f"{len(counted)} things, {total}, {did}; {sweep.num_kept} artifacts are in use.")
    if sweep.num_young:
        console.say(f"{sweep.num_young} more are younger than {arguments.older:g} days (--older).")
    if sweep.num_locked:
        console.say(f"{sweep.num_locked} more are being worked on.")
    if counted and not arguments.delete:
        console.say("Nothing was removed. `clouds gc --delete` removes it.")
    return EXIT_OK
