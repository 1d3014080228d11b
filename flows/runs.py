"""One run: check, then every selected instance in order, recorded as it goes.

The same procedure serves the command line and the Prefect flow; only listener and executor differ.
"""

import datetime
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.check import preflight
from flows.engine import Engine, Executor, Listener, Result, StageError
from flows.pipeline import Instance


def run(
    engine: Engine,
    selected: Sequence[Instance],
    *,
    listener: Listener,
    execute: Executor,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the selected instances; what is done already is skipped.

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
    record = _new_record(engine, overrides)
    try:
        for instance in selected:
            result = engine.run_one(instance, listener=listener, execute=execute)
            note_result(record, engine, result)
            if not result.cached:
                engine.store.write_run(record)
        record["status"] = "completed"
    except StageError as error:
        record["status"] = "failed"
        record["failed"] = error.instance
        raise
    except KeyboardInterrupt:
        record["status"] = "interrupted"
        raise
    finally:
        record["finished"] = _now()
        if pending or record["status"] != "completed":
            engine.store.write_run(record)
    return record


def _new_record(engine: Engine, overrides: Sequence[str]) -> dict[str, Any]:
    started = _now()
    stamp = started.replace(":", "").replace("-", "").split(".")[0]
    return {
        "id": f"{stamp}-{uuid.uuid4().hex[:6]}",
        "recipe": engine.recipe.name,
        "overrides": list(overrides),
        "config": engine.recipe.model_dump(mode="json"),
        "prefect_run_id": engine.prefect_run_id,
        "started": started,
        "finished": None,
        "status": "running",
        "instances": {},
    }


def note_result(record: dict[str, Any], engine: Engine, result: Result) -> None:
    """Add an instance's outcome to the record, and let `latest/` follow."""
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
    if name and target.exists():
        engine.store.point_latest(name, target)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
