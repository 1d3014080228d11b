"""Models that a run needs, looked at before it starts: their files, hubs, servers and names.

clouds check --recipe NAME
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from flows.pipeline import Instance
from flows.recipes import nearest
from models.config import (
    MINIATURE_DIR,
    NAME_FIELDS,
    meant_as_path,
    name_path,
    names_safety_checker,
    weights_path,
)
from stages import fitness

_HUB_FIELDS = {"write_prompts.model", "synthesize.model"}
"""Fields whose values are hub ids where they are no folders, with or without an owner."""


_NOT_WEIGHTS = {"bank", "random"}
"""Values of such fields by which nothing is loaded."""

AskHub = Callable[[str, str, str | None], "Finding"]
AskServer = Callable[[str, str], str | None]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    what: str
    state: Literal["ok", "warning", "error"]
    text: str
    by_network: bool = False
    """Whether it is so only as long as the network is as it is now."""


def look_at_models(pending: Sequence[Instance], *, unsure: frozenset[str]) -> Iterator[Finding]:
    """Look at what the pending instances load or ask (no torch).

    Args:
        pending: the instances.
        unsure: names of those that may turn out to be done already. They may never need what the
            network does not give now: of them that is no error.
    """
    # Each is asked once: a hub or server that does not answer takes seconds to say so.
    ask_hub, ask_server = cache(_hub), cache(fitness.server_problem)
    told = set()
    for instance in sorted(pending, key=lambda one: one.name in unsure):
        fields = instance.contract.weights_of(instance.recipe)
        weights = (_weights(instance, field, ask_hub) for field in fields)
        for finding in (*filter(None, weights), *_unfit(instance, ask_server)):
            if finding not in told:
                told.add(finding)
                yield _doubted(finding, instance) if instance.name in unsure else finding


def _doubted(finding: Finding, instance: Instance) -> Finding:
    """The same of an instance that may turn out to be done."""
    if finding.state != "error" or not finding.by_network:
        return finding
    text = f"{finding.text}. {instance.name} needs it only if it turns out not to be done already"
    return replace(finding, state="warning", text=text)


def _weights(instance: Instance, field: str, ask_hub: AskHub) -> Finding | None:
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
    return ask_hub(field, repository, getattr(parent, "revision", None))


def _is_file(field: str, section: Any) -> bool:
    """Whether the field names a file in any case, not a hub's model or a library's tag."""
    if field == "segmenter.encoder.weights":
        return section.family == "sam"
    return field == "refine.weights"


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
        text += " (HF_HUB_OFFLINE is set)"
        return Finding(what=field, state="error", text=text, by_network=True)
    answer = fitness.hub_answer(repository, revision)
    if answer.gated:
        text = (
            f"{repository!r} is gated: agree to its licence at {answer.page}, and set HF_TOKEN to "
            f"a token of that account (the hub answered: {answer.problem})"
        )
        return Finding(what=field, state="error", text=text, by_network=True)
    if answer.absent:
        text = f"{repository!r} is no folder here and no model of the hub ({answer.problem})"
        return Finding(what=field, state="error", text=text, by_network=True)
    if answer.problem:
        heard = "the hub answered" if answer.heard else "the hub was not reached"
        text += f" ({heard}: {answer.problem})"
    return Finding(what=field, state="warning", text=text + ", or it is fetched when it is needed")


def _shipped(reference: str) -> str:
    """What a wrong builtin:NAME could have been."""
    if not reference.startswith("builtin:"):
        return ""
    return nearest(reference, [f"builtin:{card.parent.name}" for card in _cards()])


def _cards() -> list[Path]:
    """The cards of the networks that ship."""
    return sorted(MINIATURE_DIR.glob("*/README.md"))


def _unfit(instance: Instance, ask_server: AskServer) -> Iterator[Finding]:
    """What is there, and does not fit, or is known to no library."""
    recipe, sections = instance.recipe, instance.contract.sections_of(instance.recipe)
    found: dict[str, str | None] = {}
    if "segmenter" in sections:
        yield from _tag_without_weights(recipe.segmenter.encoder)
    if "write_prompts" in sections:
        section = recipe.write_prompts
        if section.server is not None:
            yield from _unserved(ask_server(section.server, section.model))
        else:
            found["write_prompts.model"] = fitness.chat_template_problem(section.model)
    if "synthesize" in sections and recipe.synthesize.mode == "paint":
        found["synthesize.scheduler"] = fitness.scheduler_problem(recipe.synthesize.scheduler)
    if "select" in sections and recipe.select.rule == "checks":
        found["select.clip"] = fitness.clip_problem(recipe.select.clip)
    if "refine" in sections:
        section = recipe.refine
        found["refine.weights"] = fitness.sam_problem(section.model, section.weights)
        if names := _class_names(recipe):
            found["refine.rule"] = fitness.rule_problem(section.rule, names)
    for what, problem in found.items():
        if problem is not None:
            yield Finding(what=what, state="error", text=problem.removeprefix(f"{what}: "))


def _unserved(problem: str | None) -> Iterator[Finding]:
    """What is wrong with a writer's server, or with the model asked of it."""
    if problem is None:
        return
    asked = "write_prompts.model"
    what = asked if problem.startswith(f"{asked}: ") else "write_prompts.server"
    text = problem.removeprefix(f"{what}: ")
    yield Finding(what=what, state="error", text=text, by_network=True)


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
    from stages.labels import load_labelspace  # numpy, which `plan` does without

    try:
        return load_labelspace(recipe.data.labels).names
    except (OSError, ValueError):
        return ()


def missing_checker(section: Any) -> Iterator[Finding]:
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
