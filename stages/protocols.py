"""Protocols by name: what a published table fixed when it judged a segmenter.

The same checkpoint moves by points with the test resolution alone, two maps of Mapillary differ in
11 ids, tools count absent classes differently: a number without its protocol says little.

    clouds --stage evaluate --set evaluate.protocol=rein

A protocol fills the settings of section `evaluate` that nobody set, and the label maps of targets
that name none. What is set otherwise shows in the protocol's name. No torch here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OWN = "own settings"
"""Name where no protocol is asked for."""

WHOLE_SPACE = "cityscapes19"
"""Label space whose classes the subsets below are of."""

LEFT_OUT: Mapping[int, tuple[int, ...]] = {16: (9, 14, 16), 13: (3, 4, 5, 9, 14, 16)}
"""Train ids that means over 16 and 13 of the 19 classes leave out (tables from SYNTHIA: terrain,
truck and train do not occur in it; the 13 also without wall, fence and pole). Only the mean
changes: pixels of these classes still count against the others, as in DAFormer."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a published table was made."""

    about: str
    """Whose it is, in one sentence."""
    settings: Mapping[str, Any]
    """Fields of section `evaluate` that it fixes."""
    label_maps: Mapping[str, str] = field(default_factory=dict)
    """Layout -> raw-id map of targets in it."""


_ONE_LOOK = {"flip": False, "scales": [1.0]}
_MMSEG = {
    **_ONE_LOOK,
    "label_resolution": "native",
    "mode": "slide",
    "absent": "mmseg",
    "resize": "plain",
}
_WIDE = {"short_side": 512, "long_side": 1024}
_OWN_SIZE = {"short_side": None, "long_side": None}

PROTOCOLS: Mapping[str, Protocol] = {
    "clouds_released": Protocol(
        about="CLOUDS' released code: picture and label at short side 1024, whole pictures.",
        settings={
            **_ONE_LOOK,
            "short_side": 1024,
            "long_side": None,
            "layouts": {},
            "resize": "antialias",
            "label_resolution": "network",
            "mode": "whole",
            "absent": "detectron2",
            "classes": "all",
        },
        label_maps={"mapillary": "mapillary_h"},
    ),
    "rein": Protocol(
        about="Rein's configs: 1024x512 in windows, BDD100K at its own size, Mapillary halved.",
        settings={
            **_MMSEG,
            **_WIDE,
            "layouts": {
                "bdd100k": _OWN_SIZE,
                "mapillary": {**_WIDE, "halve": True},
                "acdc": {"short_side": 540, "long_side": 960},
            },
            "window": 512,
            "stride": 341,
            "classes": "all",
        },
        label_maps={"mapillary": "mapillary_r"},
    ),
    "vltseg": Protocol(
        about="VLTSeg from synthetic sources: every set at 1024x512, in windows at stride 426.",
        settings={
            **_MMSEG,
            **_WIDE,
            "layouts": {},
            "window": 512,
            "stride": 426,
            "classes": "all",
        },
        label_maps={"mapillary": "mapillary_h"},
    ),
    "high_resolution": Protocol(
        about="SoMA, tqdm, MFuser: 2048x1024 in windows; BDD100K and ACDC at their own size.",
        settings={
            **_MMSEG,
            "short_side": 1024,
            "long_side": 2048,
            "layouts": {"bdd100k": _OWN_SIZE, "acdc": _OWN_SIZE},
            "window": 512,
            "stride": 341,
            "classes": "all",
        },
        label_maps={"mapillary": "mapillary_r"},
    ),
    "native": Protocol(
        about="Whole pictures at their own size, absent classes as cityscapesScripts counts them.",
        settings={
            **_ONE_LOOK,
            **_OWN_SIZE,
            "layouts": {},
            "resize": "antialias",
            "label_resolution": "native",
            "mode": "whole",
            "absent": "cityscapes",
            "classes": "all",
        },
        label_maps={"mapillary": "mapillary_h"},
    ),
}


def protocol_name(
    protocol: str | None,
    settings: Mapping[str, Any],
    maps: Iterable[tuple[str, str | None]] = (),
) -> str:
    """A protocol's name with all that was set otherwise: "rein, changed: stride 256".

    Where no protocol was asked for, with what makes of one look several: "own settings, flip on".

    Args:
        protocol: a name of `PROTOCOLS`; None: no protocol was asked for.
        settings: plain values of section `evaluate`.
        maps: layout and label map of every target.
    """
    if protocol is None:
        return ", ".join([OWN, *_changes(settings, _ONE_LOOK)])
    fixed = PROTOCOLS[protocol]
    changed = _changes(settings, fixed.settings)
    changed += sorted(
        {
            f"{layout} by map {label_map}"
            for layout, label_map in maps
            if label_map != fixed.label_maps.get(layout, label_map)
        }
    )
    return f"{protocol}, changed: {', '.join(changed)}" if changed else protocol


def _changes(settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {_say(settings[name])}"
        for name, value in sorted(fixed.items())
        if _plain(settings[name]) != _plain(value)
    ]


def say_layouts(layouts: Mapping[str, Mapping[str, Any]]) -> str:
    """Sizes of single layouts in words: "bdd100k own size; mapillary short side 512, halved"."""
    return "; ".join(f"{layout} {_say_size(size)}" for layout, size in sorted(layouts.items()))


def _say_size(size: Mapping[str, Any]) -> str:
    words = [
        f"{name.replace('_', ' ')} {size[name]}"
        for name in ("short_side", "long_side")
        if size.get(name) is not None
    ]
    return ", ".join((words or ["own size"]) + (["halved first"] if size.get("halve") else []))


def _say(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({say_layouts(value)})" if value else "(none)"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " and ".join(f"{entry:g}" for entry in value)
    return "none" if value is None else str(value)


def _plain(value: Any) -> Any:
    """Sizes without the fields that say nothing, so that spelled-out defaults are no change."""
    if not isinstance(value, Mapping):
        return value
    return {
        layout: {name: entry for name, entry in size.items() if entry}
        for layout, size in value.items()
    }
