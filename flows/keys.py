"""What a key is made of: the ingredients that can change a stage's outputs, and how they differ.

Two keys differ exactly where their ingredients differ, so `plan` can say why a stage would run.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from flows.digests import digest_of, listing_digest
from flows.pipeline import Instance
from flows.store import Store
from models.config import NAME_FIELDS, name_path, weights_path
from stages.contracts import External
from stages.section import InKeyIfSet, NotInKey


def ingredients(instance: Instance, inputs: Mapping[str, str], store: Store) -> dict[str, Any]:
    """Everything that counts in an instance's key.

    Args:
        instance: which stage, round and leg.
        inputs: output digest of each input, by "role" or, where everything is taken, by instance.
        store: remembers digests of files outside it.
    """
    contract, recipe = instance.contract, instance.recipe
    found: dict[str, Any] = {
        "stage": contract.name,
        "version": contract.version,
        "round": instance.round,
        "seed": recipe.seed,
        "config": {name: key_part(getattr(recipe, name)) for name in contract.sections_of(recipe)},
        "inputs": dict(inputs),
    }
    if contract.numeric:
        found["precision"] = recipe.precision
    weights = {
        field: weights_identity(recipe, field, store) for field in contract.weights_of(recipe)
    }
    if weights:
        found["weights"] = weights
    outside = {
        name: _external_state(external, store)
        for name, external in contract.externals(recipe).items()
    }
    if outside:
        found["outside"] = outside
    return found


def key_part(section: Any) -> Any:
    """A section as plain values, without the fields that cannot change a result as they are."""
    if isinstance(section, BaseModel):
        model = type(section)
        names = [
            name
            for name in _key_fields(model)
            if name not in _later_fields(model)
            or getattr(section, name) != model.model_fields[name].default
        ]
        return {name: key_part(getattr(section, name)) for name in names}
    if isinstance(section, tuple | list):
        return [key_part(entry) for entry in section]
    if isinstance(section, Mapping):
        return {str(name): key_part(entry) for name, entry in section.items()}
    return section


@cache
def _key_fields(model: type[BaseModel]) -> tuple[str, ...]:
    return tuple(
        name
        for name, field in model.model_fields.items()
        if not any(isinstance(mark, NotInKey) for mark in field.metadata)
    )


@cache
def _later_fields(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(
        name
        for name, field in model.model_fields.items()
        if any(isinstance(mark, InKeyIfSet) for mark in field.metadata)
    )


def weights_identity(recipe: Any, dotted: str, store: Store) -> str:
    """Which weights a config field names: a digest if local, else repository and revision."""
    *path, last = dotted.split(".")
    section = recipe
    for part in path:
        section = getattr(section, part)
    reference = getattr(section, last)
    if reference is None:
        return "none"
    local = name_path(reference) if dotted in NAME_FIELDS else weights_path(reference)
    if local is None or getattr(section, "server", None) is not None:  # its names are no paths here
        return f"hub:{reference}@{getattr(section, 'revision', None) or 'main'}"
    if not local.exists():
        return f"missing:{reference}"
    return f"local:{store.outside_digest(local)}"


def _external_state(external: External, store: Store) -> str:
    if external.by == "listing":
        return f"{external.base} {listing_digest(list(external.paths), external.base)}"
    digests = {
        path.name: store.outside_digest(path) if path.exists() else "missing"
        for path in external.paths
    }
    return digest_of(digests)[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """ "train_source.steps: 100 -> 200" for every ingredient that differs."""
    old_flat, new_flat = dict(flatten(old)), dict(flatten(new))
    for name in sorted(old_flat.keys() | new_flat.keys()):
        before, after = old_flat.get(name, "(absent)"), new_flat.get(name, "(absent)")
        if before != after:
            yield _say_difference(name, before, after)


def _say_difference(name: str, before: Any, after: Any) -> str:
    head, _, rest = name.partition(".")
    if head == "config":
        return f"{rest}: {before} -> {after}"
    if head == "inputs":
        return f"input {rest} changed"
    if head == "outside":
        return f"files of {rest} changed"
    if head == "version":
        return f"the stage's version: {before} -> {after}"
    return f"{name}: {before} -> {after}"


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in a tree; lists of plain values stay whole."""
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from flatten(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(tree, list) and any(isinstance(entry, Mapping) for entry in tree):
        for number, value in enumerate(tree):
            yield from flatten(value, f"{prefix}.{number}")
    else:
        yield prefix, tree
