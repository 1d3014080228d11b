"""One run: check, then every selected instance, recorded as it goes.

They run in the order of the plan, one after the other or (`run.beside`) several at once.

The same procedure serves the command line and the Prefect flow; only listener and executor differ.
"""

import datetime
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flows.beside import Around, ChildExecutor, ChooseGpus, in_child, run_beside
from flows.check import preflight
from flows.engine import Engine
from flows.gpus import own_gpus
from flows.pipeline import Instance, select
from flows.recipes import load_recipe
from flows.steps import Artifact, Executor, Listener, Result, StageError
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
    around: Around = _directly,
    execute_beside: ChildExecutor = in_child,
    choose_gpus: ChooseGpus | None = own_gpus,
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
        execute_beside: in place of `execute` where `run.beside` stages run at once.
        choose_gpus: gives each of those GPUs of its own; None: `execute_beside` does.

    Returns:
        The run's record, as written to `artifacts/runs/`.

    Raises:
        MissingNeedError, StageError, ConfigError: nothing that was finished is lost.
    """
    engine.store.open()
    steps = engine.plan(selected)
    pending = [step for step in steps if step.action != "skip"]
    if pending:
        preflight(pending, store=engine.store, listener=listener)
    record = _new_record(engine, overrides, study)
    engine.run_id = record["id"]
    if pending:  # from now on nobody clears away what this run builds on
        record["uses"] = engine.found_keys()
        engine.store.write_run(record)
    try:
        noted = _Noted(record, engine, selected)
        if engine.recipe.run.beside > 1:
            run_beside(
                engine,
                selected,
                listener=listener,
                execute=execute_beside,
                around=around,
                done=noted.add,
                choose_gpus=choose_gpus,
            )
        else:
            for instance in selected:
                run_it = partial(engine.run_one, instance, listener=listener, execute=execute)
                noted.add(around(instance, run_it))
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


class _Noted:
    """Keeps a run's record, and lets `latest/` follow (not to studies), in the plan's order."""

    def __init__(
        self, record: dict[str, Any], engine: Engine, selected: Sequence[Instance]
    ) -> None:
        self._record, self._engine = record, engine
        self._places = {instance.name: place for place, instance in enumerate(selected)}
        self._latest: dict[str, int] = {}

    def add(self, result: Result) -> None:
        """Add an instance's outcome."""
        artifact, listed = result.artifact, self._record["instances"]
        listed[artifact.name] = {
            "key": artifact.key,
            "folder": artifact.folder.relative_to(self._engine.store.root).as_posix(),
            "digest": artifact.manifest["digest"],
            "cached": result.cached,
            "seconds": result.seconds,
            "text": result.text,
        }
        in_order = sorted(listed.items(), key=lambda entry: self._places[entry[0]])
        self._record["instances"] = dict(in_order)
        if not self._record.get("study"):
            self._follow(artifact)
        if not result.cached:
            self._engine.store.write_run(self._record)

    def _follow(self, artifact: Artifact) -> None:
        """Point `latest/` at it, unless what comes later in the plan was finished before."""
        targets = {
            "report": ("report.html", artifact.folder / "report.html"),
            "train_source": ("model", artifact.folder),
            "self_train": ("model", artifact.folder),
        }
        name, target = targets.get(artifact.manifest["stage"], (None, Path()))
        place = self._places[artifact.name]
        if name and target.exists() and place >= self._latest.get(name, 0):
            self._latest[name] = place
            self._engine.store.point_latest(name, target)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
