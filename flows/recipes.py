"""Recipes: named runs as YAML files with `extends`, dotted overrides, and errors that help.

clouds recipes; clouds config show --recipe miniature --set train_source.steps=100
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from stages.config import Recipe

RECIPES_DIR = Path(__file__).parent / "recipes"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_SHAPES = {
    "tuple_type": "expected a list, [...] or one `- ...` a line",
    "dict_type": "expected `name: value` pairs",
    "model_type": "expected a section of `name: value` pairs",
}
"""What pydantic calls by names of Python."""


class ConfigError(ValueError):
    """A mistake in a recipe or override: the message gives value, place and way out."""


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the closest known name, or the list of known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}."


def recipe_files() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(RECIPES_DIR.glob("*.yaml"))}


def load_recipe(
    name: str, overrides: Sequence[str] = (), *, model: type[BaseModel] = Recipe
) -> Any:
    """Read a recipe by name or file, apply its `extends` and the overrides, validate.

    Args:
        name: a shipped recipe's name, or the path of a YAML file.
        overrides: "dotted.key=value" each; the value is read as YAML.
        model: the recipe's pydantic model.

    Raises:
        ConfigError: unknown recipe, key or bad value; with place and nearest known name.
    """
    tree = _read(name, seen=())
    tree.setdefault("name", Path(name).stem)
    for override in overrides:
        key, value = parse_override(override)
        set_dotted(tree, key, value)
    recipe = validate(tree, model=model, place=f"recipe {name!r}")
    for leg in getattr(recipe, "legs", {}):
        resolve(recipe, leg=leg)
    for round_ in recipe.rounds.overrides if hasattr(recipe, "rounds") else ():
        resolve(recipe, round=round_)
    return recipe


def parse_override(text: str) -> tuple[str, Any]:
    """Split "dotted.key=value" and read the value as YAML.

    Raises:
        ConfigError: there is no "=", or the value is no YAML.
    """
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError(
            f"override {text!r}: expected dotted.key=value, for example train_source.steps=100."
        )
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is no YAML ({error}).") from error


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `tree["a"]["b"]` for key "a.b"; numbers address list entries.

    Raises:
        ConfigError: a part of the key addresses something that is no section or list entry.
    """
    *path, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(path):
        if isinstance(node, list):
            node = node[_entry(node, part, key)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError(f"override {key!r}: {'.'.join(path[:depth])} is a value, no section.")
    if isinstance(node, list):
        node[_entry(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {key!r}: {'.'.join(path)} is a value, no section.")


def _entry(entries: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(entries):
        raise ConfigError(
            f"override {key!r}: {part!r} is no entry of a list of {len(entries)} "
            f"(entries are numbered from 0)."
        )
    return int(part)


def resolve(recipe: Any, *, round: int | None = None, leg: str | None = None) -> Any:
    """The recipe as one round and leg see it: their overrides applied and validated.

    Raises:
        ConfigError: an override names an unknown key or a bad value.
    """
    rounds = recipe.rounds.overrides.get(round, {}) if hasattr(recipe, "rounds") else {}
    legs = recipe.legs.get(leg, {}) if leg else {}
    if not rounds and not legs:
        return recipe
    # What a protocol filled in is not set: an override of the protocol fills it anew.
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    for overrides in (rounds, legs):
        for key, value in overrides.items():
            set_dotted(tree, key, value)
    where = f"leg {leg!r}" if leg else f"round {round}"
    return validate(tree, model=type(recipe), place=f"{where} of recipe {recipe.name!r}")


def validate(tree: Mapping[str, Any], *, model: type[BaseModel], place: str) -> Any:
    """Validate a tree against the model, with errors for people.

    Raises:
        ConfigError: names each wrong key or value and the way out.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item, model) for item in error.errors(include_url=False)]
        raise ConfigError(f"{place}: " + "\n  ".join(lines)) from None


def _explain(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    location = item["loc"]
    dotted = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"unknown key {dotted!r}{nearest(str(location[-1]), known)}"
    if item["type"] == "value_error":
        where = f"{dotted}: " if dotted else ""
        return f"{where}{item['ctx']['error']}."
    message = _SHAPES.get(item["type"]) or item["msg"][0].lower() + item["msg"][1:]
    return f"{dotted} = {item.get('input')!r}: {message}."


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names of the fields of the section that a location inside the model leads to."""
    current: Any = model
    for part in location:
        if isinstance(part, int) or part not in current.model_fields:
            continue  # an entry of a list or mapping
        current = _section_of(current.model_fields[part].annotation)
    return list(current.model_fields)


def _section_of(annotation: Any) -> Any:
    """The pydantic model inside an annotation such as `EmaConfig | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None


def _read(name: str, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _locate(name, beside=seen[-1].parent if seen else None)
    if path in seen:
        chain = " -> ".join(p.stem for p in (*seen, path))
        raise ConfigError(f"recipe {name!r} extends itself: {chain}.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of sections, this is a {type(tree).__name__}."
        )
    bases = tree.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends is {bases!r}; expected a recipe's name, or a list.")
    merged: dict[str, Any] = {}
    for base in bases:
        inherited = _read(base, seen=(*seen, path))
        inherited.pop("name", None)
        inherited.pop("description", None)
        if isinstance(inherited.get("report"), dict):
            inherited["report"].pop("title", None)
        merged = merge(merged, inherited)
    return merge(merged, tree)


def _locate(name: str, *, beside: Path | None) -> Path:
    files = recipe_files()
    if name in files:
        return files[name]
    candidates = ([beside / name] if beside else []) + [Path(name)]
    for path in candidates:
        if path.suffix in {".yaml", ".yml"} and path.is_file():
            return path.resolve()
    if Path(name).suffix in {".yaml", ".yml"}:
        raise ConfigError(f"recipe file {name!r} is not there.")
    raise ConfigError(f"unknown recipe {name!r}{nearest(name, files)}")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merge key by key; values and lists replace. `null` in `over` replaces too."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged
