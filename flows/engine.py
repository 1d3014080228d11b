"""Plan and run: which stages must run and why, and running them so that nothing is lost.

The engine works the same under the command line and under Prefect; it imports neither Prefect nor
torch. A stage runs in its staging folder, the engine commits.
"""

import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import provenance
from flows.digests import key_of
from flows.kept_progress import KeptProgress, now
from flows.keys import differences, ingredients
from flows.outputs import Problem, StoreError, output_digest, problems_of, read_json
from flows.pipeline import Instance, build
from flows.recipes import ConfigError, nearest
from flows.steps import Artifact, Executor, Listener, MissingNeedError, Result, StageError, Step
from flows.store import Store
from stages.contracts import CONTRACTS, Contract
from stages.memory import forget_peak, is_out_of_memory, peak_memory_bytes
from stages.shards import shard_folders, write_json


@dataclass
class Engine:
    """Plans and runs the instances of one recipe in one store."""

    recipe: Any
    store: Store
    contracts: Sequence[Contract] = CONTRACTS
    force: frozenset[str] = frozenset()
    """Stages (or instances) to run even if they are done."""
    command: str = "python flows/clouds.py"
    """What a user types to start the program, for messages."""
    options: tuple[str, ...] = ()
    """What a user adds to every command: recipe, settings and folder of artifacts."""
    prefect_run_id: str | None = None
    run_id: str | None = None
    """Id of the run's record, for manifests."""
    instances: dict[str, Instance] = field(init=False)
    _found: dict[str, Artifact] = field(init=False, default_factory=dict)
    _forced: set[str] = field(init=False, default_factory=set)
    """Forced instances that ran."""
    _emptied: set[str] = field(init=False, default_factory=set)
    """Forced instances whose older work was thrown away: a retry goes on from its own."""

    def __post_init__(self) -> None:
        self.instances = build(self.recipe, self.contracts)
        known = {*self.instances, *(instance.stage for instance in self.instances.values())}
        for name in self.force:
            if name not in known:
                raise ConfigError(f"--force {name!r}: unknown stage{nearest(name, known)}")

    # Planning

    def plan(self, selected: Iterable[Instance]) -> list[Step]:
        """What a run of the selected instances would do, in order, and why."""
        self.store.must_be_folder()
        steps: dict[str, Step] = {}
        for instance in selected:
            steps[instance.name] = self._plan_one(instance, steps)
        return list(steps.values())

    def _plan_one(self, instance: Instance, steps: Mapping[str, Step]) -> Step:
        pinned = self._pinned(instance.name)
        if pinned and not self._is_forced(instance):
            return Step(
                instance=instance,
                action="skip",
                reason=f"adopted from {pinned.manifest['origin']}",
                key=pinned.key,
                folder=pinned.folder,
            )
        pending = [
            step
            for entry in instance.inputs
            if (step := steps.get(entry.instance)) is not None and step.action != "skip"
        ]
        newest = self.store.newest(instance.name)
        if pending:
            return self._plan_pending(instance, pending, newest)
        try:
            key, found = self._identify_wanted(instance)
        except MissingNeedError as error:
            return Step(instance=instance, action="blocked", reason=str(error))
        base = {"instance": instance, "key": key}
        folder = self.store.find(instance.name, key)
        if folder is None:
            changes = tuple(differences(newest["ingredients"], found)) if newest else ()
            reason = "; ".join(changes[:3]) if changes else "not made yet"
            return self._will_run(base, reason, changes, newest)
        try:
            manifest = self.store.manifest(folder)
            problems = problems_of(folder, manifest)
        except StoreError as error:
            return self._will_run(base, str(error), (), newest)
        if problems:
            return self._will_run(base, _say_problems(problems), (), newest)
        if self._is_forced(instance):
            return self._will_run(base, "forced", (), newest)
        self._found[instance.name] = Artifact(
            name=instance.name, key=key, folder=folder, manifest=manifest
        )
        return Step(**base, action="skip", reason="done", folder=folder)

    def _plan_pending(
        self, instance: Instance, pending: list[Step], newest: Mapping[str, Any] | None
    ) -> Step:
        certain = newest is None or self._is_forced(instance)
        pending = list({step.instance.name: step for step in pending}.values())
        names = ", ".join(step.instance.name for step in pending[:3])
        more = f" and {len(pending) - 3} more" if len(pending) > 3 else ""
        one = len(pending) == 1
        sure = any(step.action == "run" for step in pending)
        verb = ("runs" if one else "run") if sure else "may run"
        why = "not made yet" if newest is None else "forced"
        reason = why if certain else f"{names}{more} {verb} before it"
        seconds, size = self._estimate(instance, newest)
        return Step(
            instance=instance,
            action="run" if certain else "may run",
            reason=reason,
            last_seconds=newest["seconds"] if newest else None,
            estimate_s=seconds,
            estimate_bytes=size,
        )

    def _will_run(
        self,
        base: dict[str, Any],
        reason: str,
        changes: tuple[str, ...],
        newest: Mapping[str, Any] | None,
    ) -> Step:
        instance, key = base["instance"], base["key"]
        seconds, size = self._estimate(instance, newest)
        return Step(
            **base,
            action="run",
            reason=reason,
            changes=changes,
            resumes=self.unfinished(instance.name, key),
            held_by=self.store.is_locked(instance.name, key),
            last_seconds=newest["seconds"] if newest else None,
            estimate_s=seconds,
            estimate_bytes=size,
        )

    def _estimate(
        self, instance: Instance, newest: Mapping[str, Any] | None
    ) -> tuple[float | None, int | None]:
        """Seconds and bytes from the rate of the newest artifact, where both have units of work.

        What the stage took before its work began (imports, loading) does not grow with the work.
        """
        units = instance.contract.units(instance.recipe)
        work = (newest or {}).get("work") or {}
        if not units or not work.get("done"):
            return None, None
        share = units / work["done"]
        outputs = newest["outputs"].values()
        size = sum(entry["bytes"] for entry in outputs)
        if any("num_files" in entry for entry in outputs):  # checkpoints do not grow with steps
            size = int(size * share)
        working_s = min(work.get("seconds", newest["seconds"]), newest["seconds"])
        return newest["seconds"] - working_s + working_s * share, size

    def unfinished(self, name: str, key: str) -> str | None:
        """What an earlier attempt left behind for a restart."""
        staging = self.store.staging(name, key)
        if not staging.is_dir():
            return None
        told = read_json(self.store.progress_file(name, key))
        shards = len(shard_folders(staging))
        parts = []
        if told and told.get("total"):
            parts.append(f"{told['done']}/{told['total']} {told['unit']}")
        if shards:
            parts.append(f"{shards} finished shard{'s' if shards > 1 else ''}")
        return ", ".join(parts) or "started"

    # Identity

    def _identify(self, instance: Instance) -> tuple[str, dict[str, Any]]:
        """An instance's key and its ingredients, from the artifacts of its inputs."""
        digests = {}
        for entry in instance.inputs:
            artifact = self.artifact_of(entry.instance, needed_by=instance, role=entry.role)
            name = entry.instance if instance.contract.takes_everything else entry.role
            digests[name] = output_digest(artifact.manifest, entry.part)
        found = ingredients(instance, digests, self.store)
        return key_of(found), found

    def _identify_wanted(self, instance: Instance) -> tuple[str, dict[str, Any]]:
        """As `_identify`, of what the user asked for: says how to make all that it lacks."""
        try:
            return self._identify(instance)
        except MissingNeedError as error:
            raise MissingNeedError(
                f"{error}\n  or all that is missing with: {self.typed('--until', instance.stage)}"
            ) from error

    def artifact_of(
        self, name: str, *, needed_by: Instance | None = None, role: str = ""
    ) -> Artifact:
        """The committed, whole artifact of an instance under the present recipe.

        Raises:
            MissingNeedError: it is not there or damaged; the message names the command that makes
                it.
        """
        if name in self._found:
            return self._found[name]
        pinned = self._pinned(name)
        if pinned is not None:
            self._found[name] = pinned
            return pinned
        key, _ = self._identify(self.instances[name])
        folder = self.store.find(name, key)
        problem = "is not there"
        if folder is not None:
            try:
                manifest = self.store.manifest(folder)
                problems = problems_of(folder, manifest)
                if not problems:
                    artifact = Artifact(name=name, key=key, folder=folder, manifest=manifest)
                    self._found[name] = artifact
                    return artifact
                problem = f"is damaged ({_say_problems(problems)})"
            except StoreError as error:
                problem = f"is damaged ({error})"
        what = name
        if needed_by is not None:
            what = f"{needed_by.name} needs {name}" + (f" ({role})" if role != name else "")
        raise MissingNeedError(f"{what}, which {problem}. Make it with: {self.command_for(name)}")

    def found_keys(self) -> list[str]:
        """Keys of the artifacts that planning and running came upon so far."""
        return sorted({artifact.key for artifact in self._found.values()})

    def command_for(self, name: str) -> str:
        """The command that makes an instance."""
        instance = self.instances[name]
        return self.typed("--stage", instance.stage, *_which(instance))

    def command_to_undo(self, name: str) -> str:
        """The command that lets an instance's own output count in place of an adopted one."""
        instance = self.instances[name]
        words = [instance.stage, *_which(instance), "--undo", *self.options]
        return f"{self.command} adopt {shlex.join(words)}"

    def typed(self, *words: str) -> str:
        """A command of this recipe, settings and folder, as a shell takes it."""
        return f"{self.command} {shlex.join([*self.options, *words])}"

    def _pinned(self, name: str) -> Artifact | None:
        """The adopted artifact that stands in for an instance, or None.

        Raises:
            StoreError: it is damaged, and no stage makes it again.
        """
        key = self.store.pins().get(name)
        if key is None:
            return None
        folder = self.store.folder(name, key)
        try:
            manifest = self.store.manifest(folder)
            problem = _say_problems(problems_of(folder, manifest))
        except StoreError as error:
            problem = str(error)
        if problem:
            raise StoreError(
                f"what was adopted for {name} is damaged ({problem}). Adopt it again, or let the "
                f"stage's own output count: {self.command_to_undo(name)}"
            )
        return Artifact(name=name, key=key, folder=folder, manifest=manifest)

    def _is_forced(self, instance: Instance) -> bool:
        wanted = bool(self.force & {instance.name, instance.stage})
        return wanted and instance.name not in self._forced

    # Running

    def run_one(
        self,
        instance: Instance,
        *,
        listener: Listener,
        execute: Executor,
        in_child: bool = False,
    ) -> Result:
        """Run one instance unless its artifact is there and whole.

        Args:
            instance: which.
            listener: told what happens.
            execute: runs the stage.
            in_child: whether that is always in a child. Then this process's own memory, which
                may serve other instances at the same time, is not the stage's.

        Raises:
            MissingNeedError: an input is not there.
            StageError: the stage failed; its error is kept beside the staging folder.
        """
        pinned = self._pinned(instance.name)
        if pinned is not None and not self._is_forced(instance):
            return self._done(instance, pinned, listener)
        key, found = self._identify_wanted(instance)
        with self.store.lock(
            instance.name,
            key,
            waiting=lambda who: listener.say(f"{instance.name}: waiting for {who}"),
        ) as lock:
            if not self._is_forced(instance):
                self._found.pop(instance.name, None)
                if whole := self._whole(instance, key):
                    return self._done(instance, whole, listener)
            result = self._make(instance, key, found, listener, execute, lock, in_child)
        self._forced.add(instance.name)
        self._found[instance.name] = result.artifact
        if pinned is not None:
            self.store.pin(instance.name, None)
        listener.stage_finished(instance, result)
        return result

    def _whole(self, instance: Instance, key: str) -> Artifact | None:
        """The artifact if it is whole; of a damaged one, what is whole goes back into staging."""
        folder = self.store.find(instance.name, key)
        if folder is None:
            return None
        try:
            manifest = self.store.manifest(folder)
            problems = problems_of(folder, manifest)
        except StoreError:
            if folder == self.store.folder(instance.name, key):
                self.store.trash(folder)
            return None
        if not problems:
            return Artifact(name=instance.name, key=key, folder=folder, manifest=manifest)
        if folder == self.store.folder(instance.name, key):
            self._salvage(instance.name, key, folder, problems)
        return None

    def _salvage(self, name: str, key: str, folder: Path, problems: list[Problem]) -> None:
        staging = self.store.staging(name, key)
        bad = {problem.path.split("/")[0] for problem in problems}
        if staging.exists():
            self.store.trash(staging)
        for path in folder.iterdir():
            if path.name in bad or not (path / "shard.json").is_file():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        folder.rename(staging)

    def _done(self, instance: Instance, artifact: Artifact, listener: Listener) -> Result:
        self._found[instance.name] = artifact
        text = artifact.manifest.get("summary", {}).get("text", "")
        result = Result(artifact=artifact, cached=True, seconds=0.0, text=text)
        listener.stage_finished(instance, result)
        return result

    def _make(
        self,
        instance: Instance,
        key: str,
        found: dict[str, Any],
        listener: Listener,
        execute: Executor,
        lock: int,
        in_child: bool,
    ) -> Result:
        name = instance.name
        staging = self.store.staging(name, key)
        if self._is_forced(instance) and name not in self._emptied:
            self._emptied.add(name)
            if staging.exists():
                self.store.trash(staging)
        resumes = self.unfinished(name, key)
        staging.mkdir(parents=True, exist_ok=True)
        listening = listener.stage_started(instance, resumes)
        told = KeptProgress(self.store.progress_file(name, key), listening)
        started, clock = now(), time.perf_counter()
        if not in_child:
            forget_peak()  # what stages before this one left loaded still counts
        try:
            summary = execute(self.spec(instance, staging), told, lock)
        except Exception as error:
            told.save()
            if is_out_of_memory(error):
                error = _with_advice(error, instance, self.recipe.run.beside if in_child else 1)
            kept = self._keep_failure(name, key, error)
            raise StageError(name, error, kept) from error
        except BaseException:  # Ctrl-C, exit, or Prefect's signal that the run was cancelled
            told.save()
            raise
        manifest = {
            "instance": name,
            "stage": instance.stage,
            "round": instance.round,
            "leg": instance.leg,
            "key": key,
            "ingredients": found,
            "inputs": self._inputs_of(instance),
            "config": _config_of(instance),
            "recipe": self.recipe.name,
            "seed": instance.recipe.seed,
            "precision": instance.recipe.precision,
            "summary": {"text": summary.text, "numbers": dict(summary.numbers)},
            "work": told.work(),
            "started": started,
            "finished": now(),
            "seconds": round(time.perf_counter() - clock, 3),
            "peak_memory_bytes": max(
                0 if in_child else peak_memory_bytes(), summary.peak_memory_bytes
            ),
            "run_id": self.run_id,
            "prefect_run_id": self.prefect_run_id,
            **provenance.facts(),
        }
        folder, whole = self.store.commit(name, key, manifest)
        artifact = Artifact(name=name, key=key, folder=folder, manifest=whole)
        return Result(
            artifact=artifact, cached=False, seconds=manifest["seconds"], text=summary.text
        )

    def spec(self, instance: Instance, out: Path) -> dict[str, Any]:
        """What `stages/launch.py` needs to run the stage, in this process or another."""
        inputs: dict[str, Any] = {}
        for entry in instance.inputs:
            folder = self.artifact_of(entry.instance).folder
            path = str((folder / entry.part if entry.part else folder).absolute())
            if instance.contract.takes_everything:
                inputs.setdefault(entry.role, {})[entry.instance] = path
            else:
                inputs[entry.role] = path
        model = type(self.recipe)
        return {
            "stage": instance.stage,
            "verb": instance.contract.verb,
            "round": instance.round,
            "leg": instance.leg,
            "sections": list(instance.contract.sections_of(instance.recipe)),
            "recipe": instance.recipe.model_dump(mode="json"),
            "recipe_class": f"{model.__module__}:{model.__qualname__}",
            "out": str(out.absolute()),
            "inputs": inputs,
        }

    def _inputs_of(self, instance: Instance) -> dict[str, Any]:
        listed = {}
        for entry in instance.inputs:
            artifact = self.artifact_of(entry.instance)
            name = entry.instance if instance.contract.takes_everything else entry.role
            listed[name] = {
                "instance": entry.instance,
                "part": entry.part,
                "key": artifact.key,
                "digest": output_digest(artifact.manifest, entry.part),
            }
        return listed

    def _keep_failure(self, name: str, key: str, error: BaseException) -> Path:
        path = self.store.failure_file(name, key)
        record = {
            "instance": name,
            "key": key,
            "error": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            "when": now(),
        }
        try:
            write_json(path, record)
        except OSError as reason:
            print(f"could not keep the error at {path}: {reason}", file=sys.stderr)
        return path


def _which(instance: Instance) -> list[str]:
    """The options that name the round and leg of an instance."""
    named = (("--round", instance.round), ("--leg", instance.leg))
    return [word for option, value in named if value is not None for word in (option, str(value))]


def _config_of(instance: Instance) -> dict[str, Any]:
    recipe = instance.recipe
    return {
        name: getattr(recipe, name).model_dump(mode="json")
        for name in instance.contract.sections_of(recipe)
    }


def _with_advice(error: Exception, instance: Instance, beside: int) -> MemoryError:
    """An error for want of memory that says what helps, beside others too."""
    advice = instance.contract.saves_memory
    if beside > 1:
        advice = "; ".join(filter(None, [advice, "fewer stages at once (run.beside=1)"]))
    told = str(error).partition("\n")[0] or type(error).__name__
    helps = f" What needs less: {advice}." if advice and advice not in told else ""
    full = MemoryError(f"memory does not suffice: {told}.{helps} What is finished is kept.")
    full.__cause__ = error
    return full


def _say_problems(problems: Sequence[Problem]) -> str:
    shown = "; ".join(str(problem) for problem in problems[:3])
    return shown + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
