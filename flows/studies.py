"""Studies: families of recipes that answer one question, as YAML files beside the recipes.

clouds study ablation --seeds 0,1,2 --with pictures=web

A study names a recipe, cases (overrides each), seeds, and which evaluations of each case are its
table's rows. Every case and seed is a run like any other, through the same store.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from flows.digests import digest_of
from flows.engine import Engine
from flows.pipeline import Instance
from flows.recipes import ConfigError, load_recipe, nearest, validate
from flows.runs import options_of
from flows.store import Store
from stages.published import Table as PublishedTable
from stages.section import Section

STUDIES_DIR = Path(__file__).parent / "studies"
_ID_CHARS = 10
_Overrides = dict[str, Any]


class Comparison(Section):
    """Which row a row's difference is taken to."""

    case: str | None = None
    """That case; None: the row's own."""
    model: str | None = None
    """That model; None: the row's own."""


class Figure(Section):
    """One more number per row, read from a JSON file of an artifact."""

    instance: str
    """Whose: as in `models`; None of that name: the number is left out."""
    file: str = "statistics.json"
    """File of the artifact."""
    at: str
    """Dotted place of the number in the file."""
    models: tuple[str, ...] = ()
    """Only for rows of these models; none: for all."""


class Study(Section):
    """A question, and the runs that answer it."""

    name: str = "unnamed"
    """Name of the study."""
    description: str = ""
    """The question, in one sentence."""
    recipe: str = "miniature"
    """Recipe that all cases start from."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Every case runs once with each of these."""
    seeded: tuple[str, ...] = ("seed", "segmenter.decoder.seed", "segmenter.encoder.seed")
    """Settings that a seed is given to."""
    overrides: _Overrides = Field({})
    """Dotted overrides of all cases."""
    variables: dict[str, dict[str, _Overrides]] = Field({})
    """What can be chosen when the study is run: name -> choice -> overrides; the first choice is
    the default."""
    cases: dict[str, _Overrides] = Field(min_length=1)
    """Case -> dotted overrides."""
    models: dict[str, str] = Field(min_length=1)
    """Row's name -> instance of `evaluate`; `@last` is the recipe's last round."""
    compare: Comparison = Comparison()
    """Which row the others are compared with."""
    figures: dict[str, Figure] = Field({})
    """Further columns."""
    targets: tuple[str, ...] = ()
    """Data sets to tabulate and to average over; none: all that were judged."""
    published: tuple[PublishedTable, ...] = ()
    """Comparisons in `stages/published.yaml` to show below, marked as published."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"{list(seeds)}: seeds are distinct and not negative")
        return seeds

    @field_validator("variables")
    @classmethod
    def _have_choices(cls, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        for name, choices in variables.items():
            if not choices:
                raise ValueError(f"variable {name!r} has no choices")
        return variables


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One case with one seed: what is to be run, and what is to be tabulated."""

    case: str
    seed: int
    overrides: tuple[str, ...]
    """As after `--set`: with the recipe they name this trial."""
    engine: Engine
    wanted: Mapping[str, str]
    """Model -> its `evaluate` instance."""
    instances: tuple[Instance, ...]
    """All that the wanted ones need, in running order."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study as it was asked for: the choices made, and all trials."""

    study: Study
    recipe: str
    choices: Mapping[str, str]
    overrides: tuple[str, ...]
    """The user's own `--set`."""
    trials: tuple[Trial, ...]
    folder: Path
    """Where its table goes."""

    @property
    def title(self) -> str:
        """ "ablation (pictures: web)"."""
        choices = ", ".join(f"{name}: {choice}" for name, choice in self.choices.items())
        return self.study.name + (f" ({choices})" if choices else "")


def study_files() -> dict[str, Path]:
    """Shipped studies by name."""
    return {path.stem: path for path in sorted(STUDIES_DIR.glob("*.yaml"))}


def load_study(name: str) -> Study:
    """Read a study by name or file.

    Raises:
        ConfigError: unknown study, key or bad value; with place and nearest known name.
    """
    files = study_files()
    path = files.get(name, Path(name))
    if name not in files and path.suffix not in {".yaml", ".yml"}:
        raise ConfigError(f"unknown study {name!r}{nearest(name, files)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"study file {name!r} is not there.") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a study is a mapping; {', '.join(files)} show its form.")
    tree.setdefault("name", path.stem)
    study = validate(tree, model=Study, place=f"study {name!r}")
    for kind, known in (("case", study.cases), ("model", study.models)):
        named = getattr(study.compare, kind)
        if named is not None and named not in known:
            raise ConfigError(f"study {name!r}: compare.{kind} {named!r}{nearest(named, known)}")
    return study


def arrange_study(
    name: str,
    *,
    artifacts: str,
    recipe: str | None = None,
    seeds: Sequence[int] = (),
    cases: Sequence[str] = (),
    choices: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> Plan:
    """All trials of a study, validated before anything runs.

    Args:
        name: a shipped study's name, or a file.
        artifacts: the folder of all artifacts.
        recipe: in place of the study's own.
        seeds: in place of the study's own.
        cases: only these.
        choices: "variable=choice" each.
        overrides: "dotted.key=value" each, for all cases; they win over the study's.

    Raises:
        ConfigError: anything of this is unknown or wrong, or two cases come to the same.
    """
    study = load_study(name)
    for case in cases:
        if case not in study.cases:
            raise ConfigError(f"study {name!r} has no case {case!r}{nearest(case, study.cases)}")
    chosen = _choices(study, choices)
    recipe = recipe or study.recipe
    store = Store(Path(artifacts))
    seeds = tuple(seeds) or study.seeds
    validate({**study.model_dump(), "seeds": seeds}, model=Study, place="--seeds")
    shared = dict(study.overrides)
    for variable, choice in chosen.items():
        shared |= study.variables[variable][choice]
    trials = [
        _trial(study, recipe, case, seed, shared, overrides, store)
        for case in cases or study.cases
        for seed in seeds
    ]
    _refuse_twins(trials)
    asked = [study.model_dump(mode="json"), recipe, list(seeds), list(cases), chosen]
    identity = digest_of([*asked, list(overrides)])[:_ID_CHARS]
    return Plan(
        study=study,
        recipe=recipe,
        choices=chosen,
        overrides=tuple(overrides),
        trials=tuple(trials),
        folder=store.root / "studies" / study.name / identity,
    )


def _choices(study: Study, asked: Sequence[str]) -> dict[str, str]:
    chosen = {name: next(iter(choices)) for name, choices in study.variables.items()}
    for text in asked:
        name, sep, choice = text.partition("=")
        if not sep:
            raise ConfigError(f"--with {text!r}: expected VARIABLE=CHOICE, as in pictures=web.")
        if name not in study.variables:
            known = study.variables or ["(none)"]
            raise ConfigError(
                f"study {study.name!r} has no variable {name!r}{nearest(name, known)}"
            )
        if choice not in study.variables[name]:
            raise ConfigError(f"--with {text!r}{nearest(choice, study.variables[name])}")
        chosen[name] = choice
    return chosen


def _trial(
    study: Study,
    recipe_name: str,
    case: str,
    seed: int,
    shared: Mapping[str, Any],
    overrides: Sequence[str],
    store: Store,
) -> Trial:
    settings = {**shared, **study.cases[case], **dict.fromkeys(study.seeded, seed)}
    words = (*(_as_override(key, value) for key, value in settings.items()), *overrides)
    try:
        recipe = load_recipe(recipe_name, words)
        options = options_of(recipe_name, str(store.root), words)
        engine = Engine(recipe=recipe, store=store, options=options)
    except ConfigError as error:
        raise ConfigError(f"study {study.name!r}, case {case!r}: {error}") from error
    last = recipe.rounds.count
    wanted = {model: name.replace("@last", f"@{last}") for model, name in study.models.items()}
    for model, name in wanted.items():
        if name not in engine.instances:
            known = [known for known in engine.instances if known.startswith("evaluate")]
            raise ConfigError(
                f"study {study.name!r}, case {case!r}: model {model!r} is {name}, which recipe "
                f"{recipe_name!r} does not have{nearest(name, known or ['(no evaluate)'])}"
            )
    return Trial(
        case=case,
        seed=seed,
        overrides=words,
        engine=engine,
        wanted=wanted,
        instances=tuple(needed(engine.instances, wanted.values())),
    )


def _as_override(key: str, value: Any) -> str:
    """ "dotted.key=value" as it would be typed: JSON is YAML."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def needed(instances: Mapping[str, Instance], wanted: Any) -> list[Instance]:
    """The wanted instances and everything they are made of, in running order."""
    names = set(wanted)
    for instance in reversed(instances.values()):
        if instance.name in names:
            names.update(entry.instance for entry in instance.inputs)
    return [instance for instance in instances.values() if instance.name in names]


def _refuse_twins(trials: Sequence[Trial]) -> None:
    """Two cases that come to the same recipe are a mistake: an override took their difference."""
    seen: dict[str, str] = {}
    for trial in trials:
        digest = digest_of(trial.engine.recipe.model_dump(mode="json"))
        other = seen.setdefault(digest, trial.case)
        if other != trial.case:
            raise ConfigError(
                f"cases {other!r} and {trial.case!r} come to the same recipe: an override took "
                f"away what tells them apart."
            )
