"""Everything a run needs, looked at before it starts: data, weights, disk, memory, device.

clouds check --recipe NAME
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.beside import threads_each
from flows.engine import Engine
from flows.pipeline import Instance
from flows.recipes import ConfigError, nearest
from flows.steps import Listener
from flows.store import Store
from models.config import (
    MINIATURE_DIR,
    NAME_FIELDS,
    meant_as_path,
    name_path,
    names_safety_checker,
    weights_path,
)
from stages import fitness
from stages.contracts import labelspace_file
from stages.labels import load_labelspace
from stages.layouts import WORLD_PREFIX, dataset_root, list_pairs, strays_told

MIN_FREE_BYTES = 200 * 2**20
_NUM_LABELS = 4
_NOT_WEIGHTS = {"bank", "random"}
_HUB_FIELDS = {"write_prompts.model", "synthesize.model"}
"""Fields whose values are hub ids where they are no folders, with or without an owner."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    what: str
    state: Literal["ok", "warning", "error"]
    text: str


def preflight(pending: Sequence[Instance], *, store: Store, listener: Listener) -> None:
    """Stop before any work if something is missing.

    Raises:
        ConfigError: names everything that is missing, and the way out.
    """
    findings = list(look(pending, store=store))
    for finding in findings:
        if finding.state == "warning":
            listener.say(f"warning: {finding.what}: {finding.text}")
    wrong = [f"{finding.what}: {finding.text}" for finding in findings if finding.state == "error"]
    if wrong:
        raise ConfigError("this run cannot start:\n  " + "\n  ".join(wrong))


def look(pending: Sequence[Instance], *, store: Store) -> Iterator[Finding]:
    """Look at what the pending instances need (no torch, no file contents)."""
    stages = {instance.stage for instance in pending}
    recipes = {instance.stage: instance.recipe for instance in pending}
    if "prepare" in stages:
        yield from _data(recipes["prepare"])
    if "train_source" in stages and not recipes["train_source"].data.sources:
        text = "it is empty: name at least one labelled data set to train on"
        yield Finding(what="data.sources", state="error", text=text)
    if "synthesize" in stages:
        yield from _unused_pictures(recipes["synthesize"])
        yield from _missing_checker(recipes["synthesize"].synthesize)
    if "select" in stages:
        yield from _unread_thresholds(recipes["select"].select)
    for instance in pending:
        if "pseudo_label" in instance.contract.sections_of(instance.recipe):
            yield from _unknown_classes(instance)
    yield from _missing_averages(pending)
    seen = set()
    for instance in pending:
        for field in instance.contract.weights_of(instance.recipe):
            found = _weights(instance, field)
            if found is not None and found.what not in seen:
                seen.add(found.what)
                yield found
    yield from dict.fromkeys(found for instance in pending for found in _unfit(instance))
    yield _disk(store)


def _data(recipe: Any) -> Iterator[Finding]:
    path = labelspace_file(recipe.data.labels)
    if not path.is_file():
        shipped = labelspace_file("cityscapes19").parent.glob("*.yaml")
        known = ", ".join(sorted(path.stem for path in shipped))
        text = (
            f"{recipe.data.labels!r} is neither a shipped label space nor a file; shipped: {known}"
        )
        yield Finding(what="data.labels", state="error", text=text)
    for group in ("sources", "targets", "validation", "unlabelled"):
        for number, dataset in enumerate(getattr(recipe.data, group)):
            if not dataset.root.startswith(WORLD_PREFIX):
                what = f"data.{group}.{number} ({dataset.name})"
                yield from _dataset(what, dataset, dataset_root(dataset, recipe.data.root), group)


def _unused_pictures(recipe: Any) -> Iterator[Finding]:
    if recipe.data.unlabelled and recipe.synthesize.mode == "paint":
        text = (
            "these pictures are not used: synthesize.mode is paint; set synthesize.mode=collect to "
            "train on them instead of painted ones"
        )
        yield Finding(what="data.unlabelled", state="warning", text=text)
    if recipe.synthesize.mode == "collect" and not recipe.data.unlabelled:
        text = "it is empty, and synthesize.mode=collect takes its pictures from there"
        yield Finding(what="data.unlabelled", state="error", text=text)


def _unknown_classes(instance: Instance) -> Iterator[Finding]:
    """Thresholds of classes that the label space does not have."""
    named, labels = instance.recipe.pseudo_label.class_thresholds, instance.recipe.data.labels
    if not named or not labelspace_file(labels).is_file():
        return
    try:
        known = load_labelspace(labels).names
    except ValueError:
        return  # `prepare` tells what is wrong with the file
    for name in sorted(named.keys() - set(known)):
        what = f"pseudo_label.class_thresholds of {instance.name}"
        text = f"{name!r} is no class of the label space {labels!r}{nearest(name, known)}"
        yield Finding(what=what, state="error", text=text)


def _missing_checker(section: Any) -> Iterator[Finding]:
    """A safety checker is asked for, and the model, as far as it is here, has none."""
    if not section.safety_checker:
        return
    index = _model_index(section.model, section.revision)
    if index is not None and not names_safety_checker(index):
        text = (
            f"it is on, but {section.model!r} has none (its model_index.json names no "
            "safety_checker): set it to false, or choose a model that has one"
        )
        yield Finding(what="synthesize.safety_checker", state="error", text=text)


def _model_index(model: str, revision: str | None) -> dict[str, Any] | None:
    """What a pipeline is made of: of a folder or of a model in the local hub cache, else None."""
    if model == "random":
        return {}
    folder = weights_path(model)
    if folder is not None:
        path = folder / "model_index.json"
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = Path(str(try_to_load_from_cache(model, "model_index.json", revision=revision)))
        except HFValidationError:
            return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # what is missing or damaged is told where it is loaded
    return found if isinstance(found, dict) else None


def _unread_thresholds(section: Any) -> Iterator[Finding]:
    """Thresholds that choose nothing, because another rule, or a CLIP, would read them."""
    for name in section.unread:
        lacking = [] if section.rule == "checks" else ["select.rule=checks"]
        if name in {"clip_weights", "min_similarity"} and section.clip is None:
            lacking.append("a CLIP (select.clip)")
        value = getattr(section, name)
        needs = " and ".join(lacking)
        text = f"{value!r} chooses nothing under rule {section.rule}: it needs {needs}"
        yield Finding(what=f"select.{name}", state="warning", text=text)


def _missing_averages(pending: Sequence[Instance]) -> Iterator[Finding]:
    """Judging the average of weights that are about to be trained without one."""
    by_name = {instance.name: instance for instance in pending}
    for instance in pending:
        if instance.stage != "evaluate" or instance.recipe.evaluate.weights != "ema":
            continue
        for entry in instance.inputs:
            maker = by_name.get(entry.instance) if entry.role == "model" else None
            if maker is not None and getattr(maker.recipe, maker.stage).ema is None:
                text = (
                    f"it is ema, but {maker.name} keeps no average ({maker.stage}.ema is null): "
                    f"set evaluate.weights=model, or {maker.stage}.ema.decay=0.999"
                )
                yield Finding(what=f"evaluate.weights of {instance.name}", state="error", text=text)


def _dataset(what: str, dataset: Any, root: Path, group: str) -> Iterator[Finding]:
    try:
        labelled = group != "unlabelled" or dataset.truth
        found = list_pairs(dataset, root, role=group, labelled=labelled)
    except (FileNotFoundError, ValueError) as error:
        yield Finding(what=what, state="error", text=str(error))
        return
    yield Finding(what=what, state="ok", text=f"{len(found.pairs)} samples below {root}")
    if (strays := strays_told(found, root)) is not None:
        yield Finding(what=what, state="warning", text=strays)


def _weights(instance: Instance, field: str) -> Finding | None:
    section = instance.recipe
    for part in field.split("."):
        section, parent = getattr(section, part), section
    reference = section
    if reference is None or reference in _NOT_WEIGHTS or not _is_used(instance, parent):
        return None
    local = name_path(reference) if field in NAME_FIELDS else weights_path(reference)
    if local is not None:
        state = "ok" if local.exists() else "error"
        missing = f"{reference!r}: {local} is not there{_shipped(reference)}"
        return Finding(what=field, state=state, text=str(local) if local.exists() else missing)
    if meant_as_path(reference) or _is_file(field, parent):
        text = f"there is no file or folder {reference} (relative paths begin at {Path.cwd()})"
        return Finding(what=field, state="error", text=text)
    if "/" not in reference and field not in _HUB_FIELDS:
        return None
    repository = reference.removeprefix("hf-hub:")
    return _hub(field, repository, getattr(parent, "revision", None))


def _is_file(field: str, section: Any) -> bool:
    """Whether the field names a file in any case, not a hub's model or a library's tag."""
    if field == "segmenter.encoder.weights":
        return section.family == "sam"
    return field == "refine.weights"


def _unfit(instance: Instance) -> Iterator[Finding]:
    """What is there, and does not fit, or is known to no library."""
    recipe, sections = instance.recipe, instance.contract.sections_of(instance.recipe)
    found: dict[str, str | None] = {}
    if "segmenter" in sections:
        yield from _tag_without_weights(recipe.segmenter.encoder)
    if "write_prompts" in sections:
        section = recipe.write_prompts
        if section.server is not None:
            found["write_prompts.server"] = fitness.server_problem(section.server, section.model)
        else:
            found["write_prompts.model"] = fitness.chat_template_problem(section.model)
    if "synthesize" in sections and recipe.synthesize.mode == "paint":
        found["synthesize.scheduler"] = fitness.scheduler_problem(recipe.synthesize.scheduler)
    if "select" in sections and recipe.select.rule == "checks":
        found["select.clip"] = fitness.clip_problem(recipe.select.clip)
    if "refine" in sections:
        section = recipe.refine
        found["refine.weights"] = fitness.sam_problem(section.model, section.weights)
        found["refine.rule"] = fitness.rule_problem(section.rule, _class_names(recipe))
    for what, problem in found.items():
        if problem is not None:
            yield Finding(what=what, state="error", text=problem.removeprefix(f"{what}: "))


def _tag_without_weights(encoder: Any) -> Iterator[Finding]:
    """A name of timm with the tag of weights, which loads none."""
    name, _, tag = encoder.name.partition(".")
    if encoder.family == "timm" and tag and encoder.weights is None:
        text = (
            f"it is null, so the encoder begins with random weights: the tag {tag} in encoder.name "
            f"loads none. Set segmenter.encoder.weights={tag} (and name={name})"
        )
        yield Finding(what="segmenter.encoder.weights", state="warning", text=text)


def _class_names(recipe: Any) -> tuple[str, ...]:
    """The label space's classes; none where its file cannot be read, which is told elsewhere."""
    try:
        return load_labelspace(recipe.data.labels).names
    except (OSError, ValueError):
        return ()


def _shipped(reference: str) -> str:
    """What a wrong builtin:NAME could have been."""
    if not reference.startswith("builtin:"):
        return ""
    return nearest(reference, [f"builtin:{card.parent.name}" for card in _cards()])


def _cards() -> list[Path]:
    """The cards of the networks that ship."""
    return sorted(MINIATURE_DIR.glob("*/README.md"))


def _is_used(instance: Instance, section: Any) -> bool:
    """Whether this run loads the section's weights itself."""
    if instance.stage == "write_prompts":
        return section.server is None
    if instance.stage == "synthesize":
        return section.mode == "paint"
    return True


def _hub(field: str, repository: str, revision: str | None) -> Finding:
    """Whether a hub's model lies in the local cache; without network it must."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = {entry.repo_id for entry in scan_cache_dir().repos}
    except CacheNotFound:
        cached = set()
    if repository in cached:
        return Finding(what=field, state="ok", text=f"{repository} is in the local hub cache")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}
    fetch = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    text = f"{repository} is not in the local hub cache; fetch it with `{fetch}`"
    if offline:
        return Finding(what=field, state="error", text=text + " (HF_HUB_OFFLINE is set)")
    absent, problem = fitness.hub_problem(repository, revision)
    if absent:
        text = f"{repository!r} is no folder here and no model of the hub ({problem})"
        return Finding(what=field, state="error", text=text)
    if problem:
        text += f" (the hub was not reached: {problem})"
    return Finding(what=field, state="warning", text=text + ", or it is fetched when it is needed")


def _disk(store: Store) -> Finding:
    place = store.root if store.root.exists() else Path.cwd()
    free = shutil.disk_usage(place).free
    state = "ok" if free >= MIN_FREE_BYTES else "error"
    return Finding(what="disk", state=state, text=f"{free / 2**30:.1f} GiB free at {place}")


def everything(engine: Engine) -> Iterator[Finding]:
    """All that `check` looks at, whatever is done already (imports torch)."""
    engine.store.must_be_folder()
    told = set()
    for finding in look(list(engine.instances.values()), store=engine.store):
        told.add(finding.text)
        yield finding
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    yield Finding(what="memory", state="ok", text=f"{pages * page_bytes / 2**30:.1f} GiB")
    yield Finding(what="cores", state="ok", text=str(os.cpu_count()))
    yield from _beside(engine.recipe.run.beside)
    yield from _device(engine.recipe)
    yield from dict.fromkeys(
        found for instance in engine.instances.values() for found in _names(instance)
    )
    # A folder that is not there cannot be read either: its error stands above once.
    yield from (finding for finding in _label_values(engine.recipe) if finding.text not in told)


def _beside(count: int) -> Iterator[Finding]:
    """What each of several stages at once has of this machine."""
    if count > 1:
        threads = os.environ.get("OMP_NUM_THREADS") or threads_each(count)
        text = f"{count} stages at once, {threads} threads each, on GPUs one at a time per GPU"
        yield Finding(what="run.beside", state="ok", text=text)


def _names(instance: Instance) -> Iterator[Finding]:
    """Whether libraries know what encoders and tags are called (imports them)."""
    recipe, sections = instance.recipe, instance.contract.sections_of(instance.recipe)
    if "segmenter" in sections:
        encoder = recipe.segmenter.encoder
        folder = name_path(encoder.name)
        if folder is not None and not folder.exists():
            return  # told above
        problem = fitness.encoder_problem(encoder)
        known = f"{encoder.family} knows {encoder.name}, weights {encoder.weights}"
        state = "error" if problem else "ok"
        yield Finding(what="segmenter.encoder", state=state, text=problem or known)
    if "select" in sections and recipe.select.rule == "checks" and recipe.select.clip:
        clip, weights = recipe.select.clip, recipe.select.clip_weights
        if fitness.clip_problem(clip) is not None:
            return  # told above
        problem = fitness.clip_tag_problem(clip, weights)
        known = f"open_clip knows {clip}, weights {weights}"
        yield Finding(what="select.clip", state="error" if problem else "ok", text=problem or known)


def _device(recipe: Any) -> Iterator[Finding]:
    from stages.devices import device_for

    try:
        device = device_for(recipe.run.device, precision=recipe.precision)
    except ValueError as error:
        yield Finding(what="device", state="error", text=str(error))
    else:
        yield Finding(what="device", state="ok", text=device.reason)


def _label_values(recipe: Any) -> Iterator[Finding]:
    """Read a few labels of every data set and look whether its map knows their values."""
    from stages.prepare import check_labels

    for group in ("sources", "targets", "validation", "unlabelled"):
        for dataset in getattr(recipe.data, group):
            if group == "unlabelled" and not dataset.truth:
                continue
            if dataset.root.startswith(WORLD_PREFIX):
                continue
            what = f"labels of {dataset.name}"
            try:
                text = check_labels(dataset, recipe.data, role=group, num_samples=_NUM_LABELS)
            except (ValueError, OSError) as error:
                yield Finding(what=what, state="error", text=str(error))
            else:
                yield Finding(what=what, state="ok", text=text)
