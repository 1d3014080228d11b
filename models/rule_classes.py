"""The classes that published rules name, found in any label space of Cityscapes' classes.

    classes = RuleClasses.of(label_space.names)

The papers' tables are those of Cityscapes' 19 classes; here they stand by name. A label space may
lack some of them (the miniature merges wall with fence): they are left out. It may not have others,
because nobody knows how such a rule would treat them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LARGE = frozenset({"road", "sidewalk", "building", "vegetation", "sky", "car"})
SMALL = frozenset(
    {"wall", "fence", "pole", "traffic light", "traffic sign"}
    | {"rider", "truck", "motorcycle", "bicycle"}
)
STUFF = frozenset({"road", "sidewalk", "building", "wall", "fence", "vegetation", "terrain", "sky"})
THINGS = frozenset(
    {"pole", "traffic light", "traffic sign", "person", "rider"}
    | {"car", "truck", "bus", "train", "motorcycle", "bicycle"}
)
CITYSCAPES = STUFF | THINGS
DETAIL = THINGS
"""SAM4UDASS paints the masks of the same classes over the teacher's labels that SeCo prompts."""

RESTORED_IF_SURE: Mapping[str, frozenset[str]] = {
    "road": frozenset({"sidewalk"}),
    "sidewalk": frozenset({"road", "terrain"}),
    "building": frozenset({"sky", "fence"}),
    "wall": frozenset({"vegetation"}),
    "vegetation": frozenset({"terrain", "building"}),
    "person": frozenset({"building"}),
}
"""Third fusion: teacher's class -> fused classes that a confident teacher overrules."""
RESTORED: Mapping[str, frozenset[str]] = {
    "fence": frozenset({"building", "vegetation"}),
    "pole": frozenset({"building", "traffic light", "traffic sign"}),
    "traffic light": frozenset({"building", "pole", "vegetation"}),
    "traffic sign": frozenset({"building", "vegetation", "traffic light"}),
    "car": frozenset({"vegetation"}),
    "bicycle": CITYSCAPES,
}
"""Third fusion: teacher's class -> fused classes that the teacher always overrules."""


@dataclass(frozen=True, kw_only=True)
class RuleClasses:
    """Train ids, in one label space, of the classes that the rules name."""

    road: frozenset[int]
    """One id, or none where the label space has no road; so is `sidewalk`."""
    sidewalk: frozenset[int]
    large: frozenset[int]
    """SAM4UDASS: classes whose masks a small class may win."""
    small: frozenset[int]
    """SAM4UDASS: classes that win a mask with a fifth of a large one's pixels."""
    detail: frozenset[int]
    """SAM4UDASS: classes whose masks are painted over the teacher's labels (second fusion)."""
    restored_if_sure: Mapping[int, frozenset[int]]
    """SAM4UDASS: see `RESTORED_IF_SURE`."""
    restored: Mapping[int, frozenset[int]]
    """SAM4UDASS: see `RESTORED`."""
    stuff: frozenset[int]
    """SeCo: classes that label automatic masks."""
    things: tuple[int, ...]
    """SeCo: classes whose components are prompted, in order."""

    @classmethod
    def of(cls, names: Sequence[str]) -> "RuleClasses":
        """Find the papers' classes among a label space's.

        Args:
            names: in the order of train ids.

        Raises:
            ValueError: a name is none of Cityscapes' 19, or all of them are stuff or all things.
        """
        strange = [name for name in names if name not in CITYSCAPES]
        if strange:
            raise ValueError(
                f"these labels have {', '.join(map(repr, strange))}, which Cityscapes' 19 classes, "
                f"for which the rule is defined, do not have by that name"
            )
        for kind, members in (("stuff", STUFF), ("things", THINGS)):
            if not members & set(names):
                raise ValueError(
                    f"these labels ({', '.join(names)}) have none of the classes that the rule "
                    f"knows as {kind}: {', '.join(sorted(members))}"
                )

        def ids(wanted: Iterable[str]) -> frozenset[int]:
            return frozenset(number for number, name in enumerate(names) if name in set(wanted))

        def pairs(table: Mapping[str, frozenset[str]]) -> dict[int, frozenset[int]]:
            return {number: ids(table[name]) for number, name in enumerate(names) if name in table}

        return cls(
            road=ids({"road"}),
            sidewalk=ids({"sidewalk"}),
            large=ids(LARGE),
            small=ids(SMALL),
            detail=ids(DETAIL),
            restored_if_sure=pairs(RESTORED_IF_SURE),
            restored=pairs(RESTORED),
            stuff=ids(STUFF),
            things=tuple(sorted(ids(THINGS))),
        )
