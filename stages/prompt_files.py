"""Prompts as a file, ours or written elsewhere: one JSON object a line, checked line by line.

rows = read_prompts(Path("prompts.jsonl"))
"""

import unicodedata
from pathlib import Path

from stages.shards import Row, numbered_lines, parse_row

SHOWN = 5
"""Broken lines that a message tells; it counts the others."""
_LONGEST = 2000
"""Characters of a prompt; CLIP reads about 300 of them."""
_LEAST_LETTERS = 0.6
_FIRST_OF_SCRIPTS_WITHOUT_SPACES = "\u2e80"
"""From here on lie the scripts of Chinese and Japanese."""


def read_prompts(path: Path, *, ids: bool = True) -> list[Row]:
    """The prompts of a `prompts.jsonl`.

    Args:
        path: the file.
        ids: whether every prompt must have an id; else those without get their place as one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no prompt, or lines are broken; the message gives their numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `clouds --stage write_prompts`.")
    rows: list[Row] = []
    lines: dict[str, int] = {}
    broken: list[str] = []
    for number, line in numbered_lines(path):
        try:
            row = parse_row(line)
            _must_be_text(row, "text")
            if ids or "id" in row:
                _must_be_id(row, lines)
            else:
                row["id"] = f"{len(rows):05d}"
        except ValueError as error:
            broken.append(f"line {number}: {error}")
            continue
        lines[row["id"]] = number
        rows.append(row)
    if broken:
        more = f"\n  and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise ValueError(f"{path} has broken lines:\n  " + "\n  ".join(broken[:SHOWN]) + more)
    if not rows:
        raise ValueError(f"{path} holds no prompts.")
    return rows


def _must_be_text(row: Row, name: str) -> None:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} must be a text that is not empty, got {value!r}")


def _must_be_id(row: Row, lines: dict[str, int]) -> None:
    _must_be_text(row, "id")
    if row["id"] in lines:
        raise ValueError(f"the id {row['id']!r} was used in line {lines[row['id']]}")
    if not all(letter.isalnum() or letter in "-_." for letter in row["id"]):
        raise ValueError(
            f"the id {row['id']!r} becomes a file name: use letters, digits, '-', '_' and '.' only"
        )


def doubt(text: str) -> str | None:
    """Why a text written elsewhere can hardly be meant as a prompt, or None.

    Everything else may paint: language, length and style are the author's.
    """
    if any(unicodedata.category(letter) == "Cc" and letter != "\t" for letter in text):
        return "holds control characters"
    if len(text) > _LONGEST:
        return f"has {len(text)} characters (at most {_LONGEST})"
    if len(text.split()) < 2 and not any(
        letter >= _FIRST_OF_SCRIPTS_WITHOUT_SPACES for letter in text
    ):
        return "is a single word, and a prompt describes a scene"
    visible = [letter for letter in text if not letter.isspace()]
    letters = sum(unicodedata.category(letter)[0] in "LM" for letter in visible)
    if letters < _LEAST_LETTERS * len(visible):
        return "consists of signs rather than words"
    return None
