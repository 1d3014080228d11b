"""What the miniature's painter learns from: scenes in words of many kinds, and its two losses.

A scene is what a rendered picture shows, without its pixels. Its sentences are longer and shorter,
plainer and more varied than the renderer's own captions, because people and language models write
prompts in their own words.
"""

# B pictures, C latent channels, H W height and width, F G height and width of the latents

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from models.miniature import materials as m
from models.miniature.captions import (
    LAYOUT_WORDS,
    SKY_WORDS,
    TIME_WORDS,
    Attributes,
    visible_labels,
)
from models.miniature.renderer import Picture


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows: all that a sentence about it needs."""

    counts: dict[int, int]
    """Visible Cityscapes label id, the largest first -> number of its things (0: no thing)."""
    attributes: Attributes

    @classmethod
    def of(cls, picture: Picture) -> Scene:
        """The scene of a rendered picture."""
        counts = {}
        for label in visible_labels(picture.label_ids_HW):
            found = np.unique(picture.instances_HW[picture.label_ids_HW == label])
            counts[label] = len(found) if label in m.THINGS else 0
        return cls(counts=counts, attributes=picture.attributes)

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_json` takes them back."""
        return {"counts": list(self.counts.items()), "attributes": asdict(self.attributes)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Scene:
        """A scene from the values of `to_json`."""
        attributes = value["attributes"] | {"car_paints": tuple(value["attributes"]["car_paints"])}
        return cls(
            counts={int(label): count for label, count in value["counts"]},
            attributes=Attributes(**attributes),
        )


MORE_LAYOUTS: dict[str, tuple[str, ...]] = {
    "city": ("an avenue", "a shopping street", "an old town street", "a city centre street",
             "an intersection", "a boulevard", "a business district", "a tram street",
             "a narrow one-way street"),
    "suburb": ("a suburban road", "a village street", "a quiet lane", "a street in a suburb",
               "a village main street", "a street with houses"),
    "highway": ("a ring road", "a multi-lane road", "a bridge approach", "a freeway",
                "a motorway in dense traffic"),
    "park": ("a tree-lined avenue", "a green avenue", "a road between trees", "a leafy street"),
    "square": ("a station forecourt", "a market square", "a roundabout", "an open square",
               "a harbour front"),
    "country": ("a road between fields", "a country lane", "a road through the hills",
                "a road in the countryside"),
}  # fmt: skip
MORE_TIMES: dict[str, tuple[str, ...]] = {
    "day": ("in late morning", "at noon", "in the afternoon", "by day", "on a bright day"),
    "golden": ("at golden hour", "in early morning light", "at sunrise", "in evening light"),
    "dusk": ("at dawn", "at nightfall", "in the evening", "in the last light"),
    "night": ("after dark", "at midnight", "late at night", "with glowing windows at night"),
    "sodium": ("after dark", "in orange lamp light", "late at night"),
}
MORE_SKIES: dict[str, tuple[str, ...]] = {
    "clear": ("in sunshine", "under a blue sky", "in bright sun", "on a sunny day"),
    "cloudy": ("under scattered clouds", "with clouds in the sky", "under white clouds"),
    "overcast": ("under an overcast sky", "in dull light", "in flat grey light"),
}
RAIN = ("in the rain", "on a rainy day", "in heavy rain", "in light rain", "in drizzle")
SNOWFALL = ("in falling snow", "in a snowfall", "with snowflakes in the air", "in a snow storm")
WET = ("after the rain", "on wet ground", "on wet asphalt", "with puddles")
FOG = ("in fog", "in the mist", "in thick fog", "in morning fog", "fading into the haze")
SNOWY = ("covered in snow", "in winter snow", "in winter", "in fresh snow", "with snowy ground")
AUTUMN = ("in autumn", "with yellow leaves", "on an autumn day")
SUMMER = ("in summer", "in spring", "with green leaves")

MORE_WORDS: dict[int, tuple[str, ...]] = {
    m.ROAD: ("lane", "roadway", "road surface", "street with lane markings"),
    m.SIDEWALK: ("footpath", "walkway", "kerb"),
    m.BUILDING: ("apartment block", "shop front", "brick house", "skyscraper", "office tower"),
    m.WALL: ("stone wall", "concrete wall", "brick wall", "garden wall", "noise barrier"),
    m.FENCE: ("wooden fence", "metal fence", "picket fence", "guard rail", "chain-link fence"),
    m.POLE: ("street lamp", "utility pole", "lamp pole", "traffic pole"),
    m.TRAFFIC_LIGHT: ("red traffic light", "stoplight", "signal light"),
    m.TRAFFIC_SIGN: ("sign", "warning sign", "direction sign", "speed limit sign"),
    m.VEGETATION: ("hedge", "plane tree", "green shrub", "row of trees", "leafy tree"),
    m.TERRAIN: ("grass verge", "lawn", "field", "soil", "green bank"),
    m.SKY: ("open sky", "wide sky"),
    m.PERSON: ("woman", "man", "child", "walker", "commuter", "jogger", "passer-by"),
    m.RIDER: ("bicycle rider", "motorcycle rider", "biker", "courier on a bicycle"),
    m.CAR: ("parked car", "taxi", "sedan", "hatchback", "suv", "family car", "car ahead"),
    m.TRUCK: ("delivery van", "delivery truck", "van", "pickup", "tractor", "parked truck"),
    m.BUS: ("city bus", "coach", "school bus", "parked bus"),
    m.TRAIN: ("streetcar", "red train", "tram ahead"),
    m.MOTORCYCLE: ("scooter", "moped", "parked motorcycle"),
    m.BICYCLE: ("parked bicycle", "mountain bike", "cargo bike"),
}
"""What people call a label, beside `materials.WORDS`."""

OPENINGS = ("a photo of", "a picture of", "a view of", "a wide-angle view of", "a photograph of",
            "a dashboard view of", "the view through the windscreen of", "a scene on")  # fmt: skip
PLACES = ("ahead", "on the left", "on the right", "on both sides", "in the distance", "behind",
          "at the kerb", "in the foreground", "at the roadside", "close by")  # fmt: skip
MANNERS = ("quiet", "busy", "empty", "narrow", "wide", "old", "long", "straight")
COUNTS = {2: ("two",), 3: ("three", "several"), 4: ("four", "several")}


def wording(scene: Scene, rng: random.Random) -> str:
    """A sentence about a scene in some way of speaking: as captions do, freely, or in short.

    What it names is there, but a free or short sentence does not name everything; where it says
    that a thing stands ("on the left") is made up.
    """
    way = rng.random()
    if way < 0.25:
        return _caption(scene, rng)
    if way < 0.85:
        return _free(scene, rng)
    return _short(scene, rng)


def vocabulary() -> list[str]:
    """Every phrase that `wording` may use, for a tokenizer."""
    tables = (LAYOUT_WORDS, TIME_WORDS, SKY_WORDS, m.WORDS, MORE_LAYOUTS, MORE_TIMES, MORE_SKIES)
    phrases = [p for table in (*tables, MORE_WORDS) for options in table.values() for p in options]
    for group in (RAIN, SNOWFALL, WET, FOG, SNOWY, AUTUMN, SUMMER, OPENINGS, PLACES, MANNERS):
        phrases += group
    words = [
        word for table in (m.WORDS, MORE_WORDS) for options in table.values() for word in options
    ]
    return phrases + [_plural(word) for word in words]


def _caption(scene: Scene, rng: random.Random) -> str:
    names = [rng.choice(m.WORDS[label]) for label in scene.counts]
    if rng.random() < 0.5:
        names = [
            _with_article(label, word, scene, rng)
            for label, word in zip(scene.counts, names, strict=True)
        ]
    rng.shuffle(names)
    phrases = [rng.choice(group) for group in scene.attributes.phrases()]
    phrases = [phrase for phrase in phrases if rng.random() < 0.85]
    place = rng.choice(LAYOUT_WORDS[scene.attributes.layout])
    said = " ".join([rng.choice(OPENINGS[:3]), place, *phrases])
    return f"{said} with {_listed(names)}" if names else said


def _free(scene: Scene, rng: random.Random) -> str:
    place = _place(scene, rng)
    phrases = [phrase for phrase in _phrases(scene, rng) if rng.random() < 0.85]
    rng.shuffle(phrases)
    share = rng.uniform(0.35, 1.0)
    named = [label for label in scene.counts if rng.random() < share]
    rng.shuffle(named)
    names = []
    for label in named:
        word = rng.choice(m.WORDS[label] if rng.random() < 0.5 else MORE_WORDS[label])
        name = _with_article(label, word, scene, rng)
        names.append(f"{name} {rng.choice(PLACES)}" if rng.random() < 0.2 else name)
    opening = rng.choice(OPENINGS) if rng.random() < 0.4 else ""
    parts = [opening, place, *phrases]
    if phrases and rng.random() < 0.15:
        parts = [phrases[0], place, *phrases[1:]]
    said = " ".join(part for part in parts if part)
    if not names:
        return said
    return f"{said}{rng.choice((' with ', ', ', ', ', ', with '))}{_listed(names)}"


def _short(scene: Scene, rng: random.Random) -> str:
    if rng.random() < 0.5 or not scene.counts:
        phrases = _phrases(scene, rng)
        chosen = rng.sample(phrases, k=min(len(phrases), rng.randint(0, 2)))
        return " ".join([_place(scene, rng), *chosen])
    labels = rng.sample(list(scene.counts), k=rng.randint(1, min(4, len(scene.counts))))
    words = [rng.choice(m.WORDS[label] + MORE_WORDS[label]) for label in labels]
    return _listed(
        [_with_article(label, word, scene, rng) for label, word in zip(labels, words, strict=True)]
    )


def _place(scene: Scene, rng: random.Random) -> str:
    layout = scene.attributes.layout
    place = rng.choice(LAYOUT_WORDS[layout] if rng.random() < 0.4 else MORE_LAYOUTS[layout])
    if rng.random() < 0.2:
        article, rest = place.split(" ", 1)
        place = f"{_article(manner := rng.choice(MANNERS))} {manner} {rest}" if article else rest
    return place


def _phrases(scene: Scene, rng: random.Random) -> list[str]:
    """One phrase per thing that can be said of light, weather and season."""
    told = scene.attributes
    groups = [TIME_WORDS[told.time] + MORE_TIMES[told.time]]
    if told.time in ("day", "golden"):
        groups.append(SKY_WORDS[told.sky] + MORE_SKIES[told.sky])
    if told.precipitation == "rain":
        groups.append(RAIN)
    elif told.precipitation == "snow":
        groups.append(SNOWFALL)
    elif told.wet:
        groups.append(WET)
    if told.foggy:
        groups.append(FOG)
    if told.snowy:
        groups.append(SNOWY)
    elif told.season == "autumn":
        groups.append(AUTUMN)
    elif told.season == "summer" and rng.random() < 0.4:
        groups.append(SUMMER)
    return [rng.choice(group) for group in groups]


def _with_article(label: int, word: str, scene: Scene, rng: random.Random) -> str:
    """The word with an article or a number, in the plural where there are several things."""
    count = scene.counts[label]
    if count > 1 or (count == 0 and label not in (m.ROAD, m.SKY) and rng.random() < 0.5):
        numbers = (*COUNTS.get(min(count, 4), ("some",)), "", "", "some")
        return f"{rng.choice(numbers)} {_plural(word)}".strip()
    if label in (m.ROAD, m.SKY, m.TERRAIN) and rng.random() < 0.5:
        return rng.choice(("", "the ")) + word
    return f"{_article(word)} {word}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _plural(word: str) -> str:
    """The plural of a word, or of a phrase by its first noun before a preposition."""
    for cut in (" of ", " on ", " with ", " ahead"):
        head, found, rest = word.partition(cut)
        if found:
            return _plural(head) + found + rest
    irregular = {"person": "people", "woman": "women", "man": "men", "child": "children",
                 "passer-by": "passers-by", "grass": "grass", "vegetation": "vegetation",
                 "trees": "trees", "terrain": "terrain", "soil": "soil"}  # fmt: skip
    last = word.split(" ")[-1]
    if last in irregular:
        return word.removesuffix(last) + irregular[last]
    if last.endswith(("s", "ch", "sh")):
        return word + "es"
    return word.removesuffix("y") + "ies" if last.endswith("ry") else word + "s"


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return ", ".join(names[:-1]) + " and " + names[-1]


CUT_HEIGHT_PX, CUT_WIDTH_PX = 32, 64


def cut(
    images_NHW3: np.ndarray, generator: np.random.Generator, count: int, *, grid_px: int = 8
) -> np.ndarray:
    """Cuts [count, 32, 64, 3] of random pictures, on the grid of the latents, half mirrored."""
    chosen = generator.integers(0, len(images_NHW3), count)
    rows, columns = images_NHW3.shape[1] - CUT_HEIGHT_PX, images_NHW3.shape[2] - CUT_WIDTH_PX
    top = grid_px * int(generator.integers(0, rows // grid_px + 1))
    left = grid_px * int(generator.integers(0, columns // grid_px + 1))
    cuts = images_NHW3[chosen, top : top + CUT_HEIGHT_PX, left : left + CUT_WIDTH_PX]
    return np.ascontiguousarray(cuts[:, :, ::-1]) if generator.random() < 0.5 else cuts


def picture_losses(
    painted_B3HW: torch.Tensor, targets_B3HW: torch.Tensor, *, edge_weight: float
) -> dict[str, torch.Tensor]:
    """Mean absolute error of pixels and of differences of neighbours; "total" is minimised."""
    pixels = F.l1_loss(painted_B3HW, targets_B3HW)
    edges = sum(
        F.l1_loss(painted_B3HW.diff(dim=side), targets_B3HW.diff(dim=side)) for side in (-1, -2)
    )
    return {"total": pixels + edge_weight * edges, "pixels": pixels, "edges": edges}


def mix(
    latents_BCFG: torch.Tensor, noise_BCFG: torch.Tensor, alphas_B: torch.Tensor
) -> torch.Tensor:
    """Noisy latents at the times of some cumulative alphas.

    Not the scheduler's `add_noise`: a solver's looks noise up in the times of its last painting.
    """
    alphas_B111 = alphas_B[:, None, None, None]
    return alphas_B111.sqrt() * latents_BCFG + (1 - alphas_B111).sqrt() * noise_BCFG


def velocity_loss(
    predicted_BCFG: torch.Tensor,
    latents_BCFG: torch.Tensor,
    noise_BCFG: torch.Tensor,
    alphas_B: torch.Tensor,
) -> torch.Tensor:
    """Squared error of velocities sqrt(alpha) noise - sqrt(1 - alpha) latents.

    Salimans and Ho, 2022, appendix D. All times weigh the same: neighbouring patches are so alike
    that layout is decided where a single value has a signal-to-noise ratio of 1/500, and weights
    such as min-SNR's all but silence those times.

    Args:
        predicted_BCFG: velocities that the network found.
        latents_BCFG: clean latents.
        noise_BCFG: the noise that was mixed in.
        alphas_B: cumulative alphas of the times.
    """
    alphas_B111 = alphas_B[:, None, None, None]
    target_BCFG = alphas_B111.sqrt() * noise_BCFG - (1 - alphas_B111).sqrt() * latents_BCFG
    return F.mse_loss(predicted_BCFG, target_BCFG)
