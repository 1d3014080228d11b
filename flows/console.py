"""What the command line prints: progress, plans, tables, errors. Quiet where nobody watches."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flows.engine import Engine
from flows.outputs import read_json
from flows.pipeline import Instance
from flows.steps import Result, StageError, Step
from stages.contracts import Progress

_MARKS = {"run": "RUN", "skip": "skip", "may run": "may run", "blocked": "BLOCKED"}
_EXIT_DAMAGED = 1
NOT_SET_UP = (
    "this Python lacks the project's packages: run `make setup` once, then "
    "`.venv/bin/clouds` (or activate .venv)."
)
TELL_EVERY_S = 30.0
"""Time between two lines of progress where there is no terminal."""


def say(text: str) -> None:
    """One line on standard output, at once."""
    print(text, flush=True)


def error(text: str) -> None:
    """A user's mistake, or why a run ended, on standard error."""
    print(f"clouds: {text}", file=sys.stderr, flush=True)


def as_json(value: Any) -> None:
    """JSON for machines."""
    say(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def as_yaml(value: Any) -> None:
    """A configuration, in the form recipes are written in."""
    import yaml

    say(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())


def duration(seconds: float | None) -> str:
    """ "3.4 s", "12 min 5 s", "2 h 3 min"."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float | None) -> str:
    """ "1.2 MiB"."""
    if num_bytes is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("every size has a unit")


class StandardError:
    """Standard error as it is now: while bars are drawn, what comes here is put above them."""

    def write(self, text: str) -> int:
        """Write a text."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Show it."""
        sys.stderr.flush()


class Console:
    """Listens to a run: a progress bar where somebody watches, one line per finished stage."""

    def __init__(self, *, beside: int = 1) -> None:
        self._beside = beside
        """Stages at once: with several, every line names its own."""
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._noted: set[str] = set()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_bars()

    def say(self, text: str) -> None:
        """A line for people."""
        with self._without_bars():
            say(text)

    def stage_started(self, instance: Instance, resumes: str | None) -> Progress:
        """Begin a bar; the stage's progress moves it."""
        if resumes:
            self.say(f"{instance.name}: goes on from {resumes}")
        elif self._beside > 1 and not sys.stderr.isatty():
            self.say(f"{instance.name}: started")
        return self.task(instance.name)

    def task(self, name: str) -> Progress:
        """Begin a bar of this name."""
        note = partial(self._note, name)
        if not sys.stderr.isatty():
            return _Quiet(name, note)
        if self._bars is None:
            self._bars = self._new_bars()
            self._bars.start()
        self._tasks[name] = self._bars.add_task(name, total=None, unit="", metrics="")
        return _Bar(self._bars, self._tasks[name], note)

    def _new_bars(self) -> Any:
        from rich import progress
        from rich.console import Console as RichConsole

        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[unit]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[metrics]}"),
            console=RichConsole(stderr=True),
            transient=True,
        )

    def _note(self, name: str, text: str) -> None:
        """A stage's note, once: every stage tells the same of its device."""
        if text not in self._noted:
            self._noted.add(text)
            line = f"  {name}: {text}" if self._beside > 1 else f"  {text}"
            say(line) if self._bars is None else self._bars.console.print(line)

    def stage_finished(self, instance: Instance, result: Result) -> None:
        """One line: what, how many, how long, where."""
        if self._bars is not None and instance.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(instance.name))
        if not self._tasks:
            self._stop_bars()
        how = "cached" if result.cached else duration(result.seconds)
        where = place(result.artifact.folder)
        self.say(f"{instance.name:<24} {how:>12}  {result.text}  [{where}]")

    @contextlib.contextmanager
    def _without_bars(self) -> Iterator[None]:
        """Take the bars of what still runs off the terminal while a line is printed above them."""
        if self._bars is not None:
            self._bars.stop()
        try:
            yield
        finally:
            if self._bars is not None:
                self._bars.start()

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()


class _Bar:
    def __init__(self, bars: Any, task: Any, note: Callable[[str], None]) -> None:
        self._bars, self._task = bars, task
        self.note = note

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        self._bars.update(self._task, total=total, completed=done, unit=unit)

    def advance(self, count: int = 1, **metrics: float) -> None:
        shown = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        fields = {"metrics": shown} if shown else {}
        self._bars.update(self._task, advance=count, **fields)


class _Quiet:
    """A line every half a minute, for logs."""

    def __init__(self, name: str, note: Callable[[str], None]) -> None:
        self._name, self.note = name, note
        self._total, self._done, self._unit = 0, 0, ""
        self._told = time.monotonic()

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        self._total, self._done, self._unit = total, done, unit

    def advance(self, count: int = 1, **metrics: float) -> None:
        self._done += count
        if time.monotonic() - self._told > TELL_EVERY_S:
            self._told = time.monotonic()
            shown = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
            say(f"  {self._name}: {self._done}/{self._total} {self._unit}{shown}")


def place(folder: Path) -> str:
    """A path relative to where the user stands, if it lies below."""
    relative = os.path.relpath(folder)
    return os.path.abspath(folder) if relative.startswith("..") else relative


def stage_failed(failure: StageError) -> None:
    """Why a stage failed, where the whole story is kept, and how to go on."""
    error(f"{failure.instance} failed: {failure.error}")
    if isinstance(failure.error, ModuleNotFoundError):
        error(NOT_SET_UP)
        return
    if not failure.user:
        error(f"this was not expected ({type(failure.error).__name__}).")
    error(f"the whole error is kept at {place(failure.kept)}; the same command resumes.")


def run_finished(engine: Engine, record: Mapping[str, Any]) -> None:
    """The end of a run: the results, and where the report is."""
    done = record["instances"]
    fresh = [name for name, entry in done.items() if not entry["cached"]]
    if not fresh:
        say(f"nothing to do: all {len(done)} instances are done.")
    evaluations = {
        name: engine.store.root / entry["folder"] / "results.json"
        for name, entry in done.items()
        if name.startswith("evaluate")
    }
    if evaluations:
        _results({name: read_json(path) for name, path in evaluations.items()})
    if "report" in done:
        say(f"report: {place(engine.store.root / done['report']['folder'] / 'report.html')}")


def _results(results: Mapping[str, Any]) -> None:
    """mIoU per model and target, as a plain table."""
    results = {name: entry for name, entry in results.items() if entry}
    targets = list(dict.fromkeys(name for entry in results.values() for name in entry["sets"]))
    rows = [["mIoU %", *targets, "mean"]]
    for name, entry in results.items():
        values = [entry["sets"].get(target, {}).get("miou") for target in targets]
        rows.append([name, *map(percent, values), percent(entry.get("miou_mean"))])
    table(rows)
    protocols = dict.fromkeys(entry["protocol"].get("name") for entry in results.values())
    say(f"protocol: {'; '.join(filter(None, protocols)) or 'not recorded'}")


def percent(value: float | None) -> str:
    """ "43.21" of 0.4321."""
    return "-" if value is None else f"{100 * value:.2f}"


def table(rows: Sequence[Sequence[str]], *, num_left: int = 1) -> None:
    """A plain table; the first `num_left` columns are words, the others numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())


def plan(steps: Iterable[Step], *, as_json: bool) -> None:
    """The plan as a table, or as JSON."""
    steps = list(steps)
    if as_json:
        say(json.dumps([step.as_json() for step in steps], indent=1))
        return
    width = max(len(step.instance.name) for step in steps)
    for step in steps:
        extra = []
        if step.resumes:
            extra.append(f"goes on from {step.resumes}")
        if step.held_by:
            extra.append(f"{step.held_by} works on it")
        if step.last_seconds is not None and step.action != "skip":
            extra.append(f"last time {duration(step.last_seconds)}")
        if step.estimate_s is not None:
            extra.append(f"about {duration(step.estimate_s)}, {size(step.estimate_bytes)}")
        tail = f"  ({'; '.join(extra)})" if extra else ""
        say(f"{step.instance.name:<{width}}  {_MARKS[step.action]:<7}  {step.reason}{tail}")
        for change in step.changes[3:]:
            say(f"{'':<{width}}           {change}")
    pending = [step for step in steps if step.action != "skip"]
    if not pending:
        say(f"up to date: all {len(steps)} instances are done.")
        return
    known = [step.estimate_s for step in pending if step.estimate_s is not None]
    total = f"; those with known rates take about {duration(sum(known))}" if known else ""
    say(f"{len(pending)} of {len(steps)} instances would run{total}.")


def status(found: Any, *, as_json: bool) -> None:
    """What is there, what runs, what failed."""
    if as_json:
        say(json.dumps(vars(found), indent=1, default=str))
        return
    for entry in found.artifacts:
        say(
            f"{entry['instance']:<24} done     {entry['key']}  {duration(entry['seconds']):>10}  "
            f"{size(entry['bytes']):>10}  {entry['text']}"
        )
    for entry in found.unfinished:
        state = "running" if entry["held_by"] else "stopped"
        who = f"  ({entry['held_by']})" if entry["held_by"] else ""
        say(f"{entry['instance']:<24} {state}  {entry['key']}  {entry['progress']}{who}")
    for entry in found.failures:
        say(f"{entry['instance']:<24} failed   {entry['key']}  {entry['message']}")
        say(f"{'':<24} {entry['when']}, whole error at {entry['file']}")
    run = found.last_run
    if run:
        say(f"last run: {run['id']}, recipe {run['recipe']}, {run['status']}")


def show(folder: Path, manifest: Mapping[str, Any], lineage: Any, *, as_json: bool) -> None:
    """An artifact and its lineage."""
    if as_json:
        say(json.dumps({**manifest, "made_of": lineage.up, "used_by": lineage.down}, indent=1))
        return
    outputs = manifest["outputs"]
    total = sum(entry["bytes"] for entry in outputs.values())
    say(f"{manifest['instance']}  {manifest['key']}")
    say(f"  {manifest['summary']['text']}")
    say(f"  folder    {place(folder)}")
    say(f"  outputs   {len(outputs)} entries, {size(total)}, digest {manifest['digest']}")
    say(f"  made      {manifest['finished']} in {duration(manifest['seconds'])}")
    say(f"  on        {manifest.get('host')}, seed {manifest['seed']}, {manifest['precision']}")
    say(f"  code      {manifest.get('git_revision')}, {_versions(manifest)}")
    if manifest.get("origin"):
        say(f"  adopted   from {manifest['origin']}")
    say("  settings  (section by section)")
    for section, settings in manifest.get("config", {}).items():
        say(f"    {section}: {_flow(settings)}")
    say("  made of")
    for depth, line in lineage.up or [(0, "nothing else")]:
        say(f"    {'  ' * depth}{line}")
    say("  used by")
    for line in lineage.down or ["nothing yet"]:
        say(f"    {line}")


def _flow(settings: Any) -> str:
    """Settings in one line of YAML, as a recipe could hold them."""
    import yaml

    text = yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=10**6)
    return text.strip().removesuffix("...").strip()


def _versions(manifest: Mapping[str, Any]) -> str:
    versions = manifest.get("versions", {})
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "torch") if name in versions)


def verified(found: Iterable[tuple[Path, Any, Sequence[Any]]]) -> int:
    """What verification found; the exit code says whether all is well."""
    total, bad = 0, 0
    for folder, _manifest, problems in found:
        total += 1
        if problems:
            bad += 1
            for problem in problems:
                say(f"{folder.parent.name} {folder.name}: {problem}")
    if bad:
        say(f"{bad} of {total} artifacts are damaged; the next run makes them again.")
        return _EXIT_DAMAGED
    say(f"all {total} artifacts are whole.")
    return 0


def checked(findings: Iterable[Any]) -> int:
    """What `check` found; the exit code says whether a run could start."""
    wrong = 0
    for finding in findings:
        wrong += finding.state == "error"
        say(f"{finding.state:<8} {finding.what}: {finding.text}")
    return _EXIT_DAMAGED if wrong else 0


def recipes(found: Mapping[str, Any]) -> None:
    """Names and what they are for."""
    width = max(len(name) for name in found)
    for name, recipe in found.items():
        say(f"{name:<{width}}  {recipe.description}")
