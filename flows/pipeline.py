"""The instances of a recipe: which stage, in which round and leg, needs which others.

An instance is named `stage`, `stage@round` or `stage@round#leg`. A leg owns an instance only if its
overrides, or something upstream that it owns, can change the result, or if the stage is one that
legs are compared by; everything else is shared and runs once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from flows.recipes import ConfigError, nearest, resolve
from stages.contracts import CONTRACTS, Contract

_TOUCH_ALL = ("seed", "precision")
_SHARED_BY_LEGS = frozenset({"rounds", "legs", "name", "description"})


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of an instance: the keyword it comes under, who makes it, which part counts."""

    role: str
    instance: str
    part: str | None = None


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One stage in one round and leg, with the recipe as it sees it."""

    contract: Contract
    round: int | None
    leg: str | None
    recipe: Any
    inputs: tuple[Input, ...]
    idle: bool = False
    """Nothing in the recipe uses what it makes, and it is no end in itself: it runs only by name.
    """

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.contract.name

    @property
    def name(self) -> str:
        """`stage[@round][#leg]`."""
        return instance_name(self.stage, self.round, self.leg)


def instance_name(stage: str, round_: int | None, leg: str | None) -> str:
    """`stage[@round][#leg]`."""
    return (
        stage
        + (f"@{round_}" if round_ is not None else "")
        + (f"#{leg}" if leg is not None else "")
    )


def build(recipe: Any, contracts: Sequence[Contract] = CONTRACTS) -> dict[str, Instance]:
    """All instances of a recipe by name, each after everything it needs.

    Raises:
        ConfigError: an override of a leg or round is wrong, or a need is not part of the recipe.
    """
    return _Builder(recipe, contracts).build()


class _Builder:
    def __init__(self, recipe: Any, contracts: Sequence[Contract]) -> None:
        self.recipe = recipe
        self.contracts = {contract.name: contract for contract in contracts}
        self.legs = list(getattr(recipe, "legs", {}))
        self.count = recipe.rounds.count if hasattr(recipe, "rounds") else 0
        self.instances: dict[str, Instance] = {}
        self.seen: Callable[..., Any] = cache(
            lambda round_, leg: resolve(recipe, round=round_, leg=leg)
        )

    def build(self) -> dict[str, Instance]:
        self._refuse_idle_overrides()
        everything = [c for c in self.contracts.values() if not c.takes_everything]
        for contract in everything:
            if not contract.rounds(self.recipe):
                self._add_all(contract, None)
        for round_ in range(self.count + 1):
            for contract in everything:
                if contract.rounds(self.recipe) and round_ >= contract.first_round:
                    self._add_all(contract, round_)
        self._mark_idle()
        used = [one.name for one in self.instances.values() if not one.idle]
        for contract in self.contracts.values():
            if contract.takes_everything:
                inputs = tuple(Input(role="artifacts", instance=name) for name in used)
                self._put(contract, None, None, inputs)
        return self.instances

    def _mark_idle(self) -> None:
        used: set[str] = set()
        for instance in reversed(self.instances.values()):
            if instance.contract.helper and instance.name not in used:
                self.instances[instance.name] = replace(instance, idle=True)
            else:
                used.update(entry.instance for entry in instance.inputs)

    def _refuse_idle_overrides(self) -> None:
        """An override that nothing would look at is a mistake, not a wish to ignore."""
        for leg in self.legs:
            for key in self.recipe.legs[leg]:
                if key.split(".")[0] in _SHARED_BY_LEGS:
                    raise ConfigError(
                        f"leg {leg!r} overrides {key!r}, which all legs share: set it in the "
                        f"recipe itself."
                    )
        read = {*_TOUCH_ALL, "run"}
        for contract in self.contracts.values():
            read.update(contract.sections if contract.rounds(self.recipe) else ())
        rounds = self.recipe.rounds.overrides if hasattr(self.recipe, "rounds") else {}
        for round_, overrides in rounds.items():
            for key in overrides:
                if key.split(".")[0] not in read:
                    raise ConfigError(
                        f"round {round_} overrides {key!r}, which no stage of a round reads: set "
                        f"it in the recipe itself (prompts and pictures are made once per round "
                        f"only with rounds.fresh_pictures)."
                    )

    def _add_all(self, contract: Contract, round_: int | None) -> None:
        for leg in self.legs or [None]:
            self._add(contract, round_, self.owner(contract, round_, leg))

    def _add(self, contract: Contract, round_: int | None, leg: str | None) -> None:
        recipe = self.seen(round_, leg)
        if (
            not contract.exists(recipe)
            or instance_name(contract.name, round_, leg) in self.instances
        ):
            return
        inputs = []
        for need in contract.needs:
            if not need.when(recipe, round_):
                continue
            made_by, at = self._maker(need, round_)
            name = instance_name(made_by.name, at, self.owner(made_by, at, leg))
            if name not in self.instances:
                raise ConfigError(
                    f"{contract.name} needs {name} ({need.role}), which this recipe does not have."
                )
            inputs.append(Input(role=need.role, instance=name, part=need.part))
        self._put(contract, round_, leg, tuple(inputs))

    def _put(
        self, contract: Contract, round_: int | None, leg: str | None, inputs: tuple[Input, ...]
    ) -> None:
        instance = Instance(
            contract=contract,
            round=round_,
            leg=leg,
            recipe=self.seen(round_, leg),
            inputs=inputs,
        )
        self.instances[instance.name] = instance

    def _maker(self, need: Any, round_: int | None) -> tuple[Contract, int | None]:
        at = (round_ or 0) + need.round_offset
        if at <= 0 and need.at_round_0:
            return self.contracts[need.at_round_0], None
        contract = self.contracts[need.stage]
        return contract, at if contract.rounds(self.recipe) else None

    def owner(self, contract: Contract, round_: int | None, leg: str | None) -> str | None:
        """The leg, if the instance differs (or is compared) by leg; else None."""
        if leg is None:
            return None
        if contract.legs and (round_ or 0) > 0:
            return leg
        recipe = self.seen(round_, leg)
        sections = {key.split(".")[0] for key in self.recipe.legs[leg]}
        if sections & {*contract.sections_of(recipe), *_TOUCH_ALL}:
            return leg
        makers = [self._maker(need, round_) for need in contract.needs if need.when(recipe, round_)]
        owned = any(self.owner(maker, at, leg) is not None for maker, at in makers)
        return leg if owned else None


def select(
    instances: dict[str, Instance],
    *,
    stage: str | None = None,
    round: int | None = None,
    leg: str | None = None,
    from_stage: str | None = None,
    until_stage: str | None = None,
) -> list[Instance]:
    """The instances that a command names, in running order.

    Args:
        instances: all instances of the recipe.
        stage: that stage alone; without `round`, its last round; without `leg`, all its legs.
        round: the round of `stage`.
        leg: the leg of `stage`, or (without `stage`) only what that leg needs.
        from_stage: this stage's first instance and everything after it.
        until_stage: nothing after this stage's last instance.

    What nothing uses (every leg trains on raw labels, say, so nobody needs refined ones) is left
    out unless one of the three stages names it.

    Raises:
        ConfigError: an unknown stage, round or leg, or a combination that selects nothing.
    """
    ordered = list(instances.values())
    known = list(dict.fromkeys(instance.stage for instance in ordered))
    for name in (stage, from_stage, until_stage):
        if name is not None and name not in known:
            raise ConfigError(f"unknown stage {name!r} in this recipe{nearest(name, known)}")
    legs = sorted({instance.leg for instance in ordered if instance.leg})
    if leg is not None and leg not in legs:
        raise ConfigError(f"unknown leg {leg!r} in this recipe{nearest(leg, legs or ['(none)'])}")
    if round is not None and stage is None:
        raise ConfigError("--round goes with --stage.")
    if stage is not None:
        if from_stage or until_stage:
            raise ConfigError(
                "--stage runs one stage alone: it does not go with --from or --until."
            )
        return _one_stage(ordered, stage, round, leg)
    ordered = _without_idle(ordered, named={from_stage, until_stage})
    if leg is not None:
        ordered = _needed_by_leg(ordered, leg)
    names = [instance.stage for instance in ordered]
    for name in (from_stage, until_stage):
        if name is not None and name not in names:
            raise ConfigError(
                f"leg {leg!r} does not need {name}: it has {', '.join(dict.fromkeys(names))}."
            )
    first = names.index(from_stage) if from_stage else 0
    last = len(names) - names[::-1].index(until_stage) if until_stage else len(names)
    if first >= last:
        raise ConfigError(f"--from {from_stage} --until {until_stage} selects nothing.")
    return ordered[first:last]


def _without_idle(ordered: list[Instance], *, named: set[str | None]) -> list[Instance]:
    """Without the instances that nothing uses; those of `named` stages stay, with their needs."""
    wanted = {one.name for one in ordered if not one.idle or one.stage in named}
    for instance in reversed(ordered):
        if instance.name in wanted:
            wanted.update(entry.instance for entry in instance.inputs)
    return [instance for instance in ordered if instance.name in wanted]


def _needed_by_leg(ordered: list[Instance], leg: str) -> list[Instance]:
    """The leg's own instances and everything they are made of (so no report: it needs all legs)."""
    needed = {instance.name for instance in ordered if instance.leg == leg}
    for instance in reversed(ordered):
        if instance.name in needed:
            needed.update(entry.instance for entry in instance.inputs)
    return [instance for instance in ordered if instance.name in needed]


def _one_stage(
    ordered: list[Instance], stage: str, round_: int | None, leg: str | None
) -> list[Instance]:
    found = [instance for instance in ordered if instance.stage == stage]
    rounds = sorted({instance.round for instance in found if instance.round is not None})
    if round_ is not None and round_ not in rounds:
        there = f"it has rounds {', '.join(map(str, rounds))}" if rounds else "it runs once"
        raise ConfigError(f"{stage} has no round {round_} in this recipe: {there}.")
    wanted = round_ if round_ is not None else (rounds[-1] if rounds else None)
    found = [i for i in found if i.round == wanted and (leg is None or i.leg in (None, leg))]
    if not found:
        raise ConfigError(f"{stage} has no leg {leg!r} in this recipe.")
    return found
