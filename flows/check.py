"""Everything a run needs, looked at before it starts: data, weights, disk, memory, device.

clouds check --recipe NAME
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.beside import threads_each
from flows.check_models import Finding, look_at_models, missing_checker
from flows.engine import Engine
from flows.pipeline import Instance
from flows.recipes import ConfigError, nearest
from flows.steps import Listener, Step
from flows.store import Store
from models.config import name_path
from stages import fitness
from stages.contracts import labelspace_file
from stages.layouts import WORLD_PREFIX, dataset_root, list_pairs, strays_told

MIN_FREE_BYTES = 200 * 2**20
_NUM_LABELS = 4


def preflight(steps: Sequence[Step], *, store: Store, listener: Listener) -> None:
    """Stop before any work if something is missing.

    Args:
        steps: those of the plan that are not skipped.
        store: where their artifacts will lie.
        listener: told the warnings.

    Raises:
        ConfigError: names everything that is missing, and the way out.
    """
    pending = [step.instance for step in steps]
    unsure = frozenset(step.instance.name for step in steps if step.action == "may run")
    findings = list(look(pending, store=store, unsure=unsure))
    for finding in findings:
        if finding.state == "warning":
            listener.say(f"warning: {finding.what}: {finding.text}")
    wrong = [f"{finding.what}: {finding.text}" for finding in findings if finding.state == "error"]
    if wrong:
        raise ConfigError("this run cannot start:\n  " + "\n  ".join(wrong))


def look(
    pending: Sequence[Instance], *, store: Store, unsure: frozenset[str] = frozenset()
) -> Iterator[Finding]:
    """Look at what the pending instances need (no torch, no file contents).

    Args:
        pending: the instances.
        store: where their artifacts will lie.
        unsure: names of those that may turn out to be done already.
    """
    stages = {instance.stage for instance in pending}
    recipes = {instance.stage: instance.recipe for instance in pending}
    if "prepare" in stages:
        yield from _data(recipes["prepare"])
    if "train_source" in stages and not recipes["train_source"].data.sources:
        text = "it is empty: name at least one labelled data set to train on"
        yield Finding(what="data.sources", state="error", text=text)
    if "synthesize" in stages:
        yield from _unused_pictures(recipes["synthesize"])
        yield from missing_checker(recipes["synthesize"].synthesize)
    if "select" in stages:
        yield from _unread_thresholds(recipes["select"].select)
    if "write_prompts" in stages:
        yield from _vain_aim(recipes["write_prompts"])
    for instance in pending:
        if "pseudo_label" in instance.contract.sections_of(instance.recipe):
            yield from _unknown_classes(instance)
    yield from _missing_averages(pending)
    yield from dict.fromkeys(found for one in pending for found in _idle_selection(one))
    yield from look_at_models(pending, unsure=unsure)
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
    from stages.labels import load_labelspace  # numpy, which `plan` does without

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


def _vain_aim(recipe: Any) -> Iterator[Finding]:
    """Aim that nothing follows, or hardly."""
    section, rounds = recipe.write_prompts, recipe.rounds
    if not section.aim:
        return
    lacking = []
    if not (rounds.fresh_pictures and rounds.count > 1):
        lacking.append("rounds.fresh_pictures=true and rounds.count=2 or more")
    if section.model == "bank":
        lacking.append("a language model (write_prompts.model): the bank writes nothing new")
    if lacking:
        text = f"{section.aim} does little or nothing: it needs {', and '.join(lacking)}"
        yield Finding(what="write_prompts.aim", state="warning", text=text)


def _idle_selection(instance: Instance) -> Iterator[Finding]:
    """What `select` would do, which labels made in training pass by."""
    if "self_train" not in instance.contract.sections:
        return
    recipe = instance.recipe
    if recipe.self_train.mode == "offline" or recipe.self_train.labels == "none":
        return
    spares = recipe.synthesize.num_spares
    if recipe.select.rule != "all" or spares:
        text = (
            f"it is online, which trains on every picture that is no spare: select.rule="
            f"{recipe.select.rule} chooses nothing for it"
        )
        if spares:
            text += f", and {spares} spares serve nothing unless another leg selects "
            text += "(synthesize.spare=0 paints none)"
        yield Finding(what="self_train.mode", state="warning", text=text)


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
        # with run.processes each of a stage's has fewer
        most = f"at most {threads} threads each"
        text = f"{count} stages at once, {most}, on GPUs one at a time per GPU"
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
        if fitness.clip_problem(clip) is not None or clip.startswith("hf-hub:"):
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
