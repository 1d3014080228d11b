"""What the miniature's writer learns from: one sentence per request, put together by rule.

text = compose({"place": "suburb", "time": "dusk"}, ["pole", "car"], random.Random(0))

The phrases stand in `writer_phrases.yaml`. A sentence follows the request: its scene always, light,
weather and season nearly always, the rest often; every class asked for is named.
"""

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PHRASES = Path(__file__).with_name("writer_phrases.yaml")
MOST_THINGS = 4
"""Things named at most, so that a small text encoder still reads the last one."""

_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
_TABLES = {
    "place": "places",
    "road": "roads",
    "time": "times",
    "weather": "weathers",
    "season": "seasons",
    "camera": "cameras",
    "traffic": "traffic",
}
"""Attribute of a request -> the table of its phrases."""
ATTRIBUTES = tuple(_TABLES)
"""Attributes for which there are phrases."""
_KEPT = {
    "time": 0.95,
    "weather": 0.95,
    "season": 0.85,
    "road": 0.5,
    "camera": 0.35,
    "traffic": 0.25,
}
"""How often each attribute of the request shows in the sentence; its place always does.

Sampled at a low temperature, a writer all but drops what only a third of its lessons say: what the
painter understands has to show in most of them.
"""


def compose(scene: Mapping[str, str], classes: Sequence[str], rng: random.Random) -> str:
    """A sentence that describes the scene and names the classes.

    Args:
        scene: attribute -> value, as the plan has it (`prompts/attributes.yaml`).
        classes: class names of a shipped label space.
        rng: chooses shape and words.

    Raises:
        ValueError: a value or a class for which there are no phrases.
    """
    kept = {name for name, share in _KEPT.items() if name in scene and rng.random() < share}
    things = _things(scene, classes, kept, rng)
    cut = rng.randint(1, max(1, len(things) - 1))
    parts = {
        "view": _view(scene, kept, rng),
        "scene": _street(scene, kept, rng),
        "moment": _moment(scene, kept, rng),
        "things": _enumerate(things),
        "first": _enumerate(things[:cut]),
        "others": _enumerate(things[cut:] or [_phrase("things", "sky", rng)]),
    }
    text = _expand(rng.choice(_table("shapes")), rng).format(**parts)
    return text[0].upper() + text[1:] + "."


def known() -> dict[str, tuple[str, ...]]:
    """What there are phrases for: "classes", and per attribute its values."""
    tables = {"classes": "things", **_TABLES}
    return {name: tuple(_phrases()[table]) for name, table in tables.items()}


def says(text: str, attribute: str) -> set[str]:
    """The values of an attribute of which the text holds a phrase ("in the rain": two of them)."""
    lower = text.lower()
    return {
        value
        for value, patterns in _patterns(attribute).items()
        if any(pattern.search(lower) for pattern in patterns)
    }


@cache
def _patterns(attribute: str) -> dict[str, list[re.Pattern[str]]]:
    """Per value its phrases as patterns: "(a|b)" is one already."""
    found = {}
    for value, entry in _phrases()[_TABLES[attribute]].items():
        groups = entry.values() if isinstance(entry, dict) else [entry]
        found[value] = [
            re.compile(rf"(?<!\w){phrase}(?!\w)") for group in groups for phrase in group
        ]
    return found


def _view(scene: Mapping[str, str], kept: set[str], rng: random.Random) -> str:
    if "camera" in kept:
        return _phrase("cameras", scene["camera"], rng)
    return _expand(rng.choice(_table("views")), rng)


def _street(scene: Mapping[str, str], kept: set[str], rng: random.Random) -> str:
    place = _entry("places", scene["place"])
    noun = _expand(rng.choice(place["nouns"]), rng)
    if "road" not in kept:
        return noun
    road = _entry("roads", scene["road"])
    if rng.random() < 0.5:
        return f"{noun} {_expand(rng.choice(road['tails']), rng)}"
    return f"{_expand(rng.choice(road['nouns']), rng)} {_expand(rng.choice(place['areas']), rng)}"


def _moment(scene: Mapping[str, str], kept: set[str], rng: random.Random) -> str:
    named = [name for name in ("time", "weather", "season") if name in kept] or ["time"]
    rng.shuffle(named)
    return " ".join(_phrase(f"{name}s", scene[name], rng) for name in named)


def _things(
    scene: Mapping[str, str], classes: Sequence[str], kept: set[str], rng: random.Random
) -> list[str]:
    """The classes asked for and perhaps another, some with where they stand.

    The classes come in the order of the request, from any of them on: which one is next can then be
    read off the request, which a small network learns far sooner than which one is still missing.
    """
    start = rng.randrange(len(classes))
    named = [*classes[start:], *classes[:start]]
    others = [name for name in _table("things") if name not in classes]
    if len(named) < MOST_THINGS and rng.random() < 0.5:
        named.insert(rng.randint(0, len(named)), rng.choice(others))
    found = [_thing(name, rng) for name in named]
    if "traffic" in kept and len(found) < MOST_THINGS:
        found.insert(rng.randint(0, len(found)), _phrase("traffic", scene["traffic"], rng))
    return found


def _thing(name: str, rng: random.Random) -> str:
    position = _expand(rng.choice(_table("positions")), rng)
    phrase = _phrase("things", name, rng)
    return f"{phrase} {position}" if rng.random() < 0.15 else phrase


def _enumerate(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _phrase(table: str, name: str, rng: random.Random) -> str:
    return _expand(rng.choice(_entry(table, name)), rng)


def _expand(phrase: str, rng: random.Random) -> str:
    """The phrase with one of every "(a|b|c)"."""
    return _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), phrase)


def _entry(table: str, name: str) -> Any:
    entries = _table(table)
    if name not in entries:
        raise ValueError(
            f"{PHRASES.name} has no phrases for {name!r} under {table!r}; it has "
            f"{', '.join(entries)}."
        )
    return entries[name]


def _table(name: str) -> Any:
    return _phrases()[name]


@cache
def _phrases() -> dict[str, Any]:
    return yaml.safe_load(PHRASES.read_text(encoding="utf-8"))
