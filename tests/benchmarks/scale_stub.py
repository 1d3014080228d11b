"""Stub stages for `scale.py`: pictures of a few bytes in shards, and a label for each."""

import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flows.engine import Engine
from flows.store import Store
from stages.config import StageConfig
from stages.contracts import Contract, Need, Progress, Summary
from stages.run_config import RoundsConfig, RunConfig
from stages.section import NOT_IN_KEY, Section
from stages.shards import Row, ShardJob, Work, read_index, write_shards


class StubConfig(Section):
    """The stub."""

    count: int = Field(1000, gt=0)
    """Pictures."""


class StubRecipe(Section):
    """The stub's recipe."""

    name: str = "scale"
    """Name."""
    seed: int = 0
    """Seed."""
    precision: str = "fp32"
    """Precision."""
    stub: StubConfig = StubConfig()
    rounds: RoundsConfig = RoundsConfig(count=0)
    run: Annotated[RunConfig, NOT_IN_KEY] = RunConfig()


CONTRACTS = (
    Contract(
        name="pictures",
        version=1,
        verb="tests.benchmarks.scale_stub",
        does="Pictures of a few bytes.",
        sections=("stub",),
    ),
    Contract(
        name="labels",
        version=1,
        verb="tests.benchmarks.scale_stub",
        does="A label for each.",
        sections=("stub",),
        needs=(Need(role="pictures", stage="pictures"),),
    ),
)


def engine(root: Path, *, count: int) -> Engine:
    """The real engine for the stub's stages."""
    recipe = StubRecipe(stub=StubConfig(count=count))
    return Engine(recipe=recipe, store=Store(root), contracts=CONTRACTS)


def run(
    config: StageConfig, *, out: Path, progress: Progress, pictures: Path | None = None
) -> Summary:
    """Write a file of some bytes for every item: no work, all of the bookkeeping."""

    def at_work(progress: Progress) -> Work:
        def work(ids, folder: Path) -> list[Row]:
            for name in ids:
                (folder / f"{name}.png").write_bytes(name.encode())
                progress.advance()
            return [{"id": name, "file": f"{name}.png"} for name in ids]

        return work

    if pictures is None:
        ids = [f"p{number:07d}" for number in range(config.stub.count)]
    else:
        ids = [row["id"] for row in read_index(pictures)]
    job = ShardJob(items=ids, shard_size=1000, unit="pictures", open=at_work)
    num_shards = write_shards(out, job, progress=progress)
    return Summary(text=f"{len(ids)} files in {num_shards} shards")


class Quiet:
    """A listener that says nothing (errors raise)."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    note = say

    def stage_started(self, instance: Any, resumes: str | None) -> "Quiet":
        return self

    def stage_finished(self, instance: Any, result: Any) -> None:
        pass

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        pass

    def advance(self, count: int = 1, **metrics: float) -> None:
        pass
