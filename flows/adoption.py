"""Adopted artifacts: something made elsewhere stands in for a stage's output, whatever its key.

clouds adopt synthesize my_pictures/ --recipe camvid
clouds adopt synthesize --undo --recipe camvid
clouds import theirs.pth --recipe clouds_convnext_l_gta5_released
"""

import datetime
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows import provenance
from flows.digests import key_of
from flows.engine import Engine
from flows.keys import key_part
from flows.pipeline import Instance
from flows.recipes import ConfigError, nearest
from flows.steps import MissingNeedError
from stages.contracts import Summary, labelspace_file

_IMPORTABLE = ("train_source", "self_train")


class _Teller:
    """Progress of which only the notes are told."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        pass

    def advance(self, count: int = 1, **metrics: float) -> None:
        pass

    def note(self, text: str) -> None:
        self._say(text)


def adopt(engine: Engine, instance: Instance, path: Path) -> str:
    """Take over what lies at `path` as the instance's output.

    Returns:
        A line for people.

    Raises:
        ConfigError: it is not what the stage leaves.
    """
    from stages.adoption import adopt as take_over

    engine.store.open()
    if not path.exists():
        raise ConfigError(f"nothing to adopt at {path}.")
    found = {"stage": instance.stage, "adopted": engine.store.outside_digest(path)}
    labels = instance.recipe.data.labels
    silent = _Teller(lambda text: None)
    return _stand_in(
        engine,
        instance,
        path,
        verb="adopt",
        found=found,
        make=lambda out: take_over(instance.stage, path, labels=labels, out=out, progress=silent),
    )


def import_checkpoint(
    engine: Engine, instance: Instance, path: Path, *, say: Callable[[str], None]
) -> str:
    """Convert a published system's checkpoint into one of ours, as the instance's output.

    Args:
        engine: of the recipe whose `segmenter` the file is a checkpoint of.
        instance: of train_source or self_train.
        path: the authors' file.
        say: told the report of all names, line by line.

    Returns:
        A line for people.

    Raises:
        ConfigError: another stage, no such file, or a file that does not fit as a whole.
    """
    from stages.adoption import import_checkpoint as convert

    if instance.stage not in _IMPORTABLE:
        raise ConfigError(
            f"{instance.stage} leaves no checkpoint to import{nearest(instance.stage, _IMPORTABLE)}"
        )
    store, recipe = engine.store, instance.recipe
    store.open()
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint file {path}.")
    step = recipe.train_source.steps + (instance.round or 0) * recipe.self_train.steps
    labels = labelspace_file(recipe.data.labels)
    found = {
        "stage": instance.stage,
        "imported": store.outside_digest(path),
        "segmenter": key_part(recipe.segmenter),
        "labels": store.outside_digest(labels) if labels.exists() else "missing",
        "step": step,
    }
    return _stand_in(
        engine,
        instance,
        path,
        verb="import",
        found=found,
        make=lambda out: convert(
            path,
            segmenter=recipe.segmenter,
            labels=recipe.data.labels,
            step=step,
            out=out,
            progress=_Teller(say),
        ),
    )


def _stand_in(
    engine: Engine,
    instance: Instance,
    path: Path,
    *,
    verb: str,
    found: Mapping[str, Any],
    make: Callable[[Path], Summary],
) -> str:
    """Commit what `make` writes, and let it stand in for the instance's own output."""
    store, name = engine.store, instance.name
    done = f"{verb}ed"
    key, clock = key_of(found), time.perf_counter()
    with store.lock(name, key, waiting=lambda who: None):
        staging = store.staging(name, key)
        if staging.exists():
            store.trash(staging)
        staging.mkdir(parents=True)
        try:
            summary = make(staging)
        except (ValueError, OSError) as error:
            store.trash(staging)
            raise ConfigError(f"cannot {verb} {path} as {name}: {error}") from error
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
            "summary": {"text": f"{done}: {summary.text}", "numbers": dict(summary.numbers)},
            "work": {},
            "started": now,
            "finished": now,
            "seconds": round(time.perf_counter() - clock, 3),
            **provenance.facts(),
        }
        store.commit(name, key, manifest)
        store.pin(name, key)
    undone = engine.command_to_undo(name)
    return f"{name}: {done} {summary.text} from {path} (key {key}). Undo with: {undone}"


def undo(engine: Engine, instance: Instance) -> str:
    """Let the instance's own output count again.

    Raises:
        MissingNeedError: nothing was adopted for it.
    """
    if instance.name not in engine.store.pins():
        raise MissingNeedError(f"nothing is adopted for {instance.name}.")
    engine.store.pin(instance.name, None)
    return f"{instance.name}: its own output counts again."
