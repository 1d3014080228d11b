"""One run: check, then every selected instance in order, recorded as it goes.

The same procedure serves the command line and the Prefect flow; only listener and executor differ.
"""

import datetime
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flows.check import preflight
from flows.engine import Engine
from flows.pipeline import Instance, select
from flows.recipes import load_recipe
from flows.steps import Executor, Listener, Result, StageError
from flows.store import Store


def arrange(
    *,
    recipe: str,
    artifacts: str,
    overrides: Sequence[str] = (),
    force: Sequence[str] = (),
    **selection: Any,
) -> tuple[Engine, list[Instance]]:
    """The engine and the selected instances that a command or a flow's parameters name.

    Args:
        recipe: a shipped recipe's name, or a file.
        artifacts: the folder of all artifacts.
        overrides: "dotted.key=value" each.
        force: stages to run even if they are done.
        selection: stage, round, leg, from_stage, until_stage of `flows.pipeline.select`.

    Raises:
        ConfigError: anything of this is unknown or wrong.
    """
    engine = Engine(
        recipe=load_recipe(recipe, overrides),
        store=Store(Path(artifacts)),
        force=frozenset(force),
        options=options_of(recipe, artifacts, overrides),
    )
    return engine, select(engine.instances, **selection)


def options_of(recipe: str, artifacts: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """What advice must repeat for a command to mean this recipe, with its settings and folder."""
    words = ["--recipe", recipe]
    for override in overrides:
        words += ["--set", override]
    if artifacts != "artifacts":
        words += ["--artifacts", artifacts]
    return tuple(words)


def _directly(_instance: Instance, run_it: Callable[[], Result]) -> Result:
    return run_it()


def run(
    engine: Engine,
    selected: Sequence[Instance],
    *,
    listener: Listener,
    execute: Executor,
    overrides: Sequence[str] = (),
    study: str | None = None,
    around: Callable[[Instance, Callable[[], Result]], Result] = _directly,
) -> dict[str, Any]:
    """Run the selected instances; what is done already is skipped.

    Args:
        engine: of the recipe.
        selected: the instances, in running order.
        listener: told what happens.
        execute: runs a stage, in this process or a child.
        overrides: for the record.
        study: for the record, which study the run is a part of: `latest/` does not follow it.
        around: calls what runs an instance (again, if a retry is worth it), for example as a task.

    Returns:
        The run's record, as written to `artifacts/runs/`.

    Raises:
        MissingNeedError, StageError, ConfigError: nothing that was finished is lost.
    """
    engine.store.open()
    steps = engine.plan(selected)
    pending = [step.instance for step in steps if step.action != "skip"]
    if pending:
        preflight(pending, store=engine.store, listener=listener)
    record = _new_record(engine, overrides, study)
    engine.run_id = record["id"]
    if pending:  # from now on nobody clears away what this run builds on
        record["uses"] = engine.found_keys()
        engine.store.write_run(record)
    try:
        for instance in selected:
            run_it = partial(engine.run_one, instance, listener=listener, execute=execute)
            result = around(instance, run_it)
            note_result(record, engine, result)
            if not result.cached:
                engine.store.write_run(record)
        record["status"] = "completed"
    except StageError as error:
        record["status"] = "failed"
        record["failed"] = error.instance
        raise
    except Exception:
        record["status"] = "failed"
        raise
    except BaseException:  # Ctrl-C, or Prefect's signal that the run was cancelled
        record["status"] = "interrupted"
        raise
    finally:
        record["finished"] = _now()
        if pending or record["status"] != "completed":
            engine.store.write_run(record)
    return record


def _new_record(engine: Engine, overrides: Sequence[str], study: str | None) -> dict[str, Any]:
    started = _now()
    stamp = started.replace(":", "").replace("-", "").split(".")[0]
    return {
        "id": f"{stamp}-{uuid.uuid4().hex[:6]}",
        "recipe": engine.recipe.name,
        "overrides": list(overrides),
        "study": study,
        "uses": [],
        "config": engine.recipe.model_dump(mode="json"),
        "prefect_run_id": engine.prefect_run_id,
        "started": started,
        "finished": None,
        "status": "running",
        "instances": {},
    }


def note_result(record: dict[str, Any], engine: Engine, result: Result) -> None:
    """Add an instance's outcome to the record, and let `latest/` follow (not to studies)."""
    artifact = result.artifact
    record["instances"][artifact.name] = {
        "key": artifact.key,
        "folder": artifact.folder.relative_to(engine.store.root).as_posix(),
        "digest": artifact.manifest["digest"],
        "cached": result.cached,
        "seconds": result.seconds,
        "text": result.text,
    }
    targets = {
        "report": ("report.html", artifact.folder / "report.html"),
        "train_source": ("model", artifact.folder),
        "self_train": ("model", artifact.folder),
    }
    name, target = targets.get(artifact.manifest["stage"], (None, Path()))
    if name and target.exists() and not record.get("study"):
        engine.store.point_latest(name, target)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
