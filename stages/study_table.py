"""The table of a study: every value, means and spreads over seeds, differences to a reference.

Read from the `results.json` of `evaluate`; written as JSON (everything) and Markdown (for people).
Values are fractions in JSON, percent in Markdown.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.report_lineage import read_json
from stages.report_scores import Number, minus, number
from stages.report_words import percent, plain, signed, words

EVERY_CASE = "(all)"
"""Case of a row that is the same artifact in every case."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One judged model of one case and seed."""

    case: str
    model: str
    seed: int
    instance: str
    key: str
    revision: str | None
    """Git revision of the code that judged it."""
    protocol: Mapping[str, Any]
    mious: Mapping[str, Number]
    """mIoU per target, in 0..1."""
    class_ious: Mapping[str, Mapping[str, Number]]
    """IoU per target and class, in 0..1."""
    figures: Mapping[str, Number] = field(default_factory=dict)
    """Further numbers, in 0..1."""

    @property
    def mean(self) -> Number:
        """Mean mIoU over the targets; None where one is missing."""
        values = list(self.mious.values())
        return None if not values or None in values else sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One number over the seeds."""

    values: Mapping[int, Number]
    """Seed -> value; None: not there."""

    @property
    def known(self) -> list[float]:
        """The values that are there."""
        return [value for value in self.values.values() if value is not None]

    @property
    def mean(self) -> Number:
        """Mean of what is there; None: nothing is."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def std(self) -> Number:
        """Sample standard deviation (n - 1); None of fewer than two values."""
        return statistics.stdev(self.known) if len(self.known) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {str(seed): value for seed, value in self.values.items()}
        return {"values": values, "mean": self.mean, "std": self.std, "num": len(self.known)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of one case over all seeds."""

    case: str
    model: str
    targets: Mapping[str, Spread]
    mean: Spread
    """Mean over the targets."""
    difference: Spread | None
    """Of the mean to that of the reference, seed by seed; None: it is the reference."""
    figures: Mapping[str, Spread]
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A study's result."""

    title: str
    description: str
    facts: Mapping[str, Any]
    """Recipe, seeds, overrides, commit, host: whatever says how it was made."""
    seeds: tuple[int, ...]
    targets: tuple[str, ...]
    rows: tuple[Row, ...]
    reference: str
    """What differences are taken to, in words."""
    num_trials: int
    num_done: int
    """Trials of which every row is there."""
    failures: tuple[str, ...] = ()
    published: tuple[Mapping[str, Any], ...] = ()

    @property
    def protocols(self) -> list[Mapping[str, Any]]:
        """The distinct protocols of its numbers (the step is a fact of the model, not of how it was
        judged)."""
        found: list[Mapping[str, Any]] = []
        for row in self.rows:
            for one in row.outcomes:
                protocol = {name: one.protocol[name] for name in one.protocol if name != "step"}
                if protocol not in found:
                    found.append(protocol)
        return found


def read_outcome(
    folder: Path, *, case: str, model: str, seed: int, manifest: Mapping[str, Any]
) -> Outcome:
    """An evaluation as a study counts it.

    Raises:
        ValueError: its `results.json` is not JSON.
    """
    results = read_json(folder / "results.json")
    classes = [
        str(entry.get("name", entry)) if isinstance(entry, Mapping) else str(entry)
        for entry in results.get("classes") or ()
    ]
    sets = results.get("sets") or {}
    return Outcome(
        case=case,
        model=model,
        seed=seed,
        instance=manifest["instance"],
        key=manifest["key"],
        revision=manifest.get("git_revision"),
        protocol=results.get("protocol") or {},
        mious={name: number(entry.get("miou")) for name, entry in sets.items()},
        class_ious={
            name: dict(
                zip(classes, (number(value) for value in entry.get("iou") or ()), strict=False)
            )
            for name, entry in sets.items()
        },
    )


def rows_of(
    outcomes: Sequence[Outcome],
    *,
    targets: Sequence[str],
    seeds: Sequence[int],
    reference: tuple[str | None, str | None],
) -> tuple[Row, ...]:
    """One row per case and model, in the order of the outcomes.

    Args:
        outcomes: what is there; seeds may be missing.
        targets: the columns, and what the mean is over.
        seeds: all that were asked for.
        reference: (case, model) that differences are taken to; None: the row's own.
    """
    groups: dict[tuple[str, str], dict[int, Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.case, one.model), {})[one.seed] = one
    known = (one.figures.items() for one in outcomes)
    figures = dict.fromkeys(name for items in known for name, value in items if value is not None)
    rows, told = [], set()
    for (case, model), group in groups.items():
        same = _same_in_every_case(groups, case, model)
        if same and model in told:
            continue
        told.add(model)
        other = (reference[0] or case, reference[1] or model)
        against = groups.get(other, {})
        rows.append(
            Row(
                case=EVERY_CASE if same else case,
                model=model,
                targets={
                    name: _spread(group, seeds, lambda one, name=name: one.mious.get(name))
                    for name in targets
                },
                mean=_spread(group, seeds, lambda one: _mean(one, targets)),
                difference=None
                if other == (case, model)
                else Spread(
                    values={
                        seed: minus(
                            _mean(group.get(seed), targets), _mean(against.get(seed), targets)
                        )
                        for seed in seeds
                    }
                ),
                figures={
                    name: _spread(group, seeds, lambda one, name=name: one.figures.get(name))
                    for name in figures
                },
                outcomes=tuple(group.values()),
            )
        )
    return tuple(rows)


def _same_in_every_case(
    groups: Mapping[tuple[str, str], Mapping[int, Outcome]], case: str, model: str
) -> bool:
    """Whether the cases share this model's artifacts: then it is one row."""
    keys = [
        {seed: one.key for seed, one in group.items()}
        for (_, name), group in groups.items()
        if name == model
    ]
    return len(keys) > 1 and all(found == keys[0] for found in keys)


def _spread(group: Mapping[int, Outcome], seeds: Sequence[int], value: Any) -> Spread:
    return Spread(values={seed: value(group[seed]) if seed in group else None for seed in seeds})


def _mean(one: Outcome | None, targets: Sequence[str]) -> Number:
    values = [one.mious.get(name) for name in targets] if one else []
    return None if not values or None in values else statistics.fmean(values)


def as_json(table: Table) -> dict[str, Any]:
    """Everything, as plain values; mIoU in 0..1."""
    return {
        "study": table.title,
        "description": table.description,
        **table.facts,
        "seeds": list(table.seeds),
        "targets": list(table.targets),
        "protocols": table.protocols,
        "num_trials": table.num_trials,
        "num_done": table.num_done,
        "difference_to": table.reference,
        "rows": [_row_as_json(row) for row in table.rows],
        "failures": list(table.failures),
        "published": [dict(entry) for entry in table.published],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
        "case": row.case,
        "model": row.model,
        "mean": row.mean.as_json(),
        "difference": row.difference.as_json() if row.difference else None,
        "targets": {name: spread.as_json() for name, spread in row.targets.items()},
        "figures": {name: spread.as_json() for name, spread in row.figures.items()},
        "artifacts": [
            {
                name: asdict(one)[name]
                for name in ("seed", "instance", "key", "revision", "class_ious")
            }
            for one in row.outcomes
        ],
    }


def as_markdown(table: Table) -> str:
    """The table for people: mIoU in percent, mean ± spread, then every single value."""
    parts = [f"# Study {table.title}", table.description, _made(table)]
    if table.rows:
        figures = list(table.rows[0].figures)
        many = len(table.seeds) > 1
        head = ["case", "model", *table.targets, "mean"]
        head += [f"difference to {table.reference}", *figures]
        parts.append(_grid([head, *(_cells(row) for row in table.rows)]))
        if many:
            parts += ["## Every value", _grid(_single_values(table))]
    if table.published:
        parts += [
            "## Published, for comparison",
            "Numbers of the papers, measured on other data by their own protocols; not ours.",
            _grid(_published(table.published)),
        ]
    if table.failures:
        parts += ["## Failed", "\n".join(f"- {failure}" for failure in table.failures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(table: Table) -> str:
    lines = [f"- {words(name)}: {_said(value)}" for name, value in table.facts.items() if value]
    lines.append(f"- seeds: {', '.join(map(str, table.seeds))}")
    lines += [f"- protocol: {plain(protocol)}" for protocol in table.protocols]
    if table.num_done < table.num_trials:
        lines.append(f"- **not whole: {table.num_done} of {table.num_trials} trials are done**")
    if len(table.seeds) > 1:
        lines.append(
            "- mIoU in percent, mean ± standard deviation (n - 1) over the seeds; differences are "
            "taken seed by seed"
        )
    else:
        lines.append("- mIoU in percent, one seed: a difference may be chance")
    return "\n".join(lines)


def _said(value: Any) -> str:
    """A fact in one line; a mapping of mappings (the cases) in one line per entry."""
    if isinstance(value, Mapping) and all(isinstance(one, Mapping) for one in value.values()):
        lines = [f"  - {name}: {_settings(one) or 'as it is'}" for name, one in value.items()]
        return "\n".join(["", *lines])
    return plain(value)


def _settings(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={plain(value)}`" for key, value in overrides.items())


def _cells(row: Row) -> list[str]:
    cells = [row.case, row.model]
    cells += [spread_text(spread) for spread in (*row.targets.values(), row.mean)]
    cells.append(difference_text(row))
    return cells + [figure_text(spread) for spread in row.figures.values()]


def difference_text(row: Row) -> str:
    """ "+1.2 ± 0.4 (above in 3 of 3)"; of one seed "+1.2"; "reference" of the reference itself."""
    if row.difference is None:
        return "reference"
    known, std = row.difference.known, row.difference.std
    text = signed(row.difference.mean)
    if std is not None:
        above = sum(value > 0 for value in known)
        text += f" ± {percent(std)} (above in {above} of {len(known)})"
    return text


def spread_text(spread: Spread) -> str:
    """ "31.2 ± 0.4", "31.2" of a single value, a dash of none; "(2)" where seeds are missing."""
    text = percent(spread.mean)
    if spread.std is not None:
        text += f" ± {percent(spread.std)}"
    if spread.known and len(spread.known) < len(spread.values):
        text += f" ({len(spread.known)})"
    return text


def figure_text(spread: Spread) -> str:
    """As `spread_text`, where no value is beyond 1; else counts, as they are."""
    if all(abs(value) <= 1 for value in spread.known):
        return spread_text(spread)
    hundredth = {
        seed: None if value is None else value / 100 for seed, value in spread.values.items()
    }
    return spread_text(Spread(values=hundredth))


def _single_values(table: Table) -> list[list[str]]:
    rows = [["case", "model", "seed", *table.targets, "mean", "difference"]]
    for row in table.rows:
        for seed in table.seeds:
            values = [spread.values[seed] for spread in row.targets.values()]
            difference = signed(row.difference.values[seed]) if row.difference else ""
            rows.append(
                [
                    *(row.case, row.model, str(seed)),
                    *map(_exactly, values),
                    _exactly(row.mean.values[seed]),
                    difference,
                ]
            )
    return rows


def _exactly(value: Number) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _published(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    columns = [name for name in columns if any(entry.get(name) is not None for entry in entries)]
    return [columns, *([_cell(entry.get(name)) for name in columns] for entry in entries)]


def _cell(value: Any) -> str:
    return "" if value is None else plain(value)


def _grid(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; its first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
