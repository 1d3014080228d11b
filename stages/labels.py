"""Label spaces: class names, colours, synonyms, and how raw label values become train ids.

A label space is a YAML file in `stages/labelspaces/` (or one of your own): the only home of class
names. `stages/labelspaces/cityscapes19.yaml` shows the form. No torch here.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stages.contracts import labelspace_file
from stages.shards import write_json

IGNORE = 255
"""Train id of pixels without a class, in every label map between rooms."""

RAW_VALUES = 65536
FOLDER = Path(__file__).resolve().parent / "labelspaces"


@dataclass(frozen=True, kw_only=True)
class LabelClass:
    """One class of a label space."""

    id: int
    """Train id, 0 upwards."""
    name: str
    colour: tuple[int, int, int]
    """RGB, 0..255."""
    thing: bool = False
    """Countable objects (cars) rather than stuff (sky)."""
    synonyms: tuple[str, ...] = ()
    """Other words for what the class holds."""


@dataclass(frozen=True, kw_only=True)
class IdMap:
    """How the values of one kind of label file become train ids."""

    name: str
    ids: Mapping[int, int]
    """Raw value -> train id."""
    ignored: frozenset[int] = frozenset()
    """Raw values that are known and have no class."""

    @cached_property
    def table(self) -> np.ndarray:
        """Train id of every raw value: uint8 [65536], 255 where there is none."""
        table = np.full(RAW_VALUES, IGNORE, np.uint8)
        for raw, train in self.ids.items():
            table[raw] = train
        return table

    @cached_property
    def known(self) -> np.ndarray:
        """Which raw values the map names: bool [65536]."""
        known = np.zeros(RAW_VALUES, bool)
        known[[*self.ids, *self.ignored]] = True
        return known

    def apply(self, raw_HW: np.ndarray) -> np.ndarray:
        """Train ids (uint8 [H, W]) of raw label values (uint8 or uint16 [H, W])."""
        table = self.table[:256] if raw_HW.dtype == np.uint8 else self.table
        return np.take(table, raw_HW)

    def to_json(self) -> dict[str, Any]:
        ids = {str(raw): train for raw, train in sorted(self.ids.items())}
        return {"name": self.name, "ids": ids, "ignored": sorted(self.ignored)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "IdMap":
        ids = {int(raw): train for raw, train in value["ids"].items()}
        return cls(name=value["name"], ids=ids, ignored=frozenset(value["ignored"]))


@dataclass(frozen=True, kw_only=True)
class LabelSpace:
    """The classes a segmenter tells apart, and the maps of the data sets that have them."""

    name: str
    classes: tuple[LabelClass, ...]
    maps: Mapping[str, IdMap]
    origin: str = ""
    """Where it was read from, for messages."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of train ids."""
        return tuple(entry.name for entry in self.classes)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def colours(self) -> np.ndarray:
        """RGB of every label value: uint8 [256, 3]; black where there is no class."""
        colours = np.zeros((256, 3), np.uint8)
        for entry in self.classes:
            colours[entry.id] = entry.colour
        return colours

    def colourise(self, labels_HW: np.ndarray) -> np.ndarray:
        """Paint a label map (uint8 train ids [H, W]) in the classes' colours (uint8 [H, W, 3])."""
        return np.take(self.colours, labels_HW, axis=0)

    def id_map(self, name: str, *, wanted_by: str) -> IdMap:
        """The map called `name`.

        Args:
            name: a key of `maps`.
            wanted_by: who asks ("data set 'day'"), for the message.

        Raises:
            ValueError: no such map; names the known ones.
        """
        if name in self.maps:
            return self.maps[name]
        raise ValueError(
            f"{wanted_by} needs the label map {name!r}, which label space {self.name!r} "
            f"({self.origin}) does not have. Its maps: {', '.join(sorted(self.maps)) or 'none'}"
            f"{_nearest(name, self.maps)}. Add `maps: {{{name}: {{ids: ..., ignored: ...}}}}` to "
            "that file, or set the data set's `label_map` to one of these."
        )

    def to_json(self) -> dict[str, Any]:
        """The label space without its maps, as `labelspace.json` holds it."""
        return {
            "name": self.name,
            "ignore_id": IGNORE,
            "classes": [
                {
                    "id": entry.id,
                    "name": entry.name,
                    "colour": list(entry.colour),
                    "thing": entry.thing,
                    "synonyms": list(entry.synonyms),
                }
                for entry in self.classes
            ],
        }

    def save(self, folder: Path) -> None:
        """Write `labelspace.json` into the folder."""
        write_json(folder / "labelspace.json", self.to_json())


def known_labelspaces() -> list[str]:
    """Names of the label spaces that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def labelspace_path(reference: str) -> Path:
    """The file of a label space: a shipped name, or a path to a YAML file.

    Raises:
        FileNotFoundError: there is none; names the shipped ones.
    """
    path = labelspace_file(reference)
    if path.is_file():
        return path
    names = known_labelspaces()
    raise FileNotFoundError(
        f"data.labels: {reference!r} is neither a shipped label space ({', '.join(names)}"
        f"{_nearest(reference, names)}) nor a YAML file. Copy "
        "stages/labelspaces/cityscapes19.yaml, edit it and give its path."
    )


def load_labelspace(reference: str) -> LabelSpace:
    """Read a label space by shipped name or YAML path.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file has not the right form; names file, place and value.
    """
    path = labelspace_path(reference)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    return _parse(raw, origin=str(path))


def read_labelspace(part: Path) -> LabelSpace:
    """Read the label space that `prepare` left (its part `labelspace`); it has no maps.

    Raises:
        FileNotFoundError: there is no `labelspace.json`.
        ValueError: it has not the right form.
    """
    path = part / "labelspace.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `clouds --stage prepare` again.")
    return _parse(yaml.safe_load(path.read_text(encoding="utf-8")), origin=str(path))


def _parse(raw: Any, *, origin: str) -> LabelSpace:
    if not isinstance(raw, dict) or not isinstance(raw.get("classes"), list):
        raise ValueError(f"{origin}: expected `name`, `classes` (a list) and `maps`.")
    unknown = set(raw) - {"name", "ignore_id", "classes", "maps"}
    if unknown:
        raise ValueError(f"{origin}: unknown keys {sorted(unknown)}.")
    if raw.get("ignore_id", IGNORE) != IGNORE:
        raise ValueError(f"{origin}: ignore_id is {raw['ignore_id']}; it must be {IGNORE}.")
    classes = tuple(
        _parse_class(entry, place=f"{origin}: classes[{number}]", number=number)
        for number, entry in enumerate(raw["classes"])
    )
    if not 1 <= len(classes) <= IGNORE:
        raise ValueError(f"{origin}: {len(classes)} classes; a label space has 1 to {IGNORE}.")
    names = [entry.name for entry in classes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{origin}: class names used twice: {', '.join(twice)}.")
    maps = {
        str(name): _parse_map(
            str(name), value, place=f"{origin}: maps.{name}", num_classes=len(classes)
        )
        for name, value in (raw.get("maps") or {}).items()
    }
    return LabelSpace(
        name=str(raw.get("name", "")), classes=classes, maps=maps, origin=Path(origin).name
    )


def _parse_class(entry: Any, *, place: str, number: int) -> LabelClass:
    if not isinstance(entry, dict) or not {"id", "name", "colour"} <= set(entry):
        raise ValueError(f"{place}: expected id, name and colour, got {entry!r}.")
    unknown = set(entry) - {"id", "name", "colour", "thing", "synonyms"}
    if unknown:
        raise ValueError(f"{place}: unknown keys {sorted(unknown)}.")
    if entry["id"] != number:
        raise ValueError(
            f"{place}: id is {entry['id']!r}; ids count 0, 1, 2, ... in the order of the list, "
            f"so it must be {number}."
        )
    colour = entry["colour"]
    if len(colour) != 3 or not all(
        isinstance(value, int) and 0 <= value <= 255 for value in colour
    ):
        raise ValueError(f"{place}: colour is {colour!r}; expected [red, green, blue], 0..255.")
    return LabelClass(
        id=number,
        name=str(entry["name"]),
        colour=tuple(colour),
        thing=bool(entry.get("thing", False)),
        synonyms=tuple(str(word) for word in entry.get("synonyms") or ()),
    )


def _parse_map(name: str, value: Any, *, place: str, num_classes: int) -> IdMap:
    if not isinstance(value, dict) or not isinstance(value.get("ids"), dict):
        raise ValueError(f"{place}: expected `ids: {{raw value: train id}}` and `ignored: [...]`.")
    ids = {}
    for raw, train in value["ids"].items():
        if not isinstance(raw, int) or not 0 <= raw < RAW_VALUES:
            raise ValueError(f"{place}: raw value {raw!r}; expected 0..{RAW_VALUES - 1}.")
        if not isinstance(train, int) or not 0 <= train < num_classes:
            raise ValueError(
                f"{place}: {raw} -> {train!r}; train ids are 0..{num_classes - 1} (list values "
                "without a class under `ignored`)."
            )
        ids[raw] = train
    ignored = _ranges(value.get("ignored") or (), place=place)
    both = sorted(ignored & set(ids))
    if both:
        raise ValueError(f"{place}: values {both} stand under both `ids` and `ignored`.")
    return IdMap(name=name, ids=ids, ignored=ignored)


def _ranges(entries: Sequence[int | str], *, place: str) -> frozenset[int]:
    """Values of a list like [0-6, 9, 255]."""
    values: set[int] = set()
    for entry in entries:
        first, _, last = str(entry).partition("-")
        try:
            values.update(range(int(first), int(last or first) + 1))
        except ValueError:
            raise ValueError(f"{place}: ignored holds {entry!r}; write 9 or 0-6.") from None
    outside = sorted(value for value in values if not 0 <= value < RAW_VALUES)
    if outside:
        raise ValueError(f"{place}: ignored holds {outside}; expected 0..{RAW_VALUES - 1}.")
    return frozenset(values)


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; nearest: {match[0]}" if match else ""
