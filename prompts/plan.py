"""Plan what to ask a writer for: every attribute value and every class as often as it should be.

plan = make_plan(load_attributes(), {"rider": 3.0, "road": 1.0}, count=100, seed=0)
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prompts.loader import Attributes

CLASSES_PER_PROMPT = 3
RAREST = 3.0
"""A rare class is asked for at most this many times as often as a frequent one."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One description to be written."""

    number: int
    attributes: Mapping[str, str]
    """Attribute -> value."""
    classes: tuple[str, ...]
    """Class names that the description must name."""


def class_weights(names: Sequence[str], pixels: Mapping[str, int] | None) -> dict[str, float]:
    """How much more often each class is asked for, 1 to 3.

    The weight is the root of (median pixel count / pixel count), so that a class with a ninth of
    the median's pixels is asked for three times as often as one above the median.

    Args:
        names: the classes.
        pixels: class name -> labelled pixels in the sources; None: all weights are 1.
    """
    if not pixels:
        return dict.fromkeys(names, 1.0)
    counts = sorted(count for name in names if (count := pixels.get(name, 0)))
    median = counts[len(counts) // 2] if counts else 0
    return {
        name: min(RAREST, max(1.0, (median / max(pixels.get(name, 0), 1)) ** 0.5)) for name in names
    }


def make_plan(
    attributes: Attributes, weights: Mapping[str, float], *, count: int, seed: int
) -> list[Ask]:
    """Plan `count` descriptions, the same for the same arguments.

    Values of an attribute occur equally often (to within one); classes in proportion to their
    weights; pairs that do not go together are swapped away.

    Args:
        attributes: what scenes vary in.
        weights: class name -> how often it is asked for, relative to the others.
        count: descriptions.
        seed: of the order.
    """
    rng = random.Random(seed)
    columns = {
        name: _balanced(values, count=count, rng=rng) for name, values in attributes.values.items()
    }
    scenes = [{name: column[row] for name, column in columns.items()} for row in range(count)]
    _settle(scenes, attributes, rng)
    classes = _class_sets(weights, count=count, rng=rng)
    return [
        Ask(number=number, attributes=scene, classes=names)
        for number, (scene, names) in enumerate(zip(scenes, classes, strict=True))
    ]


def _balanced(values: Sequence[str], *, count: int, rng: random.Random) -> list[str]:
    column: list[str] = []
    while len(column) < count:
        deck = list(values)
        rng.shuffle(deck)
        column += deck
    return column[:count]


def _settle(scenes: list[dict[str, str]], attributes: Attributes, rng: random.Random) -> None:
    """Swap values between scenes until no scene holds a conflicting pair (where possible)."""
    for number, scene in enumerate(scenes):
        while attributes.clash(scene):
            name = next(iter(_clashing(scene, attributes)))
            partners = [*range(number), *range(number + 1, len(scenes))]
            rng.shuffle(partners)
            if not any(_swap(scene, scenes[other], name, attributes) for other in partners):
                break


def _clashing(scene: Mapping[str, str], attributes: Attributes) -> Mapping[str, str]:
    return next(pair for pair in attributes.conflicts if pair.items() <= scene.items())


def _swap(one: dict[str, str], other: dict[str, str], name: str, attributes: Attributes) -> bool:
    """Exchange an attribute's values if the first scene gets better and the second no worse."""
    changed = one | {name: other[name]}
    partner = other | {name: one[name]}
    fewer = _num_clashes(changed, attributes) < _num_clashes(one, attributes)
    if not fewer or _num_clashes(partner, attributes) > _num_clashes(other, attributes):
        return False
    one.update(changed)
    other.update(partner)
    return True


def _num_clashes(scene: Mapping[str, str], attributes: Attributes) -> int:
    return sum(pair.items() <= scene.items() for pair in attributes.conflicts)


def _class_sets(
    weights: Mapping[str, float], *, count: int, rng: random.Random
) -> list[tuple[str, ...]]:
    """Distinct classes for every description: those that lag most behind their share."""
    size = min(CLASSES_PER_PROMPT, len(weights))
    total = sum(weights.values())
    asked: Counter[str] = Counter()
    sets = []
    for number in range(count):
        due = {
            name: min(1.0, weight / total * size) * (number + 1) - asked[name] + rng.random()
            for name, weight in weights.items()
        }
        chosen = sorted(due, key=due.__getitem__, reverse=True)[:size]
        asked.update(chosen)
        sets.append(tuple(name for name in weights if name in chosen))
    return sets
