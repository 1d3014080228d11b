"""From a stage's spec (plain JSON, see `stages/launch.py`) to the stage, ready to be called.

opened = open_spec(spec)
opened.verb.run(opened.config, out=opened.out, progress=progress, **opened.inputs)
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from stages.children import Spec
from stages.config import StageConfig
from stages.contracts import Progress
from stages.shards import ShardJob


class Opened(NamedTuple):
    """A spec's stage, ready to be called."""

    verb: ModuleType
    config: StageConfig
    out: Path
    inputs: Mapping[str, Any]

    def shards(self, progress: Progress) -> ShardJob:
        """The stage's work, shard by shard."""
        return self.verb.shards(self.config, progress=progress, **self.inputs)


def open_spec(spec: Spec) -> Opened:
    """Import the stage of a spec and validate its settings."""
    config = StageConfig(
        _imported(spec["recipe_class"]).model_validate(spec["recipe"]),
        stage=spec["stage"],
        sections=tuple(spec["sections"]),
        round=spec["round"],
        leg=spec["leg"],
    )
    inputs = {role: _as_paths(value) for role, value in spec["inputs"].items()}
    return Opened(importlib.import_module(spec["verb"]), config, Path(spec["out"]), inputs)


def _imported(dotted: str) -> Any:
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


def _as_paths(value: str | Mapping[str, str]) -> Path | dict[str, Path]:
    if isinstance(value, Mapping):
        return {name: Path(path) for name, path in value.items()}
    return Path(value)
