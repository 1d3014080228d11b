"""The artifacts behind a report: instances, their manifests, who came from whom, and the picture of
the pipeline as a grid of boxes and lines.

A manifest may lack fields (an adopted artifact, an older version): what is there is shown.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from stages.contracts import CONTRACTS, STAGE_NAMES

_NAME = re.compile(r"^(?P<stage>[a-z_]+)(?:@(?P<round>\d+))?(?:#(?P<leg>\w+))?$")
_DOES = {contract.name: contract.does for contract in CONTRACTS}

State = Literal["ran", "cached", "shared", "unknown"]
"""shared: another leg's artifact serves here as well."""

BOX_WIDTH, BOX_HEIGHT = 176, 64
_GAP_X, _GAP_Y, _LANE_GAP, _MARGIN = 44, 14, 18, 30
_LANE_TITLE, _TRACKS = 26, 22


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One artifact: a stage in a round and leg, its folder and what its manifest tells."""

    name: str
    """`stage[@round][#leg]`."""
    stage: str
    round: int | None
    leg: str | None
    folder: Path
    manifest: Mapping[str, Any]
    """Empty where the artifact has none."""

    @property
    def anchor(self) -> str:
        """A fragment id for links inside the page."""
        return "made-" + re.sub(r"\W", "-", self.name)

    @property
    def does(self) -> str:
        """What the stage does, in one sentence."""
        return _DOES.get(self.stage, "")

    @property
    def key(self) -> str:
        """The store's key, or the folder's name where the manifest has none."""
        return str(self.manifest.get("key") or self.folder.name)

    @property
    def seconds(self) -> float | None:
        """How long the stage took when it ran, in seconds."""
        value = self.manifest.get("seconds")
        return float(value) if isinstance(value, int | float) else None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the instances this one was made from, sorted."""
        given = self.manifest.get("inputs") or {}
        made_by = {one.get("instance") for one in given.values() if isinstance(one, Mapping)}
        return tuple(sorted(str(name) for name in made_by if name))

    @property
    def finished(self) -> str:
        """When it was made, in a few letters ("20 Nov 19:24"); empty where it is not recorded."""
        try:
            instant = datetime.fromisoformat(str(self.manifest.get("finished")))
        except ValueError:
            return ""
        return f"{instant.day} {instant:%b %H:%M}"

    def made_from(self, role: str) -> str | None:
        """Name of the instance that came in under `role`, or None."""
        given = (self.manifest.get("inputs") or {}).get(role)
        return given.get("instance") if isinstance(given, Mapping) else None

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the config the artifact was made with; empty where it is not recorded."""
        config = self.manifest.get("config") or {}
        section = config.get(name) if isinstance(config, Mapping) else None
        return section if isinstance(section, Mapping) else {}


@dataclass(frozen=True, kw_only=True)
class Box:
    """One instance in the picture of the pipeline; sizes in SVG units."""

    instance: Instance
    x: int
    y: int
    row: int
    """Row within its lane."""
    state: State


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The picture of the pipeline."""

    width: int
    height: int
    boxes: tuple[Box, ...]
    lines: tuple[str, ...]
    """SVG path data of the connections."""
    lanes: tuple[tuple[str, int], ...]
    """Title and height of the baseline of each lane."""


@dataclass
class _Grid:
    """Column and row of every instance of one lane."""

    column: dict[str, int] = field(default_factory=dict)
    row: dict[str, int] = field(default_factory=dict)


def read_instances(artifacts: Mapping[str, Path]) -> dict[str, Instance]:
    """The instances by name, in the order of the pipeline.

    Raises:
        ValueError: a name is not `stage[@round][#leg]` with a known stage, or a manifest is not
            JSON.
    """
    instances = {}
    for name, folder in artifacts.items():
        match = _NAME.match(name)
        if not match or match["stage"] not in STAGE_NAMES:
            raise ValueError(
                f"artifact {name!r}: expected stage[@round][#leg], the stages are "
                f"{', '.join(STAGE_NAMES)}."
            )
        manifest = Path(folder) / "manifest.json"
        instances[name] = Instance(
            name=name,
            stage=match["stage"],
            round=int(match["round"]) if match["round"] else None,
            leg=match["leg"],
            folder=Path(folder),
            manifest=read_json(manifest) if manifest.is_file() else {},
        )
    order = sorted(
        instances.values(), key=lambda one: (one.round or 0, STAGE_NAMES.index(one.stage))
    )
    return {one.name: one for one in order}


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from an artifact.

    Raises:
        ValueError: it is none; names the file and the way out.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); make it again: clouds --force {path.parents[1].name}"
        ) from None
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def read_statistics(instance: Instance | None) -> Mapping[str, Any]:
    """`statistics.json` of an artifact; empty where it has none, or there is no artifact."""
    path = instance.folder / "statistics.json" if instance else None
    return read_json(path) if path and path.is_file() else {}


def state_of(instance: Instance, instances: Iterable[Instance]) -> State:
    """ran, cached, shared or unknown: how the run that led to this page came by the artifact.

    The newest artifact's run counts as this run: a report is made anew only when something before
    it was. Manifests without a run id leave it unknown.
    """
    if instance.manifest.get("instance", instance.name) != instance.name:
        return "shared"
    newest = max(instances, key=lambda one: str(one.manifest.get("started") or ""))
    this_run = newest.manifest.get("run_id")
    if not this_run or not instance.manifest.get("run_id"):
        return "unknown"
    return "ran" if instance.manifest["run_id"] == this_run else "cached"


def ancestors(name: str, instances: Mapping[str, Instance]) -> set[str]:
    """Names of everything an instance was made from, near and far."""
    seen: set[str] = set()
    waiting = list(instances[name].inputs) if name in instances else []
    while waiting:
        one = waiting.pop()
        if one in instances and one not in seen:
            seen.add(one)
            waiting.extend(instances[one].inputs)
    return seen


def draw(instances: Mapping[str, Instance]) -> Drawing:
    """Lay the pipeline out: one lane for what runs once, one for each round, time from left to
    right.

    A connection that a longer way already shows is left out.
    """
    lanes = sorted({one.round or 0 for one in instances.values()})
    boxes: dict[str, Box] = {}
    titles = []
    top = 8
    for lane in lanes:
        head = _LANE_TITLE + (_TRACKS if lane != lanes[0] else 0)
        members = [one for one in instances.values() if (one.round or 0) == lane]
        titles.append((f"Round {lane}" if lane else "Once", top + 16))
        grid = _lay_out(members, instances)
        for one in members:
            boxes[one.name] = Box(
                instance=one,
                x=_MARGIN + grid.column[one.name] * (BOX_WIDTH + _GAP_X),
                row=grid.row[one.name],
                y=top + head + grid.row[one.name] * (BOX_HEIGHT + _GAP_Y),
                state=state_of(one, instances.values()),
            )
        rows = 1 + max(grid.row.values())
        top += head + rows * BOX_HEIGHT + (rows - 1) * _GAP_Y + _LANE_GAP
    everything = list(boxes.values())
    lines = [
        _route(boxes[source], box, everything, level % 4)
        for level, box in enumerate(everything)
        for source in _direct(box.instance.name, instances)
    ]
    return Drawing(
        width=max((box.x for box in boxes.values()), default=0) + BOX_WIDTH + _MARGIN,
        height=top,
        boxes=tuple(boxes.values()),
        lines=tuple(lines),
        lanes=tuple(titles),
    )


def _direct(name: str, instances: Mapping[str, Instance]) -> list[str]:
    """Inputs that are not reached through another input as well."""
    near = [one for one in instances[name].inputs if one in instances]
    far = {one: ancestors(one, instances) for one in near}
    return [one for one in near if not any(one in far[other] for other in near if other != one)]


def _lay_out(members: Sequence[Instance], instances: Mapping[str, Instance]) -> _Grid:
    names = {one.name for one in members}
    depth: dict[str, int] = {}
    for one in members:  # in the order of the pipeline: inputs come first
        before = [depth[source] for source in one.inputs if source in names and source in depth]
        depth[one.name] = 1 + max(before, default=-1)
    grid = _Grid()
    for one in members:  # legs stand in one column
        grid.column[one.name] = max(depth[peer.name] for peer in members if peer.stage == one.stage)
    taken: set[tuple[int, int]] = set()
    for one in sorted(members, key=lambda one: grid.column[one.name]):
        before = [grid.row[name] for name in _direct(one.name, instances) if name in grid.row]
        row = min(before, default=0)
        while (grid.column[one.name], row) in taken:
            row += 1
        taken.add((grid.column[one.name], row))
        grid.row[one.name] = row
    return grid


def _route(source: Box, target: Box, boxes: Iterable[Box], level: int) -> str:
    """A line through the gutters between the boxes, from the right of one to the left of another.

    Args:
        source: where it starts.
        target: where it ends; in the same lane, or in a later one.
        boxes: all, none of which the line may cross.
        level: which of the tracks above the target's lane it may use, 0 the lowest.
    """
    x0, y0 = source.x + BOX_WIDTH, source.y + BOX_HEIGHT // 2
    x1, y1 = target.x, target.y + BOX_HEIGHT // 2
    out = x0 + _GAP_X // 2 + _aside(source)
    into = x1 - _GAP_X // 2 + _aside(target)
    if x1 > x0 and _free(out, x1, y1, boxes):
        corners = [(x0, y0), (out, y0), (out, y1), (x1, y1)]
    else:
        top = min(box.y for box in boxes if _lane(box) == _lane(target))
        track = top - 7 - 5 * level
        corners = [(x0, y0), (out, y0), (out, track), (into, track), (into, y1), (x1, y1)]
    return _rounded(corners)


def _aside(box: Box) -> int:
    """Neighbouring rows keep their lines apart in a gutter."""
    return 5 * (box.row % 4) - 7


def _lane(box: Box) -> int:
    return box.instance.round or 0


def _free(x0: int, x1: int, y: int, boxes: Iterable[Box]) -> bool:
    """Whether a level line from x0 to x1 meets no box."""
    return not any(
        box.x < x1 and box.x + BOX_WIDTH > x0 and box.y <= y <= box.y + BOX_HEIGHT for box in boxes
    )


def _rounded(corners: Sequence[tuple[int, int]], radius: int = 7) -> str:
    """SVG path data of a right-angled line with round corners."""
    path = f"M{corners[0][0]} {corners[0][1]}"
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        start, end = _towards(corner, before, radius), _towards(corner, after, radius)
        path += f"L{start[0]} {start[1]}Q{corner[0]} {corner[1]} {end[0]} {end[1]}"
    return path + f"L{corners[-1][0]} {corners[-1][1]}"


def _towards(point: tuple[int, int], other: tuple[int, int], reach: int) -> tuple[int, int]:
    """The point moved by `reach` (at most half the way) along an axis."""

    def moved(here: int, there: int) -> int:
        way = there - here
        return here + max(-reach, min(reach, way // 2 if way > 0 else -(-way // 2)))

    return moved(point[0], other[0]), moved(point[1], other[1])
