"""Sentences about miniature pictures and about crops of them, from what is really visible."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from models.miniature import materials as m

SMALL_SHARE = {
    m.POLE: 0.004,
    m.TRAFFIC_LIGHT: 0.0015,
    m.TRAFFIC_SIGN: 0.0015,
    m.PERSON: 0.002,
    m.RIDER: 0.0015,
    m.MOTORCYCLE: 0.0015,
    m.BICYCLE: 0.0015,
}
"""Share of the pixels from which a label is worth a word; others need `USUAL_SHARE`."""

USUAL_SHARE = 0.006

LAYOUT_WORDS = {
    "city": ("a city street", "a downtown street"),
    "suburb": ("a suburban street", "a residential street"),
    "highway": ("a highway", "a motorway"),
    "park": ("a street along a park", "a road in a park"),
    "square": ("a town square", "a wide square"),
    "country": ("a country road", "a rural road"),
}
TIME_WORDS = {
    "day": ("in daylight", "at daytime"),
    "golden": ("at sunset", "in low evening sun"),
    "dusk": ("at dusk", "in the twilight"),
    "night": ("at night", "in the dark"),
    "sodium": ("at night", "under street lamps"),
}
SKY_WORDS = {
    "clear": ("under a clear sky",),
    "cloudy": ("under a cloudy sky",),
    "overcast": ("under a grey sky", "on an overcast day"),
}


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What a scene is like."""

    layout: str
    season: str
    time: str
    sky: str
    precipitation: str
    foggy: bool
    snowy: bool
    wet: bool
    car_paints: tuple[str, ...]

    def phrases(self) -> tuple[tuple[str, ...], ...]:
        """Groups of interchangeable phrases about weather and light."""
        groups = [TIME_WORDS[self.time]]
        if self.time in ("day", "golden"):
            groups.append(SKY_WORDS[self.sky])
        if self.precipitation == "rain":
            groups.append(("in the rain", "on a rainy day"))
        elif self.precipitation == "snow":
            groups.append(("in falling snow", "in a snowfall"))
        elif self.wet:
            groups.append(("after the rain", "on wet ground"))
        if self.foggy:
            groups.append(("in fog", "in the mist"))
        if self.snowy:
            groups.append(("covered in snow", "in winter snow"))
        elif self.season == "autumn":
            groups.append(("in autumn",))
        return tuple(groups)


def visible_labels(label_ids_HW: np.ndarray) -> list[int]:
    """Cityscapes label ids that are large enough to name, the largest first."""
    counts = np.bincount(label_ids_HW.ravel(), minlength=256)
    least = label_ids_HW.size
    named = [
        label
        for label in m.WORDS
        if counts[label] >= max(4, SMALL_SHARE.get(label, USUAL_SHARE) * least)
    ]
    return sorted(named, key=lambda label: -counts[label])


def describe(
    label_ids_HW: np.ndarray, attributes: Attributes, rng: random.Random | None = None
) -> str:
    """A sentence naming the scene and everything visible in it; with `rng` the wording varies."""

    def word(options: tuple[str, ...]) -> str:
        return rng.choice(options) if rng else options[0]

    names = [word(m.WORDS[label]) for label in visible_labels(label_ids_HW)]
    if rng:
        rng.shuffle(names)
    phrases = [word(group) for group in attributes.phrases()]
    if rng:
        phrases = [phrase for phrase in phrases if rng.random() < 0.8]
    scene = " ".join([word(LAYOUT_WORDS[attributes.layout]), *phrases])
    opening = word(("a photo of", "a picture of", "a view of"))
    return f"{opening} {scene} with {_enumerate(names)}" if names else f"{opening} {scene}"


def describe_crop(label_ids_HW: np.ndarray, rng: random.Random) -> str | None:
    """A sentence about what a crop shows, or None when nothing in it is worth a word."""
    names = [rng.choice(m.WORDS[label]) for label in visible_labels(label_ids_HW)]
    if not names:
        return None
    if len(names) > 1 and rng.random() < 0.7:
        rng.shuffle(names)
    opening = rng.choice(("a photo of", "a close view of", "a picture of", ""))
    return f"{opening} {_enumerate(names)}".strip()


def _enumerate(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return ", ".join(names[:-1]) + " and " + names[-1]
