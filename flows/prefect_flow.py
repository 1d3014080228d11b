"""The pipeline as a Prefect flow: one task per instance, stages in child processes.

    make deploy                                                    pool, GPU limit, deployments
    prefect worker start --pool clouds-local
    prefect deployment run clouds/whole --param recipe=camvid
    prefect deployment run clouds/stage --param stage=refine --param round=1

The only module that imports Prefect. The store says what is done, never Prefect's cache: a task of
a finished stage ends at once in the state `Cached`, which says why. Tasks hand on references (a
name, a key, a digest, a folder), never tensors. What Prefect's pages show beside states (tables,
progress, summary) is told as well as the server takes it, and never stops a stage.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypedDict
from uuid import UUID

from httpx import HTTPStatusError
from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.settings import get_current_settings
from prefect.states import Completed, State

from flows.engine import Engine
from flows.gpus import gpus_taken, own_gpus
from flows.pipeline import Instance
from flows.recipes import ConfigError
from flows.runs import arrange, run
from flows.steps import Result, StageError
from stages.contracts import STAGE_NAMES, Progress, Summary
from stages.launch import StageKilled, run_child

log = logging.getLogger(__name__)

DEFAULT_RECIPE = "miniature"
GPU_LIMIT = "gpu"
"""Name of the global concurrency limit that counts GPUs; `make deploy` makes it."""
RETRIES = 1
"""Attempts after a transient error: they go on from the finished shards."""
RETRY_DELAY_S = 5
PROGRESS_AFTER_S = 2.0
"""Stages shorter than this show no progress bar."""
PROGRESS_EVERY_S = 5.0
"""Least time between two updates of a progress bar."""
SILENCE_S = 60.0
"""How long nothing is told after the server did not answer."""

StageName = Literal[STAGE_NAMES]


class Reference(TypedDict):
    """What a task hands on: where an artifact is, not what is in it."""

    instance: str
    key: str
    digest: str
    folder: str


# The flow


def _run_name() -> str:
    """ "camvid: refine@1", "miniature: all", "miniature: from select until evaluate"."""
    given = runtime.flow_run.parameters
    words = given.get("stage") or ""
    if words:
        words += f"@{given['round']}" if given.get("round") is not None else ""
        words += f"#{given['leg']}" if given.get("leg") else ""
    else:
        words = " ".join(
            f"{word} {given[name]}"
            for word, name in (("from", "from_stage"), ("until", "until_stage"), ("leg", "leg"))
            if given.get(name)
        )
    return f"{Path(given['recipe']).stem}: {words or 'all'}"


@flow(name="clouds", flow_run_name=_run_name, persist_result=False)
def clouds(
    recipe: str = DEFAULT_RECIPE,
    artifacts: str = "artifacts",
    stage: StageName | None = None,
    round: int | None = None,
    leg: str | None = None,
    overrides: list[str] = (),
    force: list[str] = (),
    from_stage: StageName | None = None,
    until_stage: StageName | None = None,
) -> dict[str, Any]:
    """Train, write prompts, paint, label, refine, self-train, evaluate, report; what is done is
    skipped, what was interrupted goes on.

    Args:
        recipe: A shipped recipe's name, or a YAML file on the worker.
        artifacts: Folder of all artifacts.
        stage: This stage alone; empty: all of the recipe.
        round: Round of the stage; empty: the recipe's last.
        leg: Only this leg of the recipe; empty: all.
        overrides: Settings, "stage.key=value" each.
        force: Stages to run even if they are done.
        from_stage: Start at this stage.
        until_stage: End with this stage.
    """
    engine, selected = arrange(
        recipe=recipe,
        artifacts=artifacts,
        stage=stage,
        round=round,
        leg=leg,
        overrides=overrides,
        force=force,
        from_stage=from_stage,
        until_stage=until_stage,
    )
    engine.prefect_run_id = str(runtime.flow_run.id)
    for room in ("flows", "stages"):  # what they say reaches the run's logs
        logging.getLogger(room).setLevel(engine.recipe.run.log_level.upper())
    desk = _Desk(engine)
    try:
        record = run(
            engine,
            selected,
            listener=desk,
            execute=desk.execute,
            execute_beside=desk.execute,
            choose_gpus=None,
            overrides=overrides,
            around=desk.as_task,
        )
    except BaseException as error:
        desk.summarise(stopped_by=error)
        raise
    desk.summarise()
    done = {"id": record["id"], "instances": record["instances"]}
    fresh = sum(not entry["cached"] for entry in record["instances"].values())
    text = f"{fresh} made, {len(record['instances']) - fresh} done before"
    report = desk.report()
    return Completed(message=text + (f"; report: {report}" if report else ""), data=done)


def run_here(**parameters: Any) -> dict[str, Any]:
    """Run the flow in this process against the server that is set (`--runner prefect`).

    Returns:
        The record's id and instances.

    Raises:
        ConfigError: no server is set, none answers, or it asks for a password; none is ever
            started behind one's back.
    """
    url = get_current_settings().api.url
    start = "start one with `prefect server start`, then set PREFECT_API_URL to its address"
    if not url:
        raise ConfigError(
            f"--runner prefect needs a Prefect server, and PREFECT_API_URL is not set: {start} "
            f"(http://127.0.0.1:4200/api), or use --runner local."
        )
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
        admitted = problem is not None or _is_admitted(client)
    if problem is not None:
        raise ConfigError(
            f"no Prefect server answers at {url} ({problem or type(problem).__name__}): {start}, "
            f"or use --runner local."
        )
    if not admitted:
        raise ConfigError(
            f"the Prefect server at {url} asks for a password: set PREFECT_API_AUTH_STRING to its "
            f"user:password, or use --runner local."
        )
    return clouds(**parameters)


def _is_admitted(client: SyncPrefectClient) -> bool:
    """Whether the server takes our password, if it asks for one (its health page never does)."""
    try:
        client.api_version()
    except HTTPStatusError as error:
        if error.response.status_code == HTTPStatus.UNAUTHORIZED:
            return False
        raise
    return True


# One task per instance


def _is_transient(error: BaseException) -> bool:
    """Whether the same attempt may well succeed: I/O, memory, time, a killed process."""
    if isinstance(error, StageError):
        error = error.error
    if isinstance(error, MemoryError | TimeoutError | ConnectionError | StageKilled):
        return True
    return type(error) is OSError  # not its kinds: a missing or forbidden file stays so


def _worth_a_retry(_task: Any, _task_run: Any, state: State) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and _is_transient(error)


@task(
    name="instance",
    task_run_name="{instance}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=_worth_a_retry,
)
def _as_task(instance: str, desk: "_Desk", run_it: Callable[[], Result]) -> Reference | State:
    result = run_it()
    desk.results[instance] = result
    reference = _reference(result)
    if result.cached:
        return Completed(name="Cached", message=_why_cached(result), data=reference)
    return reference


def _reference(result: Result) -> Reference:
    artifact = result.artifact
    return Reference(
        instance=artifact.name,
        key=artifact.key,
        digest=artifact.manifest["digest"],
        folder=str(artifact.folder.absolute()),
    )


def _why_cached(result: Result) -> str:
    manifest = result.artifact.manifest
    if manifest.get("origin"):
        return f"adopted from {manifest['origin']}"
    return f"done {manifest['finished']}, nothing it is made of has changed: {result.text}"


class _Desk:
    """Stands between engine and Prefect: runs instances as tasks, passes on what is told."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.results: dict[str, Result] = {}
        self._bars: dict[str, _Bar] = {}

    def as_task(self, instance: Instance, run_it: Callable[[], Result]) -> Result:
        """Run an instance as a Prefect task."""
        _as_task.with_options(name=instance.stage)(instance.name, self, run_it)
        return self.results[instance.name]

    def execute(
        self,
        spec: Mapping[str, Any],
        progress: Progress,
        lock: int,
        *,
        env: Mapping[str, str] | None = None,
        stop: threading.Event | None = None,
    ) -> Summary:
        """Run a stage in a child process, with a slot for every GPU it will compute on.

        `env` and `stop` are for stages that run beside each other (see `flows/beside.py`).
        """
        with self._slots(spec) as gpus:
            timeout_s = self.engine.recipe.run.stage_timeout_s
            env = {**(env or {}), **gpus}
            return run_child(spec, progress, timeout_s, keep_fds=(lock,), env=env, stop=stop)

    @contextlib.contextmanager
    def _slots(self, spec: Mapping[str, Any]) -> Iterator[Mapping[str, str]]:
        (contract,) = [c for c in self.engine.contracts if c.name == spec["stage"]]
        count = gpus_taken(contract, self.engine.recipe)
        if not count:
            yield {}
            return
        with contextlib.ExitStack() as stack:
            try:
                # a server that is away for a while is no reason to end days of work
                slots = concurrency(
                    GPU_LIMIT, occupy=count, strict=True, raise_on_lease_renewal_failure=False
                )
                stack.enter_context(slots)
            except ConcurrencySlotAcquisitionError as error:
                if "greater than the limit" in str(error):
                    raise ConfigError(
                        f"run.processes is {count}, but this Prefect server's limit {GPU_LIMIT!r} "
                        f"counts fewer GPUs: choose fewer processes, or raise it with `python -m "
                        f"flows.deploy --gpus {count}`."
                    ) from error
                raise ConfigError(
                    f"this Prefect server has no concurrency limit {GPU_LIMIT!r} ({error}): "
                    f"`make deploy` makes it."
                ) from error
            chosen = ":" in self.engine.recipe.run.device  # by the user
            yield {} if chosen else stack.enter_context(own_gpus(count))

    # The engine's listener

    def say(self, text: str) -> None:
        """A line in the run's log."""
        get_run_logger().info(text)

    def stage_started(self, instance: Instance, resumes: str | None) -> Progress:
        """A stage begins; long ones get a progress bar."""
        if resumes:
            self.say(f"{instance.name}: goes on from {resumes}")
        self._bars[instance.name] = _Bar(instance.name)
        return self._bars[instance.name]

    def stage_finished(self, instance: Instance, result: Result) -> None:
        """A line in the log; for an evaluation a table."""
        if (bar := self._bars.pop(instance.name, None)) is not None:
            bar.finish()
        how = "cached" if result.cached else f"{result.seconds:.1f} s"
        self.say(f"{instance.name}: {how}, {result.text} [{result.artifact.folder}]")
        if instance.stage == "evaluate":
            _tell(
                create_table_artifact,
                key=artifact_key(instance.name),
                table=_scores(result.artifact.folder),
                description=f"{instance.name} [{result.artifact.key}]",
            )

    # The end

    def report(self) -> Path | None:
        """The report's page, if this run made it or found it."""
        for name, result in self.results.items():
            if name == "report":
                return (result.artifact.folder / "report.html").absolute()
        return None

    def summarise(self, stopped_by: BaseException | None = None) -> None:
        """Keys and folders of everything this run made or found, as a page of the run."""
        page = [f"# {self.engine.recipe.name}", ""]
        if stopped_by is not None:
            page += [f"Stopped: {stopped_by or type(stopped_by).__name__}", ""]
        if isinstance(stopped_by, StageError):
            page += [f"The whole error is kept at `{stopped_by.kept.absolute()}`.", ""]
        page += ["| instance | | | key | folder |", "|---|---|---|---|---|"]
        ended = (name for name in self.engine.instances if name in self.results)
        for name in ended:  # in the order of the plan, whoever ended first
            result = self.results[name]
            how = "cached" if result.cached else f"{result.seconds:.1f} s"
            where = f"`{result.artifact.key}` | `{result.artifact.folder.absolute()}`"
            page.append(f"| {name} | {how} | {result.text} | {where} |")
        if report := self.report():
            page += ["", f"Report: `{report}`"]
        _tell(create_markdown_artifact, key="clouds-summary", markdown="\n".join(page))


def _scores(folder: Path) -> list[dict[str, Any]]:
    """An evaluation as rows: mIoU per target, and their mean."""
    found = json.loads((folder / "results.json").read_bytes())
    rows = [
        {
            "target": name,
            "mIoU %": round(100 * entry["miou"], 2),
            "pictures": entry["num_images"],
        }
        for name, entry in found["sets"].items()
    ]
    mean = round(100 * found["miou_mean"], 2)
    return [*rows, {"target": "mean", "mIoU %": mean, "pictures": ""}]


# Telling Prefect


def artifact_key(name: str) -> str:
    """An instance's name as Prefect wants keys: "self_train@1#raw" -> "self-train-1-raw"."""
    kept = "".join(char if char.isalnum() else "-" for char in name.lower())
    return "-".join(filter(None, kept.split("-")))


def _tell(create: Callable[..., Any], **content: Any) -> Any:
    """Create or update an artifact; a server that does not take it is only worth a warning."""
    try:
        return create(**content)
    except Exception as error:
        log.warning("Prefect did not take %s: %s", content.get("key", "an update"), error)
        return None


class _Bar:
    """A stage's progress as a progress artifact, told now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._total, self._done, self._unit = 0, 0, ""
        self._metrics = ""
        self._artifact: UUID | None = None
        self._next = time.monotonic() + PROGRESS_AFTER_S

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        """Announce the work."""
        self._total, self._unit, self._done = total, unit, done
        self._show()

    def advance(self, count: int = 1, **metrics: float) -> None:
        """Count what is done."""
        self._done += count
        if metrics:
            self._metrics = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._show()

    def note(self, text: str) -> None:
        """A line in the run's log."""
        get_run_logger().info("%s: %s", self._name, text)

    def finish(self) -> None:
        """Show the end, if anything was shown before."""
        if self._artifact is not None:
            self._next = 0.0
            self._show()

    def _show(self) -> None:
        if time.monotonic() < self._next:
            return
        content = {
            "progress": min(100.0, 100.0 * self._done / max(self._total, 1)),
            "description": f"{self._name}: {self._done}/{self._total} {self._unit} {self._metrics}",
        }
        if self._artifact is None:
            key = artifact_key(f"{self._name}-progress")
            told = self._artifact = _tell(create_progress_artifact, key=key, **content)
        else:
            told = _tell(update_progress_artifact, artifact_id=self._artifact, **content)
        wait_s = PROGRESS_EVERY_S if told is not None else SILENCE_S
        self._next = time.monotonic() + wait_s
