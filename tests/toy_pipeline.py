"""A toy pipeline with every feature of the engine (rounds, legs, shards, parts), without torch."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flows.engine import Engine
from flows.recipes import validate
from flows.store import Store
from stages.contracts import Contract, Need
from stages.launch import execute, run_child
from stages.run_config import RoundsConfig, RunConfig
from stages.section import NOT_IN_KEY, Section


class ToyConfig(Section):
    """The numbers."""

    count: int = 12
    """How many."""
    shard_size: int = 3
    """Per shard."""
    modulus: int = 100
    """Largest number, plus one."""
    workers: Annotated[int, NOT_IN_KEY] = 1
    """Cannot change the result."""


class TotalConfig(Section):
    """The sum."""

    unit: int = 1
    """Rounded down to multiples of this."""


class ShareConfig(Section):
    """A leg's share."""

    factor: int = 2
    """Multiplies the sum."""


class ToyRecipe(Section):
    """The toy's recipe."""

    name: str = "toy"
    """Name."""
    seed: int = 0
    """Seed."""
    precision: str = "fp32"
    """Precision."""
    toy: ToyConfig = ToyConfig()
    total: TotalConfig = TotalConfig()
    share: ShareConfig = ShareConfig()
    rounds: RoundsConfig = RoundsConfig()
    legs: dict[str, dict[str, Any]] = Field({})
    run: Annotated[RunConfig, NOT_IN_KEY] = RunConfig()


CONTRACTS = (
    Contract(
        name="numbers",
        version=1,
        verb="tests.toy_numbers",
        does="Numbers.",
        sections=("toy",),
        units=lambda recipe: recipe.toy.count,
    ),
    Contract(
        name="sum",
        version=1,
        verb="tests.toy_sum",
        does="Their sum.",
        sections=("total",),
        needs=(Need(role="numbers", stage="numbers"),),
    ),
    Contract(
        name="share",
        version=1,
        verb="tests.toy_share",
        does="A leg's share.",
        sections=("share",),
        needs=(
            Need(role="sum", stage="sum"),
            Need(role="before", stage="share", round_offset=-1, at_round_0="sum"),
        ),
        rounds=lambda recipe: True,
        legs=True,
        numeric=True,
    ),
    Contract(
        name="report", version=1, verb="tests.toy_share", does="Everything.", takes_everything=True
    ),
)


def engine(root: Path, *, force: frozenset[str] = frozenset(), **settings: Any) -> Engine:
    """An engine for the toy; settings are sections as dicts."""
    recipe = validate(settings, model=ToyRecipe, place="toy")
    return Engine(recipe=recipe, store=Store(root), contracts=CONTRACTS, force=force)


def in_process(spec: Any, progress: Any, lock: int) -> Any:
    """The executor of local runs."""
    return execute(spec, progress, keep_fds=(lock,))


def in_child(spec: Any, progress: Any, lock: int) -> Any:
    """The executor of Prefect runs."""
    return run_child(spec, progress, keep_fds=(lock,))


class Ears:
    """A listener that remembers what it was told."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.cached: list[str] = []
        self.said: list[str] = []
        self.started: list[tuple[str, str | None]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def stage_started(self, instance: Any, resumes: str | None) -> "Ears":
        self.started.append((instance.name, resumes))
        return self

    def stage_finished(self, instance: Any, result: Any) -> None:
        (self.cached if result.cached else self.ran).append(instance.name)

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        self.said.append(f"{done}/{total} {unit}")

    def advance(self, count: int = 1, **metrics: float) -> None:
        pass

    def note(self, text: str) -> None:
        self.said.append(text)
