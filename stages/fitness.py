"""What can be told of models, servers and rules before any work: one line each, or None. No torch.

problem = scheduler_problem("EulerScheduler")

Libraries are not imported for their names: the names of their files, and of the classes in them,
are read. What only the libraries know (`encoder_problem`, `clip_tag_problem`) imports them.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from models.config import EncoderConfig, name_path, weights_path
from models.rule_classes import RuleClasses
from models.served_writer import connect

if TYPE_CHECKING:
    from models.hub import HubAnswer

HUB_TIMEOUT_S = 5.0
BY_CLASS = frozenset({"guided", "stuff_things"})
"""Refinement rules that treat some classes in ways of their own: those of Cityscapes."""
SAM_BYTES = {"vit_b": 375_042_383, "vit_l": 1_249_524_607, "vit_h": 2_564_550_879}
"""Sizes of the official checkpoint files; those of other formats differ by less than 1 %."""
_SAM_TOLERANCE = 0.02


def hub_answer(reference: str, revision: str | None) -> "HubAnswer":
    """What the hub says of a model."""
    from models.hub import ask_hub

    return ask_hub(reference, revision, timeout_s=HUB_TIMEOUT_S)


def server_problem(url: str, model: str) -> str | None:
    """Whether a writer's server answers and has the model."""
    try:
        connect(url, model=model)
    except (ConnectionError, ValueError) as error:
        return str(error)
    return None


def chat_template_problem(reference: str) -> str | None:
    """Whether a writer's folder has a chat template; of a hub's model its tokenizer tells."""
    folder = weights_path(reference)
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return None
    if any(folder.glob("chat_template.*")) or any(folder.glob("additional_chat_templates/*")):
        return None
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # a damaged file is told where it is loaded
    if settings.get("chat_template"):
        return None
    return (
        f"{reference!r} has no chat template, so it was not trained to follow instructions: "
        "choose an instruction-tuned model (often named -Instruct or -chat)"
    )


def scheduler_problem(name: str | None) -> str | None:
    """Whether the installed diffusers has a scheduler of that class name."""
    known = _classes_in("diffusers", "schedulers/**/scheduling_*.py", ending="Scheduler")
    if name is None or not known or name in known:
        return None
    return f"diffusers has no {name!r}; {_near(name, known)}"


def clip_problem(name: str | None) -> str | None:
    """Whether the installed open_clip has a model of that name (folders and hub ids aside)."""
    known = _files_in("open_clip", "model_configs/*.json")
    if name is None or not known or name.startswith("hf-hub:") or name_path(name) is not None:
        return None
    return None if name in known else f"open_clip has no {name!r}; {_near(name, known)}"


def rule_problem(rule: str, class_names: Sequence[str]) -> str | None:
    """Whether a refinement rule knows the classes of the labels."""
    if rule not in BY_CLASS:
        return None
    try:
        RuleClasses.of(class_names)
    except ValueError as error:
        return f"refine.rule={rule}: {error}. Use released, agreement or majority."
    return None


def sam_problem(model: str, weights: str | None) -> str | None:
    """Whether a SAM's file is, by its size, that of another variant than the one named."""
    path = weights_path(weights) if weights else None
    if path is not None and path.is_dir():
        path = path / "sam.safetensors"
    if model not in SAM_BYTES or path is None or not path.is_file():
        return None
    size = path.stat().st_size
    looks = [
        name
        for name, expected in SAM_BYTES.items()
        if abs(size - expected) <= _SAM_TOLERANCE * expected
    ]
    if not looks or looks[0] == model:
        return None
    return f"{path} has {size / 1e6:.0f} MB as {looks[0]}, and refine.model is {model}"


def encoder_problem(config: EncoderConfig) -> str | None:
    """Whether the encoder's library knows its name and tag. Imports the library, and torch."""
    from models.towers import check_names

    try:
        check_names(config)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None


def clip_tag_problem(name: str, weights: str | None) -> str | None:
    """Whether open_clip has such weights of a CLIP, where they are a tag. Imports torch."""
    import open_clip

    if name.startswith("hf-hub:") or name_path(name) is not None:
        return None
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None:
        return f"{name!r} needs select.clip_weights, a file or one of {', '.join(tags)}"
    if weights in tags or weights_path(weights) is not None:
        return None
    return f"open_clip has no weights {weights!r} of {name}; {_near(weights, tags)}"


@cache
def _classes_in(library: str, pattern: str, *, ending: str) -> frozenset[str]:
    """Classes that a library's files define; none where it is not installed."""
    found = set()
    for path in _library(library).glob(pattern):
        text = path.read_text(encoding="utf-8", errors="replace")
        found.update(re.findall(rf"^class (\w*{ending})\b", text, re.MULTILINE))
    return frozenset(found)


@cache
def _files_in(library: str, pattern: str) -> frozenset[str]:
    return frozenset(path.stem for path in _library(library).glob(pattern))


def _library(name: str) -> Path:
    spec = find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else Path(f"{name} is not installed")


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=3)
    if close:
        return f"nearest: {', '.join(close)}"
    return f"known: {', '.join(sorted(known)[:20])}"
