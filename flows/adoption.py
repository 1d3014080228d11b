"""Adopted artifacts: something made elsewhere stands in for a stage's output, whatever its key.

clouds adopt synthesize my_pictures/ --recipe camvid
clouds adopt synthesize --undo --recipe camvid
"""

import datetime
import time
from pathlib import Path

from flows import provenance
from flows.engine import Engine, MissingNeedError
from flows.pipeline import Instance
from flows.recipes import ConfigError
from flows.store import key_of


class _Silent:
    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        pass

    def advance(self, count: int = 1, **metrics: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def adopt(engine: Engine, instance: Instance, path: Path) -> str:
    """Take over what lies at `path` as the instance's output.

    Returns:
        A line for people.

    Raises:
        ConfigError: it is not what the stage leaves.
    """
    from stages.adoption import adopt as take_over

    store, name = engine.store, instance.name
    store.open()
    if not path.exists():
        raise ConfigError(f"nothing to adopt at {path}.")
    found = {"stage": instance.stage, "adopted": store.outside_digest(path)}
    key, clock = key_of(found), time.perf_counter()
    with store.lock(name, key, waiting=lambda who: None):
        staging = store.staging(name, key)
        if staging.exists():
            store.trash(staging)
        staging.mkdir(parents=True)
        try:
            summary = take_over(instance.stage, path, out=staging, progress=_Silent())
        except (ValueError, OSError) as error:
            store.trash(staging)
            raise ConfigError(f"cannot adopt {path} as {name}: {error}") from error
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        manifest = {
            "instance": name,
            "stage": instance.stage,
            "round": instance.round,
            "leg": instance.leg,
            "key": key,
            "ingredients": found,
            "origin": str(path.absolute()),
            "inputs": {},
            "config": {},
            "recipe": engine.recipe.name,
            "seed": engine.recipe.seed,
            "precision": engine.recipe.precision,
            "summary": {"text": f"adopted: {summary.text}", "numbers": dict(summary.numbers)},
            "work": {},
            "started": now,
            "finished": now,
            "seconds": round(time.perf_counter() - clock, 3),
            **provenance.facts(),
        }
        store.commit(name, key, manifest)
        store.pin(name, key)
    return f"{name}: adopted {summary.text} from {path} (key {key}); undo with --undo."


def undo(engine: Engine, instance: Instance) -> str:
    """Let the instance's own output count again.

    Raises:
        MissingNeedError: nothing was adopted for it.
    """
    if instance.name not in engine.store.pins():
        raise MissingNeedError(f"nothing is adopted for {instance.name}.")
    engine.store.pin(instance.name, None)
    return f"{instance.name}: its own output counts again."
