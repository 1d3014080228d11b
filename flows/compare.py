"""How two artifacts, two runs or two recipes differ: settings, inputs, versions, results.

clouds diff miniature camvid; clouds diff KEY KEY; clouds diff last before-last
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.inspection import locate
from flows.keys import flatten
from flows.outputs import read_json
from flows.pipeline import build
from flows.recipes import ConfigError, load_recipe, recipe_files
from flows.store import Store

ABSENT = "(absent)"
_RUN_WORDS = {"last": -1, "before-last": -2}
_SHOWN_MAX = 80
_UNTOLD = ("name", "description")
"""Parts of a recipe that say nothing of what it does."""

Kind = Literal["recipe", "run", "artifact"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two things that are compared."""

    kind: Kind
    name: str
    """What it is, for people."""
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    """Versions, revision, host: what else could have made a difference."""
    inputs: Mapping[str, str]
    """Of an artifact: role -> output digest; of a run: instance -> key; of a recipe: none."""
    metrics: Mapping[str, Any]
    """What it came to, flat."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that differs."""

    group: Literal["settings", "inputs", "versions", "metrics"]
    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        change = ""
        numbers = _is_number(self.before) and _is_number(self.after)
        if numbers and self.group == "metrics":
            change = f"  ({self.after - self.before:+.4g})"
        return f"{self.name}: {_short(self.before)} -> {_short(self.after)}{change}"


def compare(store: Store, first: str, second: str) -> tuple[Side, Side, list[Difference]]:
    """What differs between two artifacts, runs or recipes.

    Args:
        store: where artifacts and runs lie.
        first: key (or its beginning), instance (its newest artifact), run id ("last",
            "before-last"), recipe's name or file.
        second: likewise; of the same kind, or one recipe and one run.

    Raises:
        ConfigError: one is unknown, or they are of kinds that cannot be compared.
    """
    sides = side(store, first), side(store, second)
    kinds = {one.kind for one in sides}
    if len(kinds) > 1 and "artifact" in kinds:
        raise ConfigError(
            f"{first!r} is a {sides[0].kind}, {second!r} a {sides[1].kind}: compare two artifacts, "
            f"or runs and recipes."
        )
    both_made = len(kinds) == 1
    found = [
        Difference(group=group, name=name, before=before, after=after)
        for group, parts in (
            ("settings", [one.settings for one in sides]),
            ("inputs", [one.inputs for one in sides] if both_made else [{}, {}]),
            ("versions", [one.facts for one in sides] if both_made else [{}, {}]),
            ("metrics", [one.metrics for one in sides] if both_made else [{}, {}]),
        )
        for name, before, after in _differing(*parts)
    ]
    return *sides, found


def side(store: Store, what: str) -> Side:
    """What a word on the command line names.

    Raises:
        ConfigError: nothing, or several things.
    """
    if what in recipe_files() or Path(what).suffix in {".yaml", ".yml"}:
        return _recipe(what)
    runs = store.runs()
    if what in _RUN_WORDS:
        place = _RUN_WORDS[what]
        if len(runs) < -place:
            raise ConfigError(f"there is no {what} run in {store.root}: {len(runs)} are recorded.")
        return _run(store, runs[place])
    named = [path for path in runs if path.stem.startswith(what)]
    exact = [path for path in named if path.stem == what]
    if len(named) == 1 or exact:
        return _run(store, (exact or named)[0])
    if named:
        raise ConfigError(f"{what!r} is the beginning of {len(named)} runs: give more letters.")
    try:
        folder, manifest = locate(store, what)
    except ValueError as error:
        raise ConfigError(
            f"{error} Neither is it a recipe (clouds recipes) nor a run (an id in "
            f"{store.root / 'runs'}, last or before-last)."
        ) from error
    return _artifact(folder, manifest)


def _recipe(name: str) -> Side:
    recipe = load_recipe(name)
    return Side(
        kind="recipe",
        name=f"recipe {name}",
        settings=_settings(recipe.model_dump(mode="json")) | {"instances": sorted(build(recipe))},
        facts={},
        inputs={},
        metrics={},
    )


def _run(store: Store, path: Path) -> Side:
    record = read_json(path)
    if not isinstance(record, Mapping) or "config" not in record:
        raise ConfigError(f"{path} is no record of a run.")
    instances = record.get("instances", {})
    metrics: dict[str, Any] = {"status": record.get("status")}
    for name, entry in instances.items():
        results = read_json(store.root / entry["folder"] / "results.json")
        if name.startswith("evaluate") and results:
            metrics |= {f"{name} {key}": value for key, value in _mious(results)}
        metrics |= {} if entry.get("cached") else {f"{name} seconds": entry.get("seconds")}
    return Side(
        kind="run",
        name=f"run {path.stem} of recipe {record.get('recipe')}",
        settings=_settings(record["config"]) | {"instances": sorted(instances)},
        facts={},
        inputs={name: entry["key"] for name, entry in instances.items()},
        metrics=metrics,
    )


def _settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in flatten(tree) if name not in _UNTOLD}
    told.pop("report.title", None)
    return told


def _artifact(folder: Path, manifest: Mapping[str, Any]) -> Side:
    found = manifest["ingredients"]
    outside = ("inputs", "stage", "round", "version")
    settings = {key: value for key, value in found.items() if key not in outside}
    facts = {"stage's version": found.get("version"), "git_revision": manifest.get("git_revision")}
    facts |= {name: manifest.get(name) for name in ("host", "machine")}
    facts |= {f"package {name}": text for name, text in manifest.get("versions", {}).items()}
    metrics = dict(manifest.get("summary", {}).get("numbers", {}))
    metrics |= {"seconds": manifest.get("seconds"), "digest": manifest["digest"]}
    results = read_json(folder / "results.json") if manifest["stage"] == "evaluate" else None
    metrics |= dict(_mious(results or {}))
    return Side(
        kind="artifact",
        name=f"{manifest['instance']} {manifest['key']}",
        settings={name.removeprefix("config."): value for name, value in flatten(settings)},
        facts=facts,
        inputs=found.get("inputs", {}),
        metrics=metrics,
    )


def _mious(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, entry in (results.get("sets") or {}).items():
        yield f"mIoU {name}", entry.get("miou")
    if results.get("miou_mean") is not None:
        yield "mIoU mean", results["miou_mean"]


def _differing(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(first.keys() | second.keys()):
        before, after = first.get(name, ABSENT), second.get(name, ABSENT)
        if before != after:
            yield name, before, after


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 1] + "…"
