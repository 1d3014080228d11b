"""The instances of a recipe as a graph: what each needs, and whether it is there.

clouds graph --recipe miniature --format text|mermaid|dot|svg
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.steps import Action, Step

STATES: dict[Action, str] = {
    "skip": "done",
    "run": "to run",
    "may run": "may run",
    "blocked": "blocked",
}
"""What a plan's action says of an instance in a graph."""
_COLOURS: dict[Action, tuple[str, str]] = {
    "skip": ("#dff3e6", "#2f8f5b"),
    "run": ("#fdebd2", "#c77a12"),
    "may run": ("#fdf6e3", "#b59b3a"),
    "blocked": ("#fbdada", "#b83232"),
}
"""Fill and line of each state, in Mermaid and DOT."""


def as_text(steps: Sequence[Step]) -> str:
    """One line per instance, in running order: name, state, what it needs."""
    width = max(len(step.instance.name) for step in steps)
    lines = []
    for step in steps:
        needs = ", ".join(_needs(step)) or "nothing"
        if step.instance.contract.takes_everything:
            needs = "everything above"
        lines.append(f"{step.instance.name:<{width}}  {STATES[step.action]:<8} <- {needs}")
    return "\n".join(lines)


def as_json(steps: Sequence[Step]) -> str:
    """A list of {"instance", "state", "reason", "key", "needs": [{"role", "instance", "part"}]}."""
    return json.dumps(
        [
            {
                "instance": step.instance.name,
                "does": step.instance.contract.does,
                "state": STATES[step.action],
                "reason": step.reason,
                "key": step.key,
                "needs": [vars(entry) for entry in step.instance.inputs],
            }
            for step in steps
        ],
        indent=1,
    )


def as_mermaid(steps: Sequence[Step]) -> str:
    """A Mermaid flowchart, as Markdown pages of code forges draw it."""
    ids = {step.instance.name: f"n{number}" for number, step in enumerate(steps)}
    lines = ["flowchart LR"]
    for step in steps:
        state = _class(step.action)
        lines.append(f'  {ids[step.instance.name]}["{step.instance.name}"]:::{state}')
    lines += [f"  {ids[source]} --> {ids[target]}" for source, target in _edges(steps)]
    for action, (fill, stroke) in _COLOURS.items():
        lines.append(f"  classDef {_class(action)} fill:{fill},stroke:{stroke},color:#1c2430")
    return "\n".join(lines)


def as_dot(steps: Sequence[Step]) -> str:
    """A Graphviz digraph."""
    lines = ["digraph clouds {", "  rankdir=LR;", '  node [shape=box, style="rounded,filled"];']
    for step in steps:
        fill, stroke = _COLOURS[step.action]
        label = f"{step.instance.name}\\n{STATES[step.action]}"
        lines.append(
            f'  "{step.instance.name}" [label="{label}", fillcolor="{fill}", color="{stroke}"];'
        )
    lines += [f'  "{source}" -> "{target}";' for source, target in _edges(steps)]
    return "\n".join([*lines, "}"])


def as_svg(steps: Sequence[Step]) -> str:
    """The report's picture of the pipeline, before there is a report."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from stages import report_lineage

    shown = {step.instance.name: _as_recorded(step) for step in steps}
    drawing = report_lineage.draw(shown)
    templates = Path(report_lineage.__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("graph.svg.j2").render(
        drawing=drawing,
        box=(report_lineage.BOX_WIDTH, report_lineage.BOX_HEIGHT),
        states={step.instance.name: _class(step.action) for step in steps},
        words={step.instance.name: STATES[step.action] for step in steps},
    )


FORMATS: Mapping[str, Callable[[Sequence[Step]], str]] = {
    "text": as_text,
    "mermaid": as_mermaid,
    "dot": as_dot,
    "svg": as_svg,
    "json": as_json,
}
"""How a graph can be written."""


def _as_recorded(step: Step) -> Any:
    """The step in the form that the report draws: it needs inputs and a key, no artifact."""
    from stages.report_lineage import Instance

    inputs = {str(n): {"instance": entry.instance} for n, entry in enumerate(step.instance.inputs)}
    return Instance(
        name=step.instance.name,
        stage=step.instance.stage,
        round=step.instance.round,
        leg=step.instance.leg,
        folder=step.folder or Path(),
        manifest={"inputs": inputs, "key": step.key or " "},
    )


def _needs(step: Step) -> list[str]:
    return list(dict.fromkeys(entry.instance for entry in step.instance.inputs))


def _edges(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """Needs, without those that a longer way already shows (a report needs everything)."""
    needs = {step.instance.name: _needs(step) for step in steps}
    above: dict[str, set[str]] = {}
    for name, near in needs.items():
        above[name] = set(near).union(*(above.get(one, set()) for one in near))
    return [
        (source, name)
        for name, near in needs.items()
        for source in near
        if source in needs and not any(source in above.get(one, set()) for one in near)
    ]


def _class(action: Action) -> str:
    return re.sub(r"\W", "_", STATES[action])
