"""What the miniature world is made of: Cityscapes label ids, the merged classes, their words.

The renderer draws with the raw label ids of Cityscapes (cityscapesScripts, `labels.py`). At 64x128
pixels some
of the 19 evaluation classes cannot be told apart (a rider's torso is four pixels, a wall and a
fence differ by texture alone), so six of them are merged and 13 remain. The label space file
`stages/labelspaces/miniature.yaml` states the same merge for the rest of the pipeline; a test holds
the two together.
"""

from __future__ import annotations

import numpy as np

UNLABELED, EGO_VEHICLE, STATIC = 0, 1, 4
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE = 7, 8, 11, 12, 13, 17
TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TERRAIN, SKY = 19, 20, 21, 22, 23
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 24, 25, 26, 27, 28, 31, 32, 33

IGNORE_ID = 255

MERGED_CLASSES: tuple[tuple[int, ...], ...] = (
    (ROAD,),
    (SIDEWALK,),
    (BUILDING,),
    (WALL, FENCE),
    (POLE,),
    (TRAFFIC_LIGHT, TRAFFIC_SIGN),
    (VEGETATION,),
    (TERRAIN,),
    (SKY,),
    (PERSON, RIDER),
    (CAR,),
    (TRUCK, BUS, TRAIN),
    (MOTORCYCLE, BICYCLE),
)
"""Train id -> the Cityscapes label ids that it stands for."""

THINGS = (PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE)
"""Label ids that carry instances, as in Cityscapes."""

WORDS: dict[int, tuple[str, ...]] = {
    ROAD: ("road", "street", "asphalt"),
    SIDEWALK: ("sidewalk", "pavement"),
    BUILDING: ("building", "house", "facade"),
    WALL: ("wall",),
    FENCE: ("fence", "railing"),
    POLE: ("pole", "lamp post"),
    TRAFFIC_LIGHT: ("traffic light",),
    TRAFFIC_SIGN: ("traffic sign", "road sign"),
    VEGETATION: ("vegetation", "trees", "tree", "bush"),
    TERRAIN: ("terrain", "grass", "ground"),
    SKY: ("sky",),
    PERSON: ("person", "pedestrian"),
    RIDER: ("rider", "cyclist"),
    CAR: ("car", "vehicle"),
    TRUCK: ("truck", "lorry"),
    BUS: ("bus",),
    TRAIN: ("train", "tram"),
    MOTORCYCLE: ("motorcycle", "motorbike"),
    BICYCLE: ("bicycle", "bike"),
}
"""Words by which captions name a label; the first is the usual one."""


def train_id_table() -> np.ndarray:
    """Lookup table [256] uint8 from Cityscapes label id to miniature train id (255 = ignore)."""
    table = np.full(256, IGNORE_ID, dtype=np.uint8)
    for train_id, label_ids in enumerate(MERGED_CLASSES):
        table[list(label_ids)] = train_id
    return table
