"""Judge a writer's replies: parse them strictly, check what they name, find duplicates.

problem = find_problem("A street with a cyclist.", finished=True, asked={"rider": ("cyclist",)},
                       words=load_words(), count_tokens=len)
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prompts.loader import WriterWords

TOKENS_MAX = 77
"""Length of CLIP's text context, begin and end token included."""
WORDS_MIN, WORDS_MAX = 8, 60
NEAR = 0.5
"""Two texts that share this much of their word pairs (Jaccard) are near duplicates."""

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?|\d+")
_STRANGE = re.compile(r"[^\w\s.,;:'’\"“”()/&%–-]|_")
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'"})
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s")
_LABEL = re.compile(r"^\s*(?:prompt|description|caption|answer|scene|sentence|output)\s*\d*\s*:")
_IRREGULAR = {"people": "person", "children": "child", "men": "man", "women": "woman"}
_KEEP_S = ("ss", "us", "is")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a reply is refused."""

    kind: str
    """Short and fixed, for counting."""
    detail: str
    """A few words for the writer."""


def tidy(reply: str) -> str:
    """The description in a reply: without space around, and without quotation marks around."""
    text = reply.strip()
    for left, right in ('""', "''", "“”", "‘’"):
        if len(text) > 1 and text.startswith(left) and text.endswith(right):
            text = text[1:-1].strip()
    return text


def stems(text: str) -> list[str]:
    """Words of a text in lower case, nouns in the singular as far as simple rules go."""
    return [_singular(word) for word in _WORD.findall(text.lower())]


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(_KEEP_S):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("shes", "ches", "xes", "sses", "uses")) and word not in ("houses",):
        return word[:-2]
    return word[:-1]


def names(text: str, phrases: Iterable[str]) -> bool:
    """Whether the text holds one of the phrases as whole words, in singular or plural."""
    spaced = f" {' '.join(stems(text))} "
    return any(f" {' '.join(stems(phrase))} " in spaced for phrase in phrases)


def named_classes(text: str, classes: Mapping[str, Sequence[str]]) -> list[str]:
    """The classes (name -> words for it) that a text names, in their order."""
    spaced = f" {' '.join(stems(text))} "
    return [
        name
        for name, phrases in classes.items()
        if any(f" {' '.join(stems(phrase))} " in spaced for phrase in phrases)
    ]


def find_problem(
    text: str,
    *,
    finished: bool,
    asked: Mapping[str, Sequence[str]],
    words: WriterWords,
    count_tokens: Callable[[str], int],
) -> Problem | None:
    """Why a tidied reply cannot be used as a prompt, or None.

    Args:
        text: the reply, tidied.
        finished: whether the writer ended it by itself.
        asked: classes that it must name -> words for each.
        words: scene words and phrases of refusals and chatter.
        count_tokens: tokens of a text for the painter's text encoder, begin and end included.
    """
    return (
        _form_problem(text, finished=finished)
        or _talk_problem(text.lower().translate(_APOSTROPHES), words)
        or _content_problem(text, asked=asked, words=words, count_tokens=count_tokens)
    )


def _form_problem(text: str, *, finished: bool) -> Problem | None:
    if not text:
        return Problem(kind="empty", detail="it was empty")
    if _STRANGE.search(text):
        return Problem(kind="strange characters", detail="it held strange characters")
    if "\n" in text or _LIST_MARK.match(text):
        return Problem(kind="several lines", detail="it was not one sentence on one line")
    if not finished:
        return Problem(kind="cut off", detail="it did not come to an end")
    num_words = len(_WORD.findall(text))
    if num_words < WORDS_MIN:
        return Problem(kind="too short", detail=f"it had fewer than {WORDS_MIN} words")
    if num_words > WORDS_MAX:
        return Problem(kind="too long", detail=f"it had more than {WORDS_MAX} words")
    return None


def _talk_problem(lower: str, words: WriterWords) -> Problem | None:
    if _says(lower, words.refusals):
        return Problem(kind="refusal", detail="it refused")
    if _LABEL.match(lower) or _says(lower, words.chatter):
        return Problem(kind="chatter", detail="it talked about the task")
    return None


def _says(lower: str, phrases: Iterable[str]) -> bool:
    """Whether a text in lower case holds a phrase that begins as a word: "here are" is not in
    "there are"."""
    return any(re.search(rf"(?<!\w){re.escape(phrase)}", lower) for phrase in phrases)


def _content_problem(
    text: str,
    *,
    asked: Mapping[str, Sequence[str]],
    words: WriterWords,
    count_tokens: Callable[[str], int],
) -> Problem | None:
    if not names(text, words.scene_words):
        return Problem(kind="no scene", detail="it described no street or road")
    missing = [name for name, phrases in asked.items() if not names(text, phrases)]
    if missing:
        return Problem(kind="class not named", detail=f"it did not name: {', '.join(missing)}")
    if (num_tokens := count_tokens(text)) > TOKENS_MAX:
        return Problem(kind="too many tokens", detail=f"it had {num_tokens} tokens")
    return None


@dataclass
class Distinct:
    """The accepted texts so far; tells whether another one is new."""

    _texts: set[tuple[str, ...]] = field(default_factory=set)
    _sizes: list[int] = field(default_factory=list)
    _holders: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))

    def problem(self, text: str) -> Problem | None:
        """Whether the text is an exact or a near duplicate of an accepted one."""
        words = stems(text)
        if tuple(words) in self._texts:
            return Problem(kind="duplicate", detail="it was written before")
        pairs = set(itertools.pairwise(words))
        shared = Counter(holder for pair in pairs for holder in self._holders.get(pair, ()))
        for holder, count in shared.items():
            if count >= NEAR * (len(pairs) + self._sizes[holder] - count):
                return Problem(kind="near duplicate", detail="it was nearly one from before")
        return None

    def add(self, text: str) -> None:
        """Accept a text."""
        words = stems(text)
        pairs = set(itertools.pairwise(words))
        for pair in sorted(pairs):
            self._holders[pair].append(len(self._sizes))
        self._texts.add(tuple(words))
        self._sizes.append(len(pairs))
