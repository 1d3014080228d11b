"""Read the word files of this folder: scene attributes, the writer's instructions, the prompt bank.

from prompts.loader import load_bank
print(len(load_bank()), load_bank()[0].text)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class BankPrompt:
    """One shipped prompt."""

    text: str
    attributes: Mapping[str, str]
    """Time, weather and season of the scene."""


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What scenes can vary in."""

    values: Mapping[str, tuple[str, ...]]
    """Attribute -> its values."""
    conflicts: tuple[Mapping[str, str], ...]
    """Pairs of attribute values that do not go together."""

    def clash(self, scene: Mapping[str, str]) -> bool:
        """Whether a scene (attribute -> value) holds a pair that does not go together."""
        return any(pair.items() <= scene.items() for pair in self.conflicts)


@dataclass(frozen=True, kw_only=True)
class WriterWords:
    """What the language model is told, and how its replies are judged."""

    instruction: str
    """Request with the fields {attributes} and {classes}."""
    again: str
    """Follow-up to a refused reply with the field {problem}."""
    examples: tuple[Mapping[str, str], ...]
    """Earlier turns: attributes, classes, reply."""
    scene_words: tuple[str, ...]
    """Words of which a description must hold one."""
    refusals: tuple[str, ...]
    """Phrases of a refusal, lower case."""
    chatter: tuple[str, ...]
    """Phrases of talk about the task, lower case."""

    def conversation(
        self, scene: Mapping[str, str], classes: Sequence[str], *, refused: Sequence[str] = ()
    ) -> list[dict[str, str]]:
        """The turns of a chat that ends with the request for one description.

        Args:
            scene: attribute -> value.
            classes: words for what must be visible.
            refused: the last reply and what was wrong with it, if it is asked for again.
        """
        turns = []
        for example in self.examples:
            turns.append({"role": "user", "content": self._request(**_ask_of(example))})
            turns.append({"role": "assistant", "content": example["reply"]})
        attributes = "; ".join(f"{name}: {value}" for name, value in scene.items())
        turns.append({"role": "user", "content": self._request(attributes, ", ".join(classes))})
        if refused:
            reply, problem = refused
            turns.append({"role": "assistant", "content": reply or "..."})
            turns.append({"role": "user", "content": self.again.format(problem=problem)})
        return turns

    def _request(self, attributes: str, classes: str) -> str:
        return self.instruction.format(attributes=attributes, classes=classes)


def _ask_of(example: Mapping[str, str]) -> dict[str, str]:
    return {"attributes": example["attributes"], "classes": example["classes"]}


def _read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def load_attributes() -> Attributes:
    """The scene attributes of `attributes.yaml`."""
    raw = _read("attributes.yaml")
    values = {name: tuple(values) for name, values in raw["attributes"].items()}
    return Attributes(values=values, conflicts=tuple(raw["conflicts"]))


@lru_cache(maxsize=1)
def load_words() -> WriterWords:
    """The writer's instruction, examples and word lists of `writer.yaml`."""
    raw = _read("writer.yaml")
    return WriterWords(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})


@lru_cache(maxsize=1)
def load_bank() -> tuple[BankPrompt, ...]:
    """The shipped prompts of `bank.yaml`, in file order."""
    return tuple(
        BankPrompt(text=text, attributes=group["when"])
        for group in _read("bank.yaml")
        for text in group["prompts"]
    )
